"""Every recipe loads and makes a plan that holds together; seeds and runtime reach only what they should."""

from pathlib import Path

import msgspec
import pytest

from pensar import recipe as recipes
from pensar.base import pipeline
from pensar.base.config import canonical, complete, convert
from pensar.base.errors import ConfigError
from pensar.base.stage import Stage
from pensar.evaluate import suite
from pensar.model.count import flops_per_token
from pensar.recipe import GROUPS, Recipe, estimates, links, load, stages

FOLDER = Path(__file__).parent.parent / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
every_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def fingerprints(recipe: Recipe, root: Path) -> dict[str, str]:
    return {planned.name: planned.fingerprint for planned in pipeline.plan(stages(recipe), root)}


def by_name(recipe: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages(recipe)}


def trained(recipe: Recipe) -> set[str]:
    """The stages of the recipe that train: a sweep is not in every one."""
    return set(GROUPS["train"]) & by_name(recipe).keys()


def test_there_are_recipes() -> None:
    assert "tiny" in {path.stem for path in FILES}


@every_recipe
def test_a_recipe_loads_and_its_stages_make_a_plan(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    plan = pipeline.plan(stages(recipe), tmp_path)
    assert {planned.status for planned in plan} == {"new"}
    assert len({planned.fingerprint for planned in plan}) == len(plan)
    seen: set[str] = set()
    for stage in stages(recipe):
        assert set(stage.inputs.values()) <= seen, f"{stage.name} reads what does not exist yet"
        seen.add(stage.name)
    assert set(links(recipe).values()) <= seen
    grouped = [name for names in GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert seen <= {*grouped, "evaluate"}


@every_recipe
def test_a_recipe_survives_being_written_down(path: Path) -> None:
    recipe = load(path)
    assert convert(canonical(recipe), Recipe) == recipe
    assert convert(complete(recipe), Recipe) == recipe


@every_recipe
def test_every_role_of_the_evaluation_is_given(path: Path) -> None:
    needed = {"tasks", "shards", *suite.CHAT_STAGES, *suite.BASE_STAGES, *suite.STUDENTS.values()}
    assert set(by_name(load(path))["evaluate"].inputs) == needed


@every_recipe
def test_the_seed_changes_what_is_trained_and_leaves_the_data_alone(path: Path, tmp_path: Path) -> None:
    before, after = load(path), load(path, ["seed=7"])
    first, second = by_name(before), by_name(after)
    changed = {name for name in first if canonical(first[name].config) != canonical(second[name].config)}
    assert changed == {*trained(before), "evaluate"}
    old, new = fingerprints(before, tmp_path), fingerprints(after, tmp_path)
    assert {name for name in old if old[name] != new[name]} == changed


@every_recipe
def test_where_it_runs_is_no_part_of_what_it_is(path: Path, tmp_path: Path) -> None:
    elsewhere = load(path, ["runtime.ranks=5", "runtime.threads=3", "name=other"])
    assert elsewhere.runtime.ranks == 5
    assert fingerprints(load(path), tmp_path) == fingerprints(elsewhere, tmp_path)


@every_recipe
def test_an_unknown_key_is_refused_with_the_nearest_one(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `reasoning_rl`\?"):
        load(path, ["reasonin_rl.steps=3"])
    with pytest.raises(ConfigError, match=r"did you mean `steps`\?"):
        load(path, ["cold_start.step=3"])
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"extends: {path}\ntokenzier: {{size: 512}}\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml.*tokenzier.*did you mean `tokenizer`\?"):
        load(broken)


@every_recipe
def test_estimates_are_positive_and_cover_every_stage_that_trains(path: Path) -> None:
    recipe = load(path)
    found = estimates(recipe)
    assert set(found) == trained(recipe)
    for estimate in found.values():
        assert all(value > 0 for value in msgspec.structs.astuple(estimate))
    alone = estimates(load(path, ["runtime.ranks=1"]))
    twice = estimates(load(path, ["runtime.ranks=2"]))
    for name, estimate in alone.items():
        assert estimate.flops == twice[name].flops
        assert estimate.seconds == pytest.approx(2 * twice[name].seconds)
    longer = estimates(load(path, [f"pretraining.general.tokens={2 * recipe.pretraining.general.tokens}"]))
    assert longer["pretrain-general"].flops == pytest.approx(2 * found["pretrain-general"].flops)


@every_recipe
def test_own_sources_take_the_place_of_the_demonstration(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a page"}\n')
    demo = by_name(load(path))
    assert demo["sources"].inputs == {"demo": "demo"}
    listed = load(path, [f"data.sources=[{{name: mine, path: {file}}}]"])
    own = by_name(listed)
    assert "demo" not in own
    assert own["sources"].outside == (file,)
    assert set(demo) - set(own) == {"demo"}


@every_recipe
def test_seeds_of_the_recipe_reach_every_stage_that_trains(path: Path) -> None:
    for stage in stages(load(path, ["seed=11"])):
        if stage.name in GROUPS["train"]:
            assert stage.config.seed == 11  # type: ignore[attr-defined]


def test_the_module_names_what_the_command_line_asks_for() -> None:
    assert {"load", "stages", "estimates", "GROUPS", "links"} <= set(vars(recipes))


def test_an_estimate_for_accelerators_goes_by_their_table_and_layout() -> None:
    recipe = load(FOLDER / "cluster.yaml")
    model = recipe.pretraining.general.shape
    assert model is not None
    found = estimates(recipe)["pretrain-general"]
    flops = 30e12 * flops_per_token(model.model(recipe.tokenizer.size), 4_096)
    assert found.flops == pytest.approx(flops)
    assert found.seconds == pytest.approx(flops / (512 * 0.28 * 989e12))
    assert 10 * 2**30 < found.memory_bytes / 512 < 139 * 2**30


def test_a_sweep_is_a_stage_only_where_it_is_asked_for_and_feeds_who_takes_values_from_it(
    tmp_path: Path,
) -> None:
    plain, swept = load(FOLDER / "tiny.yaml"), load(FOLDER / "scaling.yaml")
    names = [stage.name for stage in stages(swept)]
    assert names.index("shards") + 1 == names.index("scaling") == names.index("pretrain-general") - 1
    assert set(names) - set(by_name(plain)) == {"scaling"}
    assert "scaling" not in by_name(plain)["pretrain-general"].inputs
    assert by_name(swept)["pretrain-general"].inputs["scaling"] == "scaling"
    assert "scaling" not in by_name(swept)["student-pretrain"].inputs
    both = load(FOLDER / "scaling.yaml", ["student.pretrain.predicted=[lr]"])
    assert by_name(both)["student-pretrain"].inputs["scaling"] == "scaling"
    # A sweep whose values nobody takes changes nothing else.
    alone = load(FOLDER / "scaling.yaml", ["pretraining.general.predicted=[]", "pretraining.general.schedule.decay=0.0",
                                           "pretraining.general.schedule.warmup=0.02"])  # fmt: skip
    before, after = fingerprints(plain, tmp_path), fingerprints(alone, tmp_path)
    assert {name: after[name] for name in before} == before


def test_values_from_a_sweep_that_is_not_there_are_refused() -> None:
    recipe = load(FOLDER / "tiny.yaml", ["pretraining.general.predicted=[lr]"])
    with pytest.raises(ConfigError, match=r"predicted is \['lr'\], and the recipe has no `scaling`"):
        stages(recipe)

"""Configuration: YAML 1.2 scalars, exact paths in errors, overrides, and the canonical form."""

import enum
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from pensar.base.config import Config, canonical, complete, convert, json_schema, load, parse
from pensar.base.errors import ConfigError
from pensar.base.yaml12 import scalar


class Rule(Config, tag_field="rule"):
    pass


class Words(Rule, tag="words"):
    min_words: Annotated[int, msgspec.Meta(ge=1)] = 3


class Repetition(Rule, tag="repetition"):
    max_share: float = 0.3


class Clean(Config):
    filters: tuple[Words | Repetition, ...] = ()
    languages: list[str] = msgspec.field(default_factory=list)


class Optimizer(Config):
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["muon", "adamw"] = "muon"


class Recipe(Config):
    name: str = "tiny"
    steps: int = 100
    clean: Clean = Clean()
    optimizer: Optimizer = Optimizer()
    folder: Path | None = None
    adopt: dict[str, Path] = msgspec.field(default_factory=dict)
    fast: bool = False


def read(text: str, *overrides: str) -> Recipe:
    return parse(text, Recipe, "tiny.yaml", overrides)


def test_scalars_are_those_of_yaml_1_2() -> None:
    recipe = read(
        "clean: {languages: [no, on, 1:30, yes, 0o17x, 2026-11-23]}\noptimizer: {lr: 3e-4}\nsteps: 0x10"
    )
    assert recipe.clean.languages == ["no", "on", "1:30", "yes", "0o17x", "2026-11-23"]
    assert recipe.optimizer.lr == 3e-4
    assert recipe.steps == 16


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("Null", None), ("nUll", "nUll"),
        ("true", True), ("FALSE", False), ("yes", "yes"), ("No", "No"), ("off", "off"),
        ("12", 12), ("-7", -7), ("+3", 3), ("007", 7), ("0o17", 15), ("0xFf", 255), ("1_000", "1_000"),
        ("3e-4", 3e-4), ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), ("1e3", 1000.0), ("e3", "e3"),
        ("1:30", "1:30"), ("2001-12-14", "2001-12-14"), ("<<", "<<"), ("=", "="),
        (".inf", float("inf")), ("-.INF", float("-inf")),
    ],
)  # fmt: skip
def test_each_scalar_of_the_core_schema(text: str, value: object) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_quotes_make_text() -> None:
    assert read("name: '12'").name == "12"
    assert read('name: "true"').name == "true"
    assert read("name: |\n  12\n").name == "12\n"


def test_keys_are_text_even_when_they_look_otherwise() -> None:
    assert read("adopt: {no: a, 1: b}").adopt == {"no": Path("a"), "1": Path("b")}


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps: 3", "tiny.yaml:1: unknown key $.stps; did you mean `steps`?"),
        (
            "name: a\nclean:\n  filters:\n    - {rule: words, min_wrds: 3}",
            "tiny.yaml:4: unknown key $.clean.filters[0].min_wrds; did you mean `min_words`?",
        ),
        ("optimizer: {zzz: 1}", "tiny.yaml:1: unknown key $.optimizer.zzz; valid: betas, kind, lr"),
        ("name: a\nsteps: many", "tiny.yaml:2: $.steps is 'many': expected `int`"),
        ("steps: 4e6", "tiny.yaml:1: $.steps is 4000000.0: expected `int`; write 4000000"),
        (
            "steps: 4_000",
            "tiny.yaml:1: $.steps is '4_000': expected `int`; YAML numbers have no underscores, write 4000",
        ),
        ("fast: yes", "tiny.yaml:1: $.fast is 'yes': expected `bool`; write true or false"),
        (
            "clean:\n  filters:\n    - {rule: words, min_words: 0}",
            "tiny.yaml:3: $.clean.filters[0].min_words is 0: expected `int` >= 1",
        ),
        ("clean: {filters: [{rule: word}]}", "tiny.yaml:1: $.clean.filters[0].rule is 'word': invalid value 'word'"),
        ("optimizer: {kind: sgd}", "tiny.yaml:1: $.optimizer.kind is 'sgd': invalid enum value 'sgd'"),
        ("optimizer: 3", "tiny.yaml:1: $.optimizer is 3: expected `object`"),
        ("optimizer: {betas: [0.9]}", "tiny.yaml:1: $.optimizer.betas: expected `array` of length 2, got 1"),
        ("- a", "tiny.yaml:1: $: expected `object`, got `array`"),
        ("name: a\nsteps: 1\nname: b", "tiny.yaml:3: key `name` stands twice in $; remove one"),
        ("name: [a\nsteps: 1", "tiny.yaml:2:6: not valid YAML: "),
        ("name: !!python/name:os.x y", "tiny.yaml:1: tag tag:yaml.org,2002:python/name:os.x is not used here"),
        ("clean: &a {filters: [*a]}", "tiny.yaml:1: $.clean.filters[0] contains itself through an alias"),
        ("? [a, b]\n: 1", "tiny.yaml:1: a key of $ is a list or a mapping"),
    ],
)  # fmt: skip
def test_errors_name_file_line_path_value_and_remedy(text: str, message: str) -> None:
    assert error_of(text).startswith(message)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file"):
        load(tmp_path / "gone.yaml", Recipe)
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path, Recipe)
    broken = tmp_path / "broken.yaml"
    broken.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="byte 6 is not UTF-8"):
        load(broken, Recipe)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing\n")
    assert load(file, Recipe) == Recipe()


def test_overrides_reach_every_depth() -> None:
    text = "clean: {filters: [{rule: words}, {rule: repetition}], languages: [por]}"
    recipe = read(
        text,
        "clean.filters.1.max_share=0.5",
        "optimizer.lr=3e-4",
        "clean.languages=[no, eng]",
        "adopt.s1=models/qwen",
        "name=no",
        "name=a=b",
    )
    assert recipe.clean.filters == (Words(), Repetition(max_share=0.5))
    assert recipe.optimizer == Optimizer(lr=3e-4)
    assert recipe.clean.languages == ["no", "eng"]
    assert recipe.adopt == {"s1": Path("models/qwen")}
    assert recipe.name == "a=b"


def test_an_override_replaces_what_stood_there() -> None:
    recipe = read("clean: {languages: [por]}", "clean={filters: [{rule: words, min_words: 5}]}")
    assert recipe.clean == Clean(filters=(Words(min_words=5),))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set steps: write it as key.path=value"),
        ("a..b=1", "--set a..b=1: write it as key.path=value"),
        ("stps=1", "--set stps=1:1: unknown key $.stps; did you mean `steps`?"),
        ("steps=x", "--set steps=x:1: $.steps is 'x': expected `int`"),
        (
            "clean.languages.2=x",
            "--set clean.languages.2=x: $.clean.languages is a list of 1; `2` is no index in it",
        ),
        (
            "clean.languages.0.x=1",
            "--set clean.languages.0.x=1: $.clean.languages[0] is 'por', which has no parts",
        ),
        ("name=[a", "--set name=[a:1"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    assert error_of("clean: {languages: [por]}", override).startswith(message.replace(":1: ", ": ", 1))


def test_the_canonical_form_omits_defaults_at_every_level() -> None:
    assert canonical(Recipe()) == {}
    assert canonical(read("steps: 100\nclean: {filters: [{rule: words, min_words: 3}]}")) == {
        "clean": {"filters": [{"rule": "words"}]}
    }
    assert canonical(Optimizer(lr=1e-4)) == {"lr": 1e-4}
    assert canonical(Recipe(folder=Path("a/b"))) == {"folder": "a/b"}
    assert (
        json.dumps(canonical(Recipe(adopt={"b": Path("y"), "a": Path("x")})))
        == '{"adopt": {"a": "x", "b": "y"}}'
    )


def test_a_new_field_with_its_default_leaves_the_canonical_form_alone() -> None:
    Newer = msgspec.defstruct("Newer", [("extra", int, 7)], bases=(Optimizer,), frozen=True, kw_only=True)
    assert canonical(Newer(lr=1e-4)) == canonical(Optimizer(lr=1e-4))


def test_the_canonical_form_can_be_read_back() -> None:
    recipe = read(
        "clean: {filters: [{rule: words, min_words: 4}]}\nfolder: x\noptimizer: {betas: [0.8, 0.9]}"
    )
    assert convert(canonical(recipe), Recipe) == recipe
    assert complete(recipe)["optimizer"] == {"lr": 3e-3, "betas": [0.8, 0.9], "kind": "muon"}
    assert complete(recipe)["clean"]["filters"] == [{"rule": "words", "min_words": 4}]


class Colour(enum.Enum):
    RED = "red"


class Anything(Config):
    value: Any = None


@pytest.mark.parametrize(
    "value", [len, object(), b"bytes", float("nan"), float("inf"), {1: "a"}, [lambda: 1]]
)
def test_values_without_a_stable_encoding_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"\$\.value"):
        canonical(Anything(value=value))


def test_enums_and_sets_have_a_stable_encoding() -> None:
    assert canonical(Anything(value=Colour.RED)) == {"value": "red"}
    assert canonical(Anything(value={"b", "a", "c"})) == {"value": ["a", "b", "c"]}


def test_true_and_one_are_two_settings() -> None:
    class Choice(Config):
        value: bool | int = True

    assert canonical(Choice(value=1)) == {"value": 1}


def test_the_schema_describes_every_key() -> None:
    schema = json_schema(Recipe)
    recipe = schema["$defs"]["Recipe"]
    assert set(recipe["properties"]) == {"name", "steps", "clean", "optimizer", "folder", "adopt", "fast"}
    assert recipe["additionalProperties"] is False
    json.dumps(schema)


class Learning(Config):
    queries: str = "reasoning"
    steps: int = 40
    optimizer: Optimizer = Optimizer(kind="adamw", lr=5e-4)


class Stages(Config):
    first: Learning = Learning()
    second: Learning = Learning(queries="general", optimizer=Optimizer(kind="adamw", betas=(0.8, 0.9)))
    rule: Words | Repetition = Words(min_words=5)
    named: dict[str, Learning] = msgspec.field(default_factory=lambda: {"a": Learning(steps=1)})


def test_what_a_file_leaves_out_of_a_field_comes_from_that_field_s_own_default() -> None:
    stages = parse("first: {optimizer: {lr: 1.0}}\nsecond: {steps: 9, optimizer: {lr: 0.5}}", Stages)
    assert stages.first == Learning(optimizer=Optimizer(kind="adamw", lr=1.0))
    second = Optimizer(kind="adamw", betas=(0.8, 0.9), lr=0.5)
    assert stages.second == Learning(queries="general", steps=9, optimizer=second)
    assert convert(canonical(stages), Stages) == stages
    assert parse("", Stages, overrides=["second.steps=3"]).second.queries == "general"


def test_another_member_of_a_union_and_the_items_of_a_mapping_begin_with_their_class_s_defaults() -> None:
    assert parse("rule: {rule: repetition}", Stages).rule == Repetition()
    assert parse("rule: {rule: words}", Stages).rule == Words(min_words=5)
    assert parse("named: {b: {queries: x}}", Stages).named == {"b": Learning(queries="x")}


def test_a_file_that_extends_another_changes_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        "name: small\noptimizer: {lr: 0.1, kind: adamw}\nclean: {languages: [a]}\n"
    )
    (tmp_path / "large.yaml").write_text(
        "extends: small.yaml\n\noptimizer: {lr: 0.2}\nclean: {languages: [b, c]}\n"
    )
    (tmp_path / "larger.yaml").write_text("extends: large.yaml\nsteps: 7\n")
    found = load(tmp_path / "larger.yaml", Recipe, ["name=mine"])
    assert found == Recipe(
        name="mine",
        steps=7,
        optimizer=Optimizer(lr=0.2, kind="adamw"),
        clean=Clean(languages=["b", "c"]),
    )
    (tmp_path / "small.yaml").write_text("optimizer: {lr: fast}\n")
    (tmp_path / "large.yaml").write_text("extends: small.yaml\n")
    with pytest.raises(ConfigError, match=r"small\.yaml:1: \$\.optimizer\.lr is 'fast'"):
        load(tmp_path / "larger.yaml", Recipe)


def test_files_that_extend_each_other_or_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: no such file, which .*a\.yaml extends"):
        load(tmp_path / "a.yaml", Recipe)
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="take one `extends` out"):
        load(tmp_path / "a.yaml", Recipe)
    (tmp_path / "b.yaml").write_text("extends: 3\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:1: extends is 3"):
        load(tmp_path / "b.yaml", Recipe)

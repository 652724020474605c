"""Every layout of ranks trains the model that one rank trains, and goes on where any other stopped."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import parallel_work
import pytest
import torch
from parallel_work import Killed, Weights

from pensar.base.errors import ConfigError
from pensar.base.ranks import Crew, World
from pensar.model.weights import save_model
from pensar.train.guard import Guard, GuardConfig
from pensar.train.layout import Layout, parse_layout
from pensar.train.optimizer import is_block_matrix
from pensar.train.parallel.context import columns_of
from pensar.train.parallel.depth import layers_of
from pensar.train.recompute import Recompute
from tiny import SPARSE, tiny_model

Crews = Callable[[int], Crew]
DEEP = {"num_layers": 5}
UNTIED = {"num_layers": 3, "tied": False}
MIXED = SPARSE | {"num_experts": 8}

LAYOUTS = [
    pytest.param("shard=2", {}, id="sharded weights"),
    pytest.param("shard=2", UNTIED, marks=pytest.mark.slow, id="sharded weights, untied"),
    pytest.param("tp=2", {}, id="split heads and tokens"),
    pytest.param("tp=2", UNTIED, marks=pytest.mark.slow, id="split heads and tokens, untied"),
    pytest.param("cp=2", {}, id="split contexts"),
    pytest.param("pp=2,micro_batches=2", DEEP, id="split depth"),
    pytest.param("pp=2,micro_batches=2", UNTIED, marks=pytest.mark.slow, id="split depth, untied"),
    pytest.param("pp=2,virtual=2,micro_batches=4", DEEP, id="interleaved depth"),
    pytest.param(
        "pp=2,virtual=2,micro_batches=2",
        UNTIED | {"num_layers": 4},
        marks=pytest.mark.slow,
        id="interleaved depth, untied",
    ),
    pytest.param("pp=2,virtual=2,micro_batches=2", MIXED | DEEP, id="interleaved depth of experts"),
    pytest.param(
        "pp=2,virtual=2,shard=2,ep=2,micro_batches=2",
        MIXED | DEEP,
        marks=pytest.mark.slow,
        id="interleaved depth and experts",
    ),
    pytest.param(
        "pp=2,virtual=2,tp=2,micro_batches=2", DEEP, marks=pytest.mark.slow, id="interleaved depth and heads"
    ),
    pytest.param("shard=2", MIXED, marks=pytest.mark.slow, id="sharded experts"),
    pytest.param("shard=2,ep=2", MIXED, id="split experts"),
    pytest.param("cp=2,ep=2", MIXED, marks=pytest.mark.slow, id="split contexts and experts"),
    pytest.param("tp=2", MIXED, marks=pytest.mark.slow, id="split heads, experts sharded"),
    pytest.param("tp=2,ep=2", MIXED, marks=pytest.mark.slow, id="split heads and experts"),
    pytest.param("pp=2,micro_batches=2", MIXED | DEEP, id="split depth of experts"),
    pytest.param(
        "pp=2,shard=2,ep=2,micro_batches=2", MIXED | DEEP, marks=pytest.mark.slow, id="depth and experts"
    ),
    pytest.param(
        "pp=2,tp=2,ep=2,micro_batches=2", MIXED | DEEP, marks=pytest.mark.slow, id="depth, heads and experts"
    ),
    pytest.param("shard=2,tp=2,ep=4", MIXED, marks=pytest.mark.slow, id="shards, heads and experts"),
    pytest.param("cp=2,tp=2,ep=2", MIXED, marks=pytest.mark.slow, id="contexts, heads and experts"),
    pytest.param("replicate=2,shard=2", {}, marks=pytest.mark.slow, id="replicas of shards"),
    pytest.param("shard=2,tp=2", {}, marks=pytest.mark.slow, id="shards and heads"),
    pytest.param("cp=2,tp=2", {}, marks=pytest.mark.slow, id="contexts and heads"),
    pytest.param("pp=2,shard=2,micro_batches=2", DEEP, marks=pytest.mark.slow, id="depth and shards"),
    pytest.param("pp=2,tp=2,micro_batches=2", DEEP, marks=pytest.mark.slow, id="depth and heads"),
    pytest.param("pp=2,cp=2,micro_batches=2", DEEP, marks=pytest.mark.slow, id="depth and contexts"),
    pytest.param("pp=4,micro_batches=4", DEEP, marks=pytest.mark.slow, id="four depths"),
    pytest.param(
        "replicate=2,shard=2,ep=2", MIXED, marks=pytest.mark.slow, id="replicas of shards and experts"
    ),
    pytest.param("shard=4,ep=2", MIXED, marks=pytest.mark.slow, id="more shards than a rank has experts"),
]


@pytest.fixture(scope="module")
def crews() -> Iterator[Crews]:
    """Crews by size, each started once."""
    made: dict[int, Crew] = {}

    def crew(ranks: int) -> Crew:
        if ranks not in made:
            made[ranks] = Crew(ranks=ranks, threads=1)
        return made[ranks]

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield crew
        for used in made.values():
            used.close()


def furthest(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(("layout", "changes"), LAYOUTS)
def test_a_mesh_trains_what_one_rank_trains(layout: str, changes: dict[str, Any], crews: Crews) -> None:
    ranks = parse_layout(layout).ranks
    rows = 8 if "pp" in layout else 4
    expected, weights = parallel_work.steps(World(), "", changes, rows, 1)
    found, trained = crews(ranks).call(parallel_work.steps, layout, changes, rows, 1)
    for one, many in zip(expected, found, strict=True):
        assert many.keys() == one.keys()
        for name in ("loss", "gradient_norm", "balance", "expert_overload", "dead_experts", "tokens"):
            if name in one:
                assert many[name] == pytest.approx(one[name], abs=1e-5), name
    # Muon gives noise of 1e-7 in a gradient that is almost zero the size of an update.
    assert furthest(weights, trained) < 1e-3


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("shard=2", {}),
        ("shard=2,ep=2", MIXED),
        pytest.param("tp=2", {}, marks=pytest.mark.slow),
        pytest.param("replicate=2,shard=2", {}, marks=pytest.mark.slow),
        pytest.param("shard=2,tp=2", MIXED, marks=pytest.mark.slow),
        pytest.param(
            "shard=4,ep=2", MIXED | {"num_experts": 2}, marks=pytest.mark.slow, id="pieces of experts"
        ),
    ],
)
def test_an_update_is_that_of_one_rank_and_no_rank_moves_more_than_its_part(
    layout: str, changes: dict[str, Any], crews: Crews
) -> None:
    expected, _ = parallel_work.updated(World(), "", changes)
    ranks, split = parse_layout(layout).ranks, parse_layout(layout).dp_replicate
    found, moved = crews(ranks).call(parallel_work.updated, layout, changes)
    assert furthest(expected, found) < 2e-6
    matrices = [value for name, value in expected.items() if is_block_matrix(name)]
    if "num_experts" in changes and changes["num_experts"] > 2:  # a rank's experts are whole
        matrices = [value for value in matrices if value.dim() == 2]
    # To the owners each matrix once; back to everyone who holds a piece. A rank owns one more at most, or half.
    largest = max(value[-1:].nbytes if value.dim() == 3 else value.nbytes for value in matrices)
    total = sum(value.nbytes for value in matrices)
    assert set(moved) == {"c10d::alltoall_base_"}
    assert 0 < moved["c10d::alltoall_base_"] <= (1 + split) * (total / ranks + largest)


@pytest.mark.parametrize(("layout", "changes"), [("shard=2", {}), ("shard=2,ep=2", MIXED)])
def test_ranks_without_rows_take_part(layout: str, changes: dict[str, Any], crews: Crews) -> None:
    expected, _ = parallel_work.steps(World(), "", changes, 1, 3)
    found, _ = crews(2).call(parallel_work.steps, layout, changes, 1, 3)
    for one, many in zip(expected, found, strict=True):
        assert many["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert many["gradient_norm"] == pytest.approx(one["gradient_norm"], abs=1e-5)
        assert many["tokens"] == one["tokens"]


@pytest.mark.parametrize("layout", ["shard=2", pytest.param("tp=2", marks=pytest.mark.slow)])
def test_going_on_equals_never_stopping_to_the_bit(layout: str, crews: Crews, tmp_path: Path) -> None:
    through = crews(2).call(parallel_work.stage, layout, tmp_path / "through", None)
    with pytest.raises(Killed):
        crews(2).call(parallel_work.stage, layout, tmp_path / "killed", 5)
    again = crews(2).call(parallel_work.stage, layout, tmp_path / "killed", None)
    assert furthest(through, again) == 0.0


@pytest.mark.parametrize(
    ("first", "then", "changes"),
    [
        ("shard=2", "", {}),
        ("", "shard=2", {}),
        pytest.param("tp=2", "shard=2", {}, marks=pytest.mark.slow),
        pytest.param("shard=2", "shard=2,tp=2", {}, marks=pytest.mark.slow),
        pytest.param("pp=2,micro_batches=2", "", {}, marks=pytest.mark.slow),
        pytest.param("cp=2", "shard=2,ep=2", MIXED, marks=pytest.mark.slow),
        ("pp=2,virtual=2,micro_batches=2", "", DEEP),
        pytest.param("shard=2", "pp=2,virtual=2,micro_batches=2", DEEP, marks=pytest.mark.slow),
    ],
)
def test_any_layout_goes_on_where_another_stopped(
    first: str, then: str, changes: dict[str, Any], crews: Crews, tmp_path: Path
) -> None:
    def run(layout: str, folder: str, stop_at: int | None) -> Weights:
        crew = crews(parse_layout(layout).ranks if layout else 1)
        return crew.call(parallel_work.stage, layout, tmp_path / folder, stop_at, changes)

    through = run("", "through", None)
    with pytest.raises(Killed):
        run(first, "killed", 6)
    (tmp_path / "killed" / ".sharded.tmp").mkdir(exist_ok=True)  # a save that was cut off
    again = run(then, "killed", None)
    assert furthest(through, again) < 1e-3
    lines = [
        (tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("through", "killed")
    ]
    rows = [[json.loads(line) for line in part] for part in lines]
    assert [row["step"] for row in rows[1]] == list(range(8))
    for one, other in zip(*rows, strict=True):
        assert other["tokens"] == one["tokens"]
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    # What was left out is known afterwards, and the data of every step with it.
    skipped = [(tmp_path / folder / "skipped.json").read_bytes() for folder in ("through", "killed")]
    assert skipped[0] == skipped[1]
    guard = Guard.of(GuardConfig(), tmp_path / "killed")
    assert [guard.data_step(step) for step in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("shard=2", {}),
        ("tp=2", UNTIED),
        ("pp=2,virtual=2,micro_batches=2", DEEP),
        pytest.param("pp=2,micro_batches=2", DEEP, marks=pytest.mark.slow),
        pytest.param("shard=4,ep=2", MIXED, marks=pytest.mark.slow),
        ("shard=2,ep=2", MIXED),
    ],
)
def test_weights_do_not_depend_on_the_layout(
    layout: str, changes: dict[str, Any], crews: Crews, tmp_path: Path
) -> None:
    whole = tiny_model(**changes)
    save_model(whole, tmp_path)
    crew = crews(parse_layout(layout).ranks)
    assert (
        furthest(parallel_work.weights(whole), crew.call(parallel_work.started, layout, None, changes)) == 0.0
    )
    assert (
        furthest(parallel_work.weights(whole), crew.call(parallel_work.started, layout, tmp_path, changes))
        == 0.0
    )


def test_the_columns_of_all_ranks_are_a_row_and_cost_the_same() -> None:
    for size in (1, 2, 4):
        parts = [columns_of(rank, size, 32) for rank in range(size)]
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(32))
        # Pairs of query and key in a causal mask.
        assert len({int((part + 1).sum()) for part in parts}) == 1
    with pytest.raises(ConfigError, match="multiple of 6"):
        columns_of(0, 3, 32)


def test_layers_are_shared_out_in_order() -> None:
    assert [layers_of(part, 4, 10) for part in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("tp=3", {}, "tp 3 does not divide num_heads 4"),
        ("ep=2,shard=2", {}, "dense model"),
        ("ep=2", MIXED, "ep 2 does not divide"),
        ("shard=8,ep=8", SPARSE, "ep 8 does not divide num_experts 4"),
        ("pp=9", {}, "more than the 2 layers"),
        ("pp=2,virtual=2", {}, "pp 2 x virtual 2 is more than the 2 layers"),
        ("virtual=2", {}, "without a pipeline"),
        ("pp=2,virtual=2,micro_batches=5", {}, "equal rounds"),
        ("cp=3", {}, "multiple of 6"),
        ("pp=2,micro_batches=3", {}, "3 micro-batches"),
        ("shards=2", {}, "shard"),
        ("shard", {}, "name=number"),
        ("shard=2,fsdp=2", {}, "twice"),
        ("shard=0", {}, "at least 1"),
    ],
)
def test_what_cannot_be_cut_is_refused(layout: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_layout(layout).check(tiny_model(**changes).config, context=16, rows=8)


def test_what_cannot_be_replayed_is_refused() -> None:
    experts, dense = tiny_model(**MIXED).config, tiny_model().config
    for layout in (parse_layout("shard=2,ep=2"), parse_layout("tp=2")):
        with pytest.raises(ConfigError, match="use full or none"):
            layout.check_recompute(experts, "selective")
        layout.check_recompute(experts, "full")
        layout.check_recompute(dense, "selective")
    parse_layout("shard=2").check_recompute(experts, "selective")


@pytest.mark.parametrize(
    ("layout", "changes", "recompute"),
    [
        ("shard=2", {}, "selective"),
        pytest.param("tp=2", {}, "selective", marks=pytest.mark.slow),
        pytest.param("cp=2", {}, "full", marks=pytest.mark.slow),
        ("shard=2,ep=2", MIXED, "full"),
        pytest.param("pp=2,micro_batches=2", MIXED | DEEP, "selective", marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_nothing(
    layout: str, changes: dict[str, Any], recompute: Recompute, crews: Crews
) -> None:
    expected, _ = parallel_work.steps(World(), "", changes, 4, 2)
    found, _ = crews(2).call(parallel_work.steps, layout, changes, 4, 2, recompute)
    for one, many in zip(expected, found, strict=True):
        for name in ("loss", "gradient_norm", "balance", "z_loss", "router_z_loss"):
            if name in one:
                assert many[name] == pytest.approx(one[name], abs=1e-5), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # the compiler's own, here and below
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("layout", "changes", "recompute"),
    [
        ("shard=2", {}, "none"),
        ("cp=2", {}, "full"),
        ("shard=2,ep=2", MIXED, "full"),
        ("shard=2", MIXED, "selective"),
        ("pp=2,virtual=2,micro_batches=2", MIXED | DEEP, "none"),
    ],
)
def test_compiled_blocks_train_the_same(
    layout: str, changes: dict[str, Any], recompute: Recompute, crews: Crews
) -> None:
    expected, _ = parallel_work.steps(World(), "", changes, 4, 1)
    found, _ = crews(2).call(parallel_work.steps, layout, changes, 4, 1, recompute, True)
    for one, many in zip(expected, found, strict=True):
        for name in ("loss", "gradient_norm", "balance", "z_loss", "router_z_loss"):
            if name in one:
                assert many[name] == pytest.approx(one[name], abs=1e-5), name


def test_layouts_are_written_as_they_are_read() -> None:
    for text in ("shard=8,tp=2", "replicate=2,shard=4,ep=4", "pp=2,virtual=2,micro_batches=4", ""):
        assert str(parse_layout(text)) == text
    assert parse_layout("fsdp=2, dp=3") == Layout(dp_shard=2, dp_replicate=3)
    assert parse_layout("shard=2,cp=2,tp=3,pp=5,replicate=7").ranks == 2 * 2 * 3 * 5 * 7

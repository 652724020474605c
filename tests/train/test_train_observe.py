"""Observation: loss by groups of documents, norms layer by layer, speed and profiles: none of it changes training."""

import gzip
import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import observe_work
import pyarrow as pa
import pytest
import torch
from observe_work import batches, flat, norm
from torch.nn import functional as F

from pensar.base.errors import ConfigError
from pensar.base.files import files_under, read_jsonl
from pensar.base.metrics import Recording
from pensar.base.progress import Progress
from pensar.base.ranks import Crew, World
from pensar.data.documents import read_table, write_table
from pensar.data.order import PretrainData
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig
from pensar.model.count import flops_per_token
from pensar.model.qwen3 import Qwen3
from pensar.text.packing import Batch, collate
from pensar.text.sample import Sample
from pensar.train import checkpoint
from pensar.train.groups import Groups
from pensar.train.loop import LoopConfig, Place, fit
from pensar.train.loss import LossConfig, batch_loss, weights_of
from pensar.train.optimizer import OptimizerConfig
from pensar.train.pretrain import PretrainConfig, row_batches
from pensar.train.profiler import profiled
from pensar.train.schedule import ScheduleConfig
from pensar.train.speed import peak_flops, step_flops, table_row
from tiny import SHAPE, SPARSE, parameters_of, tiny_model, write_shards

STILL = OptimizerConfig(lr=0.0, adamw_lr=0.0)
"""The weights stay, so that every step's losses can be computed afterwards."""
MARKS = {"domain": ["web", "books", "", "code"], "language": ["eng_Latn", "por_Latn", "deu_Latn"]}
DEEP = {"num_layers": 4}


def place(folder: Path, **recording: Any) -> Place:
    folder.mkdir(exist_ok=True)
    logs = folder.with_name(folder.name + "-logs")
    return Place(folder, logs, World(), Progress(), recording=Recording(**recording))


# ---------------------------------------------------------------- loss by group


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of five to sixty tokens with marks."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(1, 299, rng.integers(5, 60)).tolist() for _ in range(50)]
    folder = write_shards(tmp_path_factory.mktemp("corpus") / "shards", documents, end=0, vocab_size=300)
    docs = read_table(folder / "docs.parquet")
    for name, labels in MARKS.items():
        column = pa.array([labels[(n * 7 + n // 3) % len(labels)] for n in range(len(documents))])
        docs = docs.set_column(docs.column_names.index(name), name, column)
    write_table(folder / "docs.parquet", docs)
    return folder


def naive_losses(model: Qwen3, data: PretrainData, num_rows: int) -> dict[str, dict[str, list[float]]]:
    """Mark -> label -> the losses of its predicted tokens, every segment of a row computed alone."""
    docs = data.shards.docs.to_pylist()
    found: dict[str, dict[str, list[float]]] = {key: defaultdict(list) for key in (*MARKS, "source", "kind")}
    for index in range(num_rows):
        row = data.row(index)
        for segment in range(1, int(row.segments.max()) + 1):
            mine = row.segments == segment
            tokens = torch.from_numpy(row.tokens[mine]).long()[None]
            hidden = model(tokens, torch.arange(tokens.shape[1])[None], Packed())
            losses = F.cross_entropy(model.logits(hidden)[0, :-1], tokens[0, 1:], reduction="none")
            for document, loss in zip(row.documents[mine][1:].tolist(), losses.tolist(), strict=True):
                for key, labels in found.items():
                    labels[docs[document][key] or "unmarked"].append(loss)
    return found


@pytest.mark.parametrize("mixture", ["general", "long"])
@pytest.mark.parametrize("untied", [False, True])
def test_the_losses_by_group_are_those_of_documents_computed_alone(
    shards: Path, mixture: str, untied: bool, tmp_path: Path
) -> None:
    data = PretrainData(shards, mixture=mixture, context=64, seed=1)
    config = PretrainConfig(tokens=256 * 5, mixture=mixture, context=64, batch_tokens=256)
    groups, model = Groups(data.shards.docs), tiny_model(tied=not untied)
    loop = LoopConfig(steps=5, optimizer=STILL, losses_every=5, loss=LossConfig(chunk_tokens=50))
    fit(model, row_batches(data, config, groups), loop, place(tmp_path / "out"), name="x", groups=groups)
    (row,) = read_jsonl(tmp_path / "out" / "losses.jsonl", dict)
    with torch.no_grad():
        naive = naive_losses(model, data, 20)
    assert (row["step"], row["steps"]) == (4, 5)
    assert set(row) == {"step", "steps", "domain", "language", "source", "kind"}
    assert set(row["domain"]) == {"web", "books", "code", "unmarked"}
    for key, labels in naive.items():
        assert {label: entry["tokens"] for label, entry in row[key].items()} == {
            label: len(losses) for label, losses in labels.items()
        }
        for label, losses in labels.items():
            assert row[key][label]["loss"] == pytest.approx(sum(losses) / len(losses), abs=2e-5)
    steps = list(read_jsonl(tmp_path / "out" / "metrics.jsonl", dict))
    every = [loss for losses in naive["kind"].values() for loss in losses]
    assert np.mean([step["loss"] for step in steps]) == pytest.approx(np.mean(every), abs=0.05)


def test_rows_come_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    losses, layers = observe_work.observed(World(), "", {}, tmp_path / "run", {})
    assert [(row["step"], row["steps"]) for row in losses] == [(3, 4), (5, 2)]
    assert [row["step"] for row in layers] == [0, 3]
    losses, layers = observe_work.observed(
        World(), "", {}, tmp_path / "other", {"losses_every": 0, "observe_every": 0}
    )
    assert [row["steps"] for row in losses] == [1] * 6
    assert layers == []


def test_batches_without_groups_leave_no_record(tmp_path: Path) -> None:
    plain = collate([[Sample(tokens=np.arange(9, dtype=np.int32), ce=np.ones(9, np.float32))]], length=9)
    fit(tiny_model(), lambda _: [plain], LoopConfig(steps=2), place(tmp_path / "run"), name="plain")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("", {}),
        ("", SPARSE),
        ("shard=2", {}),
        ("tp=2", {"tied": False}),
        ("cp=2", {}),
        ("pp=2,micro_batches=2", DEEP),
        ("shard=2,ep=2", SPARSE),
    ],
)
def test_two_ranks_observe_what_one_does(
    pair: Crew, layout: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    alone = Crew().call(observe_work.observed, "", changes, tmp_path / "alone", {})
    together = pair.call(observe_work.observed, layout, changes, tmp_path / "together", {})
    for one, two in zip(alone, together, strict=True):
        assert len(one) == len(two)
        for mine, theirs in zip(one, two, strict=True):
            expected, found = flat(mine), flat(theirs)
            if "pp" in layout:
                expected = {k: v for k, v in expected.items() if "stream" not in k and "logit" not in k}
            if "cp" in layout:
                expected = {k: v for k, v in expected.items() if "logit" not in k}
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, abs=2e-4, rel=2e-3)


# ---------------------------------------------------------------- layers


def kind_of(name: str) -> tuple[str, int]:
    """By hand, what the product reads from names."""
    if ".layers." not in name:
        return {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm"}[name], -1
    layer = int(name.split(".")[2])
    if name.endswith("norm.weight"):
        return "norm", layer
    if "self_attn" in name:
        return "attention", layer
    return ("router" if "mlp.gate.weight" in name else "mlp"), layer


@pytest.mark.parametrize("changes", [{}, SPARSE], ids=["dense", "sparse"])
def test_norms_are_those_of_each_kind_and_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    twin = tiny_model(**changes)
    parts = batches(0, micro_batches=1)
    from pensar.train.step import Replicated

    balance = None
    if changes:
        balance = Replicated(World()).balance(twin, parts[0].num_tokens, [*parts], LossConfig())
    loss, _ = batch_loss(twin, parts[0], weights_of(parts, World()), LossConfig(), balance=balance)
    loss.backward()
    before = dict(twin.named_parameters())
    config = LoopConfig(steps=1, observe_every=1, optimizer=OptimizerConfig(weight_decay=0.1))
    fit(model, lambda _: parts, config, place(tmp_path / "run"), name="norms")
    (row,) = read_jsonl(tmp_path / "run" / "layers.jsonl", dict)
    after = dict(model.named_parameters())
    by_kind: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name in before:
        by_kind[kind_of(name)].append(name)
    assert set(row["gradient_norm"]) == {kind for kind, _ in by_kind}
    for (kind, layer), names in by_kind.items():
        pick = (lambda values, at=layer: values) if layer < 0 else (lambda values, at=layer: values[at])
        weight = norm([before[name] for name in names])
        assert pick(row["weight_norm"][kind]) == pytest.approx(weight, rel=1e-5)
        gradients = [before[name].grad for name in names]
        assert pick(row["gradient_norm"][kind]) == pytest.approx(norm(gradients), rel=1e-4)  # type: ignore[arg-type]
        change = norm([after[name].detach() - before[name].detach() for name in names])
        assert pick(row["update_ratio"][kind]) == pytest.approx(change / weight, rel=1e-3)
    total = math.sqrt(sum(value**2 for value in flat(row["gradient_norm"]).values()))
    (metrics,) = read_jsonl(tmp_path / "run" / "metrics.jsonl", dict)
    assert total == pytest.approx(metrics["gradient_norm"], rel=1e-5)


class Noting:
    """Attention written out, which keeps the scores of what a query sees."""

    def __init__(self, segments: torch.Tensor) -> None:
        self.segments, self.scores = segments, {}

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        best = -math.inf
        for b in range(q.shape[0]):
            for head in range(q.shape[2]):
                scores = q[b, :, head] @ k[b, :, head // (q.shape[2] // k.shape[2])].T / q.shape[-1] ** 0.5
                for t in range(q.shape[1]):
                    for s in range(t + 1):
                        if self.segments[b, t] == self.segments[b, s] != 0:
                            best = max(best, float(scores[t, s]))
        self.scores[layer] = best
        return Packed(self.segments)(layer, q, k, v)


def padded(micro_batches: int) -> list[Batch]:
    """Rows of one sample each with padding behind."""
    rng = np.random.default_rng(8)
    rows = []
    for _ in range(2 * micro_batches):
        size = int(rng.integers(5, 12))
        rows.append(
            [Sample(tokens=rng.integers(0, 300, size).astype(np.int32), ce=np.ones(size, np.float32))]
        )
    whole = collate(rows, length=12)
    return [whole.rows(slice(2 * part, 2 * part + 2)) for part in range(micro_batches)]


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_stream_and_scores_are_those_of_real_tokens(recompute: str, tmp_path: Path) -> None:
    parts = padded(2)
    model = tiny_model()
    with torch.no_grad():
        squares, tokens, scores = torch.zeros(3, dtype=torch.float64), 0, [-math.inf] * 2
        for batch in parts:
            segments = torch.from_numpy(batch.segments).long()
            attend = Noting(segments)
            ids, positions = (torch.from_numpy(x).long() for x in (batch.tokens, batch.positions))
            x = model.model.embed_tokens(ids)
            streams = [x]
            for block in model.model.layers:
                x = block(x, *model.rope_tables(positions), attend)
                streams.append(x)
            for n, stream in enumerate(streams):
                squares[n] += stream[segments != 0].double().square().mean(-1).sum()
            tokens += int((segments != 0).sum())
            scores = [max(scores[n], attend.scores[n]) for n in range(2)]
    config = LoopConfig(steps=1, observe_every=1, recompute=recompute)  # type: ignore[arg-type]
    fit(model, lambda _: parts, config, place(tmp_path / "run"), name="stream")
    (row,) = read_jsonl(tmp_path / "run" / "layers.jsonl", dict)
    assert row["stream_rms"] == pytest.approx((squares / tokens).sqrt().tolist(), rel=1e-5)
    if recompute == "selective":
        assert "attention_logit" not in row
    else:
        assert row["attention_logit"] == pytest.approx(scores, rel=1e-4)


def test_looking_changes_nothing(tmp_path: Path) -> None:
    weights, files = [], []
    for number, observe_every in enumerate((0, 1)):
        model = tiny_model()
        config = LoopConfig(steps=4, observe_every=observe_every)
        work = place(tmp_path / str(number), profile=(1, 2) if number else (0, 0))
        fit(model, batches, config, work, name="looking", groups=Groups(observe_work.DOCUMENTS))
        weights.append(parameters_of(model))
        files.append((tmp_path / str(number) / "metrics.jsonl").read_bytes())
    assert torch.equal(*weights)
    assert files[0] == files[1]


def test_a_stage_that_makes_its_own_data_refuses_to_look_at_layers(tmp_path: Path) -> None:
    from pensar.train.loop import loop
    from pensar.train.optimizer import Optimizer

    model = tiny_model()
    config = LoopConfig(steps=2, observe_every=1)
    with pytest.raises(ConfigError, match="observe_every is set, and this stage does not look at layers"):
        loop(model, Optimizer(model, STILL), config, place(tmp_path / "x"), lambda _: {}, name="x", shown=())


class Killed(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("killed_at", [1, 5])
def test_a_killed_run_observes_to_the_very_same_bytes(tmp_path: Path, killed_at: int) -> None:
    groups = Groups(observe_work.DOCUMENTS)
    config = LoopConfig(steps=7, checkpoint_every=2, losses_every=3, observe_every=2)

    def until(step: int) -> list[Batch]:
        if step == killed_at and not going_on:
            raise Killed
        return batches(step)

    going_on = True
    fit(tiny_model(), until, config, place(tmp_path / "whole"), name="whole", groups=groups)
    going_on = False
    with pytest.raises(Killed):
        fit(tiny_model(), until, config, place(tmp_path / "cut"), name="cut", groups=groups)
    going_on = True
    fit(tiny_model(), until, config, place(tmp_path / "cut"), name="cut", groups=groups)
    for folder in ("whole", "cut"):
        checkpoint.discard(tmp_path / folder, World())
    whole, cut = (
        {name: path.read_bytes() for name, path in files_under(tmp_path / folder).items()}
        for folder in ("whole", "cut")
    )
    assert whole == cut
    assert set(whole) == {"metrics.jsonl", "losses.jsonl", "layers.jsonl"}


# ---------------------------------------------------------------- speed and profiles


def test_the_operations_of_a_step_follow_its_documents() -> None:
    config = ModelConfig(**SHAPE)

    def batch(segments: list[list[int]]) -> Batch:
        values = np.array(segments, np.int32)
        return Batch(tokens=values, positions=values, segments=values)

    whole = batch([[1] * 8, [1] * 8])
    assert step_flops(config, [whole]) == pytest.approx(16 * flops_per_token(config, 8))
    mixed = batch([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    expected = sum(size * flops_per_token(config, size) for size in (3, 2, 6))
    assert step_flops(config, [mixed]) == pytest.approx(expected)
    assert step_flops(config, [whole, mixed]) == pytest.approx(16 * flops_per_token(config, 8) + expected)
    assert step_flops(config, [batch([[0, 0]])]) == 0


def test_peaks_are_probed_on_processors_and_looked_up_for_gpus() -> None:
    flops, source = peak_flops("float32", torch.device("cpu"))
    assert 1e9 < flops < 1e14
    assert source.startswith("probe")
    assert table_row("NVIDIA H100 80GB HBM3") == "h100"
    assert table_row("NVIDIA A100-SXM4-80GB") == "a100-80g"
    assert table_row("NVIDIA GeForce RTX 4090") == "rtx4090"
    assert table_row("Radeon VII") is None


def test_times_tell_rates_and_utilisation(tmp_path: Path) -> None:
    model = tiny_model()
    fit(model, batches, LoopConfig(steps=3), place(tmp_path / "run"), name="times")
    about = json.loads((tmp_path / "run-logs" / "training.json").read_bytes())
    assert (about["name"], about["steps"]) == ("times", 3)
    rows = list(read_jsonl(tmp_path / "run-logs" / "timings.jsonl", dict))
    assert len(rows) == 3
    for step, row in enumerate(rows):
        flops = step_flops(model.config, batches(step))
        assert row["flops_per_second"] == pytest.approx(flops / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / about["peak_flops_per_second"])
        assert 0 < row["mfu"] < 1


@pytest.mark.parametrize(("wanted", "named"), [((1, 2), "steps-1-2"), ((2, 9), "steps-2-3")])
def test_a_profile_is_written_of_the_steps_asked_for(
    wanted: tuple[int, int], named: str, tmp_path: Path
) -> None:
    work = place(tmp_path / "run", profile=wanted)
    fit(tiny_model(), batches, LoopConfig(steps=4), work, name="profiled")
    folder = work.logs / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{named}.rank-0.json.gz",
        f"{named}.rank-0.txt",
    ]
    with gzip.open(folder / f"{named}.rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    first, last = (int(number) for number in named.split("-")[1:])
    assert {f"step {n}" for n in range(4) if f"step {n}" in names} == {
        f"step {n}" for n in range(first, last + 1)
    }
    assert "aten::mm" in names
    assert "aten::mm" in (folder / f"{named}.rank-0.txt").read_text()


def test_a_failure_in_the_window_leaves_the_profile_of_what_came_before(tmp_path: Path) -> None:
    """A guard that rewinds ends the window with an exception, and the steps do not come again as they were."""

    def take(step: int) -> dict[str, float]:
        torch.ones(2, 2) @ torch.ones(2, 2)
        if step == 2:
            raise ZeroDivisionError
        return {}

    watched = profiled(take, 4, (1, 2), tmp_path, 0)
    watched(1)
    with pytest.raises(ZeroDivisionError):
        watched(2)
    with gzip.open(tmp_path / "profile" / "steps-1-2.rank-0.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 1", "step 2", "aten::mm"} <= names


def test_a_profile_beyond_the_end_or_of_no_steps_is_none(tmp_path: Path) -> None:
    for number, wanted in enumerate(((0, 0), (7, 2))):
        work = place(tmp_path / str(number), profile=wanted)
        fit(tiny_model(), batches, LoopConfig(steps=2), work, name="none")
        assert not (work.logs / "profile").exists()


def test_training_does_not_load_what_it_does_not_show() -> None:
    code = (
        "import sys; import pensar.train.loop\n"
        "assert not {'wandb', 'mlflow', 'trackio', 'tensorboardX'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(("muon", "rate"), [(True, 0.02), (False, 0.003)])
def test_the_rate_shown_is_that_of_the_optimiser_at_work(muon: bool, rate: float, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(muon=muon, lr=0.02, adamw_lr=0.003)
    config = LoopConfig(steps=1, optimizer=optimizer, schedule=ScheduleConfig(kind="constant"))
    work = place(tmp_path / "run")
    fit(tiny_model(), batches, config, work, name="rates")
    assert [row["lr"] for row in read_jsonl(work.out / "metrics.jsonl", dict)] == [rate]

"""The planner: its numbers against published ones, hand arithmetic and the bytes that real training steps hold."""

import subprocess
import sys
import weakref
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pensar.base.errors import ConfigError
from pensar.base.ranks import World
from pensar.model.config import ModelConfig, replace
from pensar.model.count import flops_per_token, parameters
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.sizes import SIZES, size
from pensar.text.packing import Batch
from pensar.train.accelerators import ACCELERATORS, accelerator
from pensar.train.footprint import Step, kept_bytes, memory, moments, rank_parameters, share
from pensar.train.layout import Layout
from pensar.train.loss import LossConfig
from pensar.train.optimizer import Optimizer, OptimizerConfig
from pensar.train.planner import Cluster, Cost, cost, layouts, plan
from pensar.train.recompute import recomputed
from pensar.train.step import train_step
from pensar.train.traffic import Group, traffic

GIB = 2**30
PUBLISHED = {
    "0.6b": (596_049_920, 440_467_456, 596_049_920, 4.99, 14.85),
    "1.7b": (1_720_574_976, 1_409_410_048, 1_720_574_976, 11.73, 21.60),
    "4b": (4_022_468_096, 3_633_511_936, 4_022_468_096, 27.76, 53.13),
    "8b": (8_190_735_360, 6_946_075_648, 8_190_735_360, 49.03, 74.40),
    "14b": (14_768_307_200, 13_212_482_560, 14_768_307_200, 88.98, 124.2),
    "32b": (32_762_123_264, 31_206_298_624, 32_762_123_264, 204.8, 295.0),
    "30b-a3b": (30_532_122_624, 29_909_792_768, 3_353_032_704, 23.08, 56.91),
    "235b-a22b": (235_093_634_560, 233_848_974_848, 22_190_763_520, 148.3, 280.8),
}
"""Total, without embeddings, active; GFLOP a token in training at 4,096 and 32,768 tokens of context."""
TINY = ModelConfig(
    vocab_size=2048, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=384,
    tied=True,
)  # fmt: skip
MODELS = {
    "dense": TINY,
    "experts": replace(
        TINY, intermediate_size=0, num_experts=8, experts_per_token=2, moe_intermediate_size=128
    ),
    "large vocabulary": replace(TINY, tied=False, vocab_size=8192),
    "small vocabulary": replace(TINY, tied=False, vocab_size=256, num_layers=8),
}


def cluster(gpus: int, gpu: str = "h100", **rest: Any) -> Cluster:
    return Cluster(**{"gpus": gpus, "accelerator": accelerator(gpu), "tokens": 1e12} | rest)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_counts_parameters_and_operations_as_published(name: str) -> None:
    total, non_embedding, active, short, long = PUBLISHED[name]
    assert parameters(size(name))[:3] == (total, non_embedding, active)
    assert flops_per_token(size(name), 4096) / 1e9 == pytest.approx(short, rel=1e-3)
    assert flops_per_token(size(name), 32_768) / 1e9 == pytest.approx(long, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_the_parts_of_a_rank_are_the_whole_model(name: str) -> None:
    model = size(name)
    part = share(model, Layout())
    assert part.layers * (part.block + part.experts) + part.ends == parameters(model).total
    assert rank_parameters(model, Layout()) == parameters(model).total


class Held(TorchDispatchMode):
    """Bytes of all tensors alive, and their most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.storages.pop(key)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def peak_bytes(model: ModelConfig, layout: Layout, step: Step) -> int:
    """Of the second of two real training steps on one rank."""
    module = Qwen3(model).train()
    initialize(module, 1)
    shape = (step.rows, step.context)
    rng = np.random.default_rng(1)
    batches = [
        Batch(
            tokens=rng.integers(0, model.vocab_size, shape).astype(np.int32),
            positions=np.tile(np.arange(step.context, dtype=np.int32), (step.rows, 1)),
            segments=np.ones(shape, np.int32),
            ce=np.ones(shape, np.float32),
        )
        for _ in range(step.accumulate)
    ]
    with Held() as held, recomputed(module, layout.recompute):
        for parameter in module.parameters():
            held.see(parameter)
        optimizer = Optimizer(module, OptimizerConfig(muon=step.muon))
        for _ in range(2):
            held.peak = held.now
            train_step(module, optimizer, batches, 1.0, World(), LossConfig(chunk_tokens=step.chunk_tokens))
    return held.peak


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_planned_memory_is_within_a_tenth_of_what_real_steps_hold(name: str, recompute: Any) -> None:
    layout = Layout(recompute=recompute)
    for step in (
        Step(context=256, rows=4, chunk_tokens=8192, compute_bytes=4, on_cpu=True, muon=True),
        Step(context=128, rows=8, accumulate=2, chunk_tokens=256, compute_bytes=4, on_cpu=True),
        Step(context=64, chunk_tokens=8192, compute_bytes=4, on_cpu=True, muon=True),
    ):
        predicted = memory(MODELS[name], layout, step)
        assert predicted.total == pytest.approx(peak_bytes(MODELS[name], layout, step), rel=0.1), step


def test_the_memory_of_a_dense_model_is_that_of_hand_arithmetic() -> None:
    step = Step(context=4096, rows=2)
    found = moments(size("8b"), Layout(dp_shard=8, recompute="full"), step)
    tokens = 2 * 4096
    layer = 4096 * 128 * (32 + 8) * 2 + 3 * 4096 * 12_288 + 2 * 4096 + 2 * 128
    ends = 2 * 151_936 * 4096 + 4096
    assert 36 * layer + ends == 8_190_735_360
    shard = 4 * 8_190_735_360 / 8
    at_loss = found["loss"]
    assert at_loss["weights"] == shard
    assert at_loss["optimizer"] == 2 * shard
    assert at_loss["gathered"] == 2 * ends
    assert at_loss["gradients"] == 2 * 151_936 * 4096, "of the output projection, not yet summed over ranks"
    # Inputs of the blocks, token ids with positions and segments, cosine and sine, the last norm and its states.
    assert at_loss["activations"] == tokens * (36 * 2 * 4096 + 24 + 2 * 2 * 128 + 12 * 4096)
    # In bfloat16, in float32, and the probabilities, which become the gradient.
    assert at_loss["logits"] == (2 + 4 + 4) * 2048 * 151_936
    at_end = found["end of backward"]
    assert at_end["gradients"] == shard + 2 * ends
    assert at_end["buffers"] == 4 * ends
    # Two blocks gathered; gradients of the one after in float32 on their way to the shards.
    assert found["backward"]["gathered"] == 2 * ends + 2 * 2 * layer
    assert found["backward"]["buffers"] == 4 * layer


def test_the_memory_of_a_mixture_of_experts_is_that_of_hand_arithmetic() -> None:
    model, step = size("30b-a3b"), Step(context=4096)
    layout = Layout(dp_shard=16, ep=8, recompute="selective")
    D, heads, width, k, E = 2048, 32 + 4, 768, 8, 128
    dense = 2 * D * 128 * heads + D * E + 2 * D + 2 * 128
    experts = 16 * 3 * D * width
    ends = 2 * 151_936 * D + D
    stored = (48 * dense + ends) / 16 + 48 * experts / 2
    assert rank_parameters(model, layout) == stored
    kept = (
        2 * (2 * D + 2 * heads * 128) + 4 * 32
    )  # input, output projection, q k v and attention, its log-sum
    kept += 2 * k * (D + 2 * width) + 8 * k + 8 * E + 4  # products of the experts, routing
    kept += 2 * 2 * k * D  # what came over the network, there and back
    assert kept_bytes(model, layout, step, "selective") == 4096 * kept
    found = moments(model, layout, step)["backward"]
    assert found["gathered"] == 2 * ends + 2 * 2 * (dense + experts)
    assert found["weights"] == 4 * stored
    assert found["optimizer"] == 8 * stored


def test_muon_keeps_one_momentum_for_the_matrices_of_the_blocks() -> None:
    model, step = size("0.6b"), Step(context=1024, muon=True)
    found = moments(model, Layout(dp_shard=4), step)["update"]
    matrices = 28 * (2 * 1024 * 128 * 24 + 3 * 1024 * 3072)
    assert found["optimizer"] == 4 * (2 * 596_049_920 - matrices) / 4


def test_the_235b_on_1024_ranks_is_as_its_simulation_found() -> None:
    """Simulated by another program, with fake ranks and real FSDP2: 229.6M parameters and 3.4 GiB a rank, 0.03 GiB a
    layer with full recomputation and 1.9 without, gathers 42 GiB, scatters 44 GiB, exchanges 141 GiB, 94 where their
    results are kept.
    """
    model, step = size("235b-a22b"), Step(context=4096)
    layout = Layout(dp_shard=1024, ep=64, recompute="full")
    assert rank_parameters(model, layout) / 1e6 == pytest.approx(229.6, abs=0.1)
    assert 16 * rank_parameters(model, layout) / GIB == pytest.approx(3.4, abs=0.05)
    assert kept_bytes(model, layout, step, "full") / GIB == pytest.approx(0.03, abs=0.005)
    assert kept_bytes(model, layout, step, "none") / GIB == pytest.approx(1.9, rel=0.06)
    moved = {one.name: one.num_bytes / GIB for one in traffic(model, layout, step, accelerator("h100"))}
    assert moved["all-gather of weights"] == pytest.approx(42, rel=0.05)
    assert moved["reduce-scatter of gradients"] == pytest.approx(44, rel=0.05)
    assert moved["all-to-all of tokens"] == pytest.approx(141, rel=0.01)
    keeping = Layout(dp_shard=1024, ep=64, recompute="selective")
    moved = {one.name: one.num_bytes / GIB for one in traffic(model, keeping, step, accelerator("h100"))}
    assert moved["all-to-all of tokens"] == pytest.approx(94, rel=0.01)


def test_a_plan_for_235b_on_1024_h100_is_sane() -> None:
    model, where = size("235b-a22b"), cluster(1024)
    best = plan(model, where)[0]
    spent = cost(model, where, best)
    assert best.layout.ep > 1
    assert best.memory.total < 0.92 * 79 * GIB
    assert 0.08 < spent.mfu < 0.28
    assert 5 < spent.days < 30
    assert spent.flops == pytest.approx(148.3e21, rel=1e-3)


def test_few_whole_experts_a_rank_are_not_cut_without_expert_ranks() -> None:
    """The first rank of 1,024 holds one of 128 experts whole; with 64 expert ranks it holds slices."""
    model = size("235b-a22b")
    expert = 3 * 4096 * 1536
    plain, spread = (rank_parameters(model, Layout(dp_shard=1024, ep=ep)) for ep in (1, 64))
    assert plain - spread == pytest.approx(94 * (expert - 128 * expert / 1024))


@pytest.mark.parametrize(
    ("name", "gpus", "gpu"), [("8b", 24, "h100"), ("32b", 64, "mi300x"), ("30b-a3b", 64, "h200")]
)
def test_every_proposed_layout_is_legal_and_fits(name: str, gpus: int, gpu: str) -> None:
    model, where = size(name), cluster(gpus, gpu)
    found = plan(model, where)
    assert len(found) > 5
    for one in found:
        assert one.layout.ranks == gpus
        one.layout.check(model, where.context, where.rows)
        assert one.memory == memory(model, one.layout, one.step, where.overhead_bytes)
        assert one.memory.total <= 0.92 * where.accelerator.memory_bytes
        passes = one.step.accumulate * (one.layout.micro_batches if one.layout.pp > 1 else 1)
        assert one.layout.data * one.step.rows * passes >= where.rows
    assert found[0].seconds <= 1.05 * min(one.seconds for one in found)


def test_more_gpus_never_need_more_memory_of_each() -> None:
    for name, counts in (("8b", (2, 4, 8, 16, 64)), ("30b-a3b", (2, 8, 32, 128, 512))):
        needs = [memory(size(name), Layout(dp_shard=n), Step(context=4096)).total for n in counts]
        assert needs == sorted(needs, reverse=True)
    least = []
    for gpus in (16, 32, 64, 128):
        where = cluster(gpus)
        forms = layouts(size("32b"), where)
        least.append(min(memory(size("32b"), one, Step(context=4096)).total for one in forms))
    assert least == sorted(least, reverse=True)


def test_tensor_and_pipeline_ranks_divide_what_they_split() -> None:
    model, step = size("8b"), Step(context=4096)
    quarter = share(model, Layout(tp=4))
    norms = 2 * 4096 + 2 * 128
    assert 4 * (quarter.block - norms) == share(model, Layout()).block - norms
    stages = [share(model, Layout(pp=8), stage) for stage in range(8)]
    assert sum(stage.layers * stage.block + stage.ends for stage in stages) == parameters(model).total
    assert [stage.layers for stage in stages] == [5, 5, 5, 5, 4, 4, 4, 4]
    whole, split = (kept_bytes(model, Layout(tp=tp), step, "full") for tp in (1, 4))
    assert split == whole / 4
    early, late = (
        moments(model, Layout(pp=4, micro_batches=8), step, stage)["backward"]["activations"]
        for stage in (0, 3)
    )
    assert 3 * late < early < 4.2 * late, "the first part has four micro-batches in flight, the last one"


def test_collectives_take_the_time_of_their_narrowest_link() -> None:
    gpu = msgspec.structs.replace(
        ACCELERATORS["h100"], link_bytes_per_second=100e9, network_bytes_per_second=10e9
    )
    assert Group.of(8, 1, 8) == (8, 8)
    assert Group.of(16, 1, 8) == (16, 8)
    assert Group.of(16, 8, 8) == (16, 1)
    assert Group.of(8, 1, 8).ring(8e9, gpu) == pytest.approx(7 / 100 / 0.8)
    assert Group.of(16, 1, 8).ring(16e9, gpu) == pytest.approx(15 / 80 / 0.8)
    assert Group.of(16, 8, 8).ring(16e9, gpu) == pytest.approx(15 / 10 / 0.8)
    assert Group.of(16, 1, 8).exchange(16e9, gpu) == pytest.approx(8 / 10 / 0.8)
    assert Group.of(1, 1, 8).ring(8e9, gpu) == 0


def test_days_energy_and_cost_follow_from_the_step() -> None:
    model, where = size("1.7b"), cluster(1, tokens=1e9, batch_tokens=1 << 16, mfu=0.5, dollars_per_hour=2.0)
    best = plan(model, where)[0]
    spent = cost(model, where, best)
    seconds = 11.73e9 * 1e9 / (0.5 * 989e12)
    assert best.layout.ranks == 1
    repeated = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[best.layout.recompute]
    hours = repeated * seconds / 3600
    expected = Cost(
        flops=11.73e18,
        steps=1e9 / 65_536,
        days=hours / 24,
        tokens_per_second=1e9 / hours / 3600,
        mfu=0.5 / repeated,
        kwh=hours * 0.7 * 1.4 * 1.2,
        gpu_hours=hours,
        dollars=2 * hours,
    )
    assert list(spent) == pytest.approx(list(expected), rel=1e-3)


def test_a_pipeline_waits_for_its_other_parts() -> None:
    model, where = size("8b"), cluster(64, batch_tokens=1 << 20)
    deep = next(one for one in plan(model, where) if one.layout.pp == 4)
    share_waiting = deep.bubble_seconds / (deep.compute_seconds + deep.exchange_seconds)
    assert share_waiting == pytest.approx(3 / deep.layout.micro_batches)


def test_a_model_that_does_not_fit_names_the_fewest_gpus_that_do() -> None:
    with pytest.raises(ConfigError, match=r"8 GPUs of 79 GiB: .* 64 GPUs are the fewest that would do"):
        plan(size("235b-a22b"), cluster(8))
    assert plan(size("235b-a22b"), cluster(64))
    with pytest.raises(ConfigError, match="are the fewest"):
        plan(size("235b-a22b"), cluster(56))
    with pytest.raises(ConfigError, match="more GPUs do not help"):
        plan(size("235b-a22b"), cluster(8, "rtx4090", context=1 << 20))
    with pytest.raises(
        ConfigError, match=r"1024 rows a step .* too few for 65537 GPUs; raise batch_tokens to"
    ):
        plan(size("30b-a3b"), cluster(65_537))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"tokens": -1.0}, "tokens is -1.0"),
        ({"batch_tokens": 100}, "less than one row of 4096"),
        ({"mfu": 40.0}, "share of the peak"),
        ({"margin": 1.0}, "share of the memory"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cluster(**{"gpus": 8} | wrong)


def test_an_unknown_gpu_is_answered_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"did you mean `h100`.*valid: a100-80g, b200, h100, h200"):
        accelerator("h1000")
    with pytest.raises(ConfigError, match="valid: a100-80g, b200, h100, h200"):
        accelerator("abacus")


def test_planning_needs_no_torch() -> None:
    code = "import sys, pensar.train.planner; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

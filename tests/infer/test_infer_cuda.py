"""The runner for GPUs on a CPU, by its kernels' twins: weights, buckets, padding, recordings, slabs, adapters."""

import copy
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, RunError
from pensar.infer import llm, runners
from pensar.infer.adapters import read_adapter
from pensar.infer.cuda import cache, graphs, twins
from pensar.infer.cuda import runner as cuda_runner
from pensar.infer.cuda.graphs import BUCKETS, bucket_of, fits, rerun
from pensar.infer.cuda.runner import CudaRunner, unfit
from pensar.infer.cuda.weights import fuse
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.llm import LLM
from pensar.infer.runners import runner_for
from pensar.infer.speculate import speculation
from pensar.infer.step import PAGE
from pensar.infer.torch_runner import TorchRunner
from pensar.model import hardware
from pensar.model.adapter import save_adapter
from pensar.model.lora import LoraConfig, adapt, adapted_weights
from pensar.model.moe import SparseMLP
from pensar.model.qwen3 import RMSNorm
from pensar.model.weights import load_model, save_model
from tests.infer.native_work import (
    MIXTURE,
    SHAPES,
    batch_of,
    build,
    pages_for,
    reference,
    text,
    with_adapters,
)

every_shape = pytest.mark.parametrize("shape", SHAPES)


class Recorder:
    """Records as `rerun` does, and counts recordings and runs."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function):
        self.recorded += 1
        outputs, replay = rerun(function)

        def counted():
            self.replayed += 1
            replay()

        return outputs, counted


def runner_of(model, **options):
    return CudaRunner(model, kernels=twins, **options)


def both(changes, **options):
    """Our runner and torch's over equal models."""
    runners = runner_of(build(**changes), **options), TorchRunner(build(**changes))
    for runner in runners:
        runner.reserve(130)
    return runners


def plain_logits(model, batch):
    runner = TorchRunner(model)
    runner.reserve(8)
    return runner.run(batch).logits_SV


def assert_equal_steps(ours, theirs, batch, most=5e-6):
    found, expected = ours.run(batch), theirs.run(batch)
    for mine, other in zip(
        (found.logits_SV, found.hidden_SD), (expected.logits_SV, expected.hidden_SD), strict=True
    ):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= most * other.abs().max()
    assert found.logits_SV.dtype == torch.float32
    return found


@every_shape
@pytest.mark.parametrize("capture", [None, rerun], ids=["launched", "recorded"])
def test_chunks_single_tokens_and_guesses_score_as_the_plain_model(shape, capture):
    ours, theirs = both(SHAPES[shape], capture=capture)
    one, two = text(60, 1), text(40, 2)
    pages_one, pages_two = pages_for(60), pages_for(40, 100)
    for rows, wanted in (
        ([(one[:30], 0, pages_one)], [29]),  # a chunk
        (
            [(one[30:50], 30, pages_one), (two[:9], 0, pages_two)],
            None,
        ),  # the next one beside another row's first
        ([(one[50:51], 50, pages_one), (two[9:30], 9, pages_two)], [0, 21]),  # a token beside a chunk
        ([(one[51:52], 51, pages_one), (two[30:31], 30, pages_two)], None),
        ([(one[52:57], 52, pages_one), (two[31:32], 31, pages_two)], None),  # guesses
        ([(one[57:58], 57, pages_one)], None),
    ):
        assert_equal_steps(ours, theirs, batch_of(rows, wanted))


def test_scores_are_the_models_in_float64_up_to_rounding():
    tokens = text(40)
    ours = runner_of(build())
    found = ours.run(batch_of([(tokens, 0, pages_for(40))])).logits_SV.double()
    expected = reference(build(dtype=torch.float64), tokens)
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_norms_rotations_gates_and_experts_of_the_twins_are_the_models_own():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        norm = RMSNorm(24, 1e-6).to(dtype)
        norm.weight.data.normal_(generator=generator)
        x = torch.randn(5, 24, generator=generator).to(dtype)
        torch.testing.assert_close(twins.rms_norm(x, norm.weight, 1e-6), norm(x))
    model = build(**MIXTURE)
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp, SparseMLP)
    x = torch.randn(7, 48, generator=generator)
    chosen = (x @ mlp.gate.weight.T).topk(1).indices[:, 0]
    order = chosen.argsort()
    counts = torch.bincount(chosen, minlength=8)
    inner = twins.grouped_product(x, order, counts, mlp.experts.gate_up_proj, gated=True)
    found = twins.grouped_product(inner, None, counts, mlp.experts.down_proj)
    torch.testing.assert_close(found, mlp.experts(x[order], counts))


def test_a_bucket_is_the_smallest_with_room():
    assert [bucket_of(num) for num in (1, 2, 3, 5, 9, 16, 17, 33, 200, 256)] == [
        1, 2, 4, 8, 16, 16, 32, 48, 256, 256,
    ]  # fmt: skip
    assert list(BUCKETS) == sorted(set(BUCKETS))
    row = ([1], 3, [1])
    assert fits(batch_of([row] * BUCKETS[-1]))
    assert not fits(batch_of([row] * (BUCKETS[-1] + 1)))
    assert fits(batch_of([([1] * graphs.FEW, 0, [1])]))
    assert not fits(batch_of([([1] * (graphs.FEW + 1), 0, [1]), row]))


def test_padding_neither_writes_nor_changes_what_real_rows_get():
    """Three rows in a bucket of four, with NaN in every page that is not theirs."""
    model = build()
    ours, theirs = runner_of(model, capture=rerun), TorchRunner(build())
    rows = [(text(1, row), 0, [2 + row]) for row in range(3)]
    for runner in (ours, theirs):
        runner.reserve(8)
    for number in (0, 1, 5, 6, 7):
        ours.cache._page(number)[:] = torch.nan
    assert_equal_steps(ours, theirs, batch_of(rows))
    for number in (0, 1, 5, 6, 7):
        assert ours.cache._page(number).isnan().all()
    assert all(ours.cache._page(number)[:, :, :, 1:].eq(0).all() for number in (2, 3, 4))
    assert all(ours.cache._page(number)[:, :, :, 0].ne(0).any() for number in (2, 3, 4))


def test_a_smaller_batch_after_a_larger_one_in_the_same_bucket_forgets_its_rows():
    ours, theirs = both({}, capture=rerun)
    rows = [(text(1, row), 0, [2 + row]) for row in range(4)]
    assert_equal_steps(ours, theirs, batch_of(rows))
    held = ours.cache._page(5).clone()
    assert_equal_steps(ours, theirs, batch_of([(text(1, 9), 1, [2 + row]) for row in range(3)]))
    assert torch.equal(ours.cache._page(5), held)


def test_a_recording_serves_all_batches_of_its_bucket_and_others_are_launched():
    recorder = Recorder()
    runner = runner_of(build(), capture=recorder)
    for num in (3, 4, 3):
        runner.run(batch_of([([7], 0, [1 + row]) for row in range(num)]))
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    runner.run(batch_of([([7], 0, [1])]))
    assert (recorder.recorded, recorder.replayed) == (2, 4)
    runner.run(batch_of([(text(30), 0, [1, 2])]))
    assert recorder.replayed == 4
    runner.warm_up(5)  # 8, 4, 2 and 1, of which two are there
    assert recorder.recorded == 4


def test_outputs_outlive_the_next_run():
    runner = runner_of(build(), capture=rerun)
    first = runner.run(batch_of([([7], 0, [1])]))
    kept = first.logits_SV.clone(), first.hidden_SD.clone()
    runner.run(batch_of([([8], 1, [1])]))
    assert torch.equal(first.logits_SV, kept[0])
    assert torch.equal(first.hidden_SD, kept[1])


def test_the_cache_grows_under_a_recording():
    recorder = Recorder()
    ours, theirs = runner_of(build(), capture=recorder), TorchRunner(build())
    theirs.reserve(300)
    address = ours.cache.first.data_ptr()
    tokens, pages = text(20), [1, 280]
    for start in range(16):
        assert_equal_steps(ours, theirs, batch_of([(tokens[start : start + 1], start, pages)]))
    ours.reserve(300)
    for start in range(16, 20):
        assert_equal_steps(ours, theirs, batch_of([(tokens[start : start + 1], start, pages)]))
    assert recorder.recorded == 1
    assert ours.cache.first.data_ptr() == address
    assert len(ours.cache.slabs) == -(-300 // cache.SLAB)
    with pytest.raises(RunError, match="cache_tokens"):
        ours.reserve(cache.SLAB * cache.MAX_SLABS + 1)


def test_pages_are_copied_wiped_and_moved_across_slabs():
    runner = runner_of(build())
    runner.reserve(200)
    for page in (1, 70, 140, 5):
        runner.cache._page(page)[:] = torch.randn(runner.cache._page(page).shape)
    one, seventy, five = (runner.cache._page(page).clone() for page in (1, 70, 5))
    runner.copy_pages(np.array([70, 1]), np.array([150, 71]))
    assert torch.equal(runner.cache._page(150), seventy)
    assert torch.equal(runner.cache._page(71), one)
    held = runner.read_pages(np.array([150, 5, 71]))
    assert held.shape == (3, runner.page_bytes())
    assert held.dtype == torch.uint8
    runner.wipe_pages(np.array([150, 5, 71]))
    assert not any(runner.cache._page(page).any() for page in (150, 5, 71))
    runner.write_pages(np.array([3, 190, 100]), held)
    for page, expected in ((3, seventy), (190, five), (100, one)):
        assert torch.equal(runner.cache._page(page), expected)
    runner.copy_pages(np.array([], np.int64), np.array([], np.int64))
    layers, heads, size = 3, 2, 16
    assert runner.page_bytes() == layers * 2 * heads * PAGE * size * 4


def test_projections_are_fused_without_a_second_copy():
    model = build()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    runner = runner_of(model)
    assert runner.weight_bytes() == sum(parameter.nbytes for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    attention = model.model.layers[0].self_attn
    [qkv] = {
        part.weight.untyped_storage().data_ptr()
        for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert qkv == runner._weights.layers[0].qkv.weight.data_ptr()
    again = runner_of(model)  # a second runner over the module shares what the first has fused
    assert again._weights.layers[0].qkv.weight.data_ptr() == qkv


def test_what_lies_apart_is_fused_and_what_only_looks_adjacent_too():
    whole = torch.arange(24.0).view(6, 4)
    first, second = (torch.nn.Parameter(part) for part in (whole[:2], whole[3:]))
    fused = fuse([first, second])
    assert torch.equal(fused, torch.cat((whole[:2], whole[3:])))
    assert first.data_ptr() == fused.data_ptr()
    first.data.fill_(7)
    assert fused[:2].eq(7).all()
    assert fuse([first, second]).data_ptr() == fused.data_ptr()


@every_shape
def test_new_weights_come_in_place_under_a_recording(shape):
    recorder = Recorder()
    changes = SHAPES[shape]
    runner, other = runner_of(build(**changes), capture=recorder), build(seed=1, **changes)
    step = batch_of([([7], 0, [1])])
    before = runner.run(step).logits_SV
    runner.load(other)
    expected = plain_logits(other, step)
    found = runner.run(step).logits_SV
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert (found - before).abs().max() > 0.01
    assert recorder.recorded == 1


def test_a_trainers_changes_are_seen_and_parameters_with_other_memory_are_recorded_again():
    recorder = Recorder()
    model = build()
    runner, step = runner_of(model, capture=recorder), batch_of([([7], 0, [1])])
    before = runner.run(step).logits_SV
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 3
        model.model.layers[1].mlp.up_proj.weight *= 2
    changed = runner.run(step).logits_SV
    assert (changed - before).abs().max() > 0.01
    parameter = model.model.layers[2].self_attn.q_proj.weight
    parameter.data = parameter.detach() * 2
    runner.load(model)
    expected = plain_logits(copy.deepcopy(model), step)
    assert (runner.run(step).logits_SV - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert recorder.recorded == 2


def test_a_fused_model_is_saved_and_loaded_as_any_other(tmp_path):
    model, plain = build(), build()
    runner_of(model)
    save_model(model, tmp_path / "fused")
    save_model(plain, tmp_path / "plain")
    names = "model.safetensors"
    assert (tmp_path / "fused" / names).read_bytes() == (tmp_path / "plain" / names).read_bytes()
    loaded = load_model(tmp_path / "fused")
    assert torch.equal(
        loaded.model.layers[0].self_attn.v_proj.weight, model.model.layers[0].self_attn.v_proj.weight
    )


@pytest.mark.parametrize("shape", ["dense", "mixture"])
def test_rows_of_many_adapters_share_a_batch_and_others_keep_their_recording(shape, tmp_path):
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    configs = [LoraConfig(rank=3), LoraConfig(rank=5, targets=attention, dora=True)]
    ours, theirs = both(SHAPES[shape], capture=rerun)
    for number, config in enumerate(configs):
        model = build(**SHAPES[shape])
        adapt(model, config, number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, weight in adapted_weights(model):
                weight.lora_b.normal_(generator=generator, std=0.2)
                if weight.magnitude is not None:
                    weight.magnitude *= 1.3
        save_adapter(model, tmp_path / str(number))
        for runner in (ours, theirs):
            runner.set_adapter(number, read_adapter(runner.model, tmp_path / str(number)))
    rows = [(text(12 + 3 * row, row), 0, pages_for(32, 1 + 2 * row)) for row in range(5)]
    step = with_adapters(batch_of(rows, wanted=[3, 11, 26, 30, 40, 60, 65, 70]), [1, -1, 0, 1, 0])
    plain = assert_equal_steps(ours, theirs, batch_of(rows, wanted=step.wanted_S.tolist())).logits_SV
    found = assert_equal_steps(ours, theirs, step, most=2e-5).logits_SV
    assert (found - plain).abs().amax(1).gt(0.01).sum() == 7
    singles = [([5], len(tokens), pages) for tokens, _, pages in rows]
    assert_equal_steps(ours, theirs, with_adapters(batch_of(singles), [1, -1, 0, 1, 0]), most=2e-5)
    assert_equal_steps(ours, theirs, with_adapters(batch_of(singles), [-1] * 5), most=2e-5)
    ours.set_adapter(1, None)
    assert_equal_steps(ours, theirs, with_adapters(batch_of(singles[:3]), [0, -1, 0]), most=2e-5)


@pytest.mark.parametrize("shape", ["dense", "mixture"])
@pytest.mark.parametrize("capture", [None, rerun], ids=["launched", "recorded"])
def test_an_engine_writes_what_a_full_pass_per_token_writes(make_model, naive, shape, capture):
    sizes = (
        {} if shape == "dense" else {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 16}
    )
    model = make_model(**sizes)
    prompts = [text(length, length, 320) for length in (3, 40, 17, 1, 25)]
    expected = [naive(model, prompt, 12)["tokens"] for prompt in prompts]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for guesses in (None, speculation(model, lookup=True, slots=3)):
        engine = Engine(
            runner_of(make_model(**sizes), capture=capture), slots=3, step_tokens=16, speculation=guesses
        )
        found = engine.run([Request(str(n), prompt, params) for n, prompt in enumerate(prompts)])
        assert [reply.tokens for reply in found] == expected


def test_the_front_door_records_before_it_serves(make_model, tokenizer, tmp_path, monkeypatch):
    save_model(make_model(), tmp_path, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path)
    question = [{"role": "user", "content": "the cat"}]
    expected = LLM(tmp_path, slots=4).chat(question, max_tokens=8, temperature=0)
    recorder = Recorder()
    monkeypatch.setattr(llm, "runner_for", lambda model, *_, **__: runner_of(model, capture=recorder))
    ours = LLM(tmp_path, slots=4)
    assert recorder.recorded == 3  # buckets of 1, 2 and 4
    assert ours.chat(question, max_tokens=8, temperature=0).content == expected.content
    assert recorder.recorded == 3
    assert recorder.replayed > 0


WHOLE = {
    "dense": {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96},
    "mixture": MIXTURE | {"hidden_size": 64, "moe_intermediate_size": 32},
}
"""Shapes in whole sixteens."""


def rounded(model):
    """A model whose blocks have the values that float8 leaves of them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                small, scale = twins.quantize(parameter)
                parameter.copy_(small.float() * scale)
    return model


@pytest.mark.parametrize("shape", WHOLE)
def test_a_single_token_in_float8_meets_rounded_weights_and_several_are_rounded_themselves(shape):
    model, step = build(**WHOLE[shape]), batch_of([([7], 0, [1])])
    small = runner_of(model, weights="float8", capture=rerun)
    expected = plain_logits(rounded(build(**WHOLE[shape])), step)
    if shape == "dense":
        found = small.run(step).logits_SV
        assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
    several = batch_of([(text(20), 0, [1, 2])])
    expected, found = plain_logits(build(**WHOLE[shape]), several), small.run(several).logits_SV
    assert (found - expected).abs().max() > 1e-3
    assert torch.cosine_similarity(found, expected).mean() > 0.98


@pytest.mark.parametrize("shape", WHOLE)
def test_float8_follows_new_weights_and_takes_a_byte_a_weight(shape):
    small = runner_of(build(**WHOLE[shape]), weights="float8", capture=rerun)
    step, other = batch_of([([7], 0, [1])]), build(seed=1, **WHOLE[shape])
    small.run(step)
    small.load(other)
    fresh = runner_of(other, weights="float8")
    assert torch.equal(small.run(step).logits_SV, fresh.run(step).logits_SV)
    blocks = [parameter for name, parameter in other.named_parameters() if "_proj" in name]
    weights = sum(parameter.numel() for parameter in blocks)
    rows = sum(parameter[..., 0].numel() for parameter in blocks)
    routers = sum(
        parameter.nbytes for name, parameter in other.named_parameters() if "mlp.gate.weight" in name
    )
    own = sum(parameter.nbytes for parameter in other.parameters())
    assert small.weight_bytes() == own + weights + 4 * rows + routers


def test_float8_says_what_it_needs():
    with pytest.raises(ConfigError, match="multiples of 16"):
        runner_of(build(**SHAPES["odd-sizes"]), weights="float8")
    with pytest.raises(ConfigError, match="float8 is for a GPU"):
        runner_for(build(), "float8")


class Elsewhere:
    """As much of a model on a GPU as choosing its runner asks for."""

    def __init__(self, dtype=torch.bfloat16, other=None, **changes):
        self.config = build(**changes).config
        weight, second = (
            SimpleNamespace(device=torch.device("cuda", 0), dtype=kind) for kind in (dtype, other or dtype)
        )
        self.model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=weight))
        self._parameters = [weight, second]

    def parameters(self):
        return self._parameters


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of the newest kind, with Triton beside it."""
    monkeypatch.setattr(hardware, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(cuda_runner, "_fault", lambda device: "")
    return monkeypatch


def test_a_model_is_for_these_kernels_where_they_can_be_launched(gpu):
    assert "for CUDA" in unfit(build())
    assert unfit(Elsewhere()) == ""
    assert "float64" in unfit(Elsewhere(torch.float64))
    assert "bfloat16" in unfit(Elsewhere(other=torch.float32))
    assert "head_dim is 320" in unfit(Elsewhere(head_dim=320))
    gpu.setattr(cuda_runner, "_fault", lambda device: "no compiler")
    assert unfit(Elsewhere()) == "no compiler"
    gpu.setattr(hardware, "capability", lambda device: (7, 5))
    assert "a GPU is older" in unfit(Elsewhere())
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in unfit(Elsewhere())


def test_on_a_gpu_the_runner_is_ours_or_torchs_with_the_reason_logged(gpu, caplog):
    gpu.setattr(runners, "CudaRunner", lambda model, weights: ("ours", weights))
    gpu.setattr(runners, "TorchRunner", lambda model: "torch's")
    assert runner_for(Elsewhere()) == ("ours", "as_is")
    assert runner_for(Elsewhere(), "float8") == ("ours", "float8")
    with pytest.raises(ConfigError, match="in float8"):
        runner_for(Elsewhere(), "int4")
    gpu.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level("INFO"):
        assert runner_for(Elsewhere()) == "torch's"
    assert "triton is not installed" in caplog.text
    with pytest.raises(ConfigError, match="triton is not installed"):
        runner_for(Elsewhere(), "float8")


def test_a_server_on_a_gpu_that_is_not_there_says_so(monkeypatch, tmp_path):
    from pensar.cli.serve import serve

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no GPU"):
        serve(tmp_path, device="cuda")
    with pytest.raises(ConfigError, match="--device cuda"):
        serve(tmp_path, device="cuda", tensor_parallel=2)


@pytest.mark.parametrize("capture", [None, rerun], ids=["launched", "recorded"])
def test_what_nobody_wants_scores_of_is_stored_all_the_same(capture):
    ours, theirs = both({}, capture=capture)
    for rows in ([(text(30), 0, pages_for(40))], [([3, 4], 30, pages_for(40))], [([5], 32, pages_for(40))]):
        for runner in (ours, theirs):
            found = runner.run(batch_of(rows, wanted=np.array([], np.int64)))
            assert found.logits_SV.shape == (0, 320)
            assert found.hidden_SD.shape == (0, 48)
    assert_equal_steps(ours, theirs, batch_of([([6], 33, pages_for(40))]))


def test_the_runner_needs_no_triton_before_it_launches_something():
    import subprocess
    import sys

    program = "import pensar.infer.runners, pensar.infer.cuda.runner, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_memory_of_a_step_grows_with_its_tokens_and_not_with_texts():
    runner = runner_of(build(), capture=rerun)
    assert runner.step_bytes(64, 0) == runner.step_bytes(64, 100_000)
    more = runner.step_bytes(128, 0) - runner.step_bytes(64, 0)
    hidden, width, attended, qkv = 48, 80, 64, 128
    assert more == 64 * 4 * (3 * hidden + max(qkv + 2 * attended, 3 * width))
    assert runner.step_bytes(0, 0) == sum(BUCKETS) * 320 * 4

"""The native runner computes what the model computes, in every type, and keeps its promises about errors and memory."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pensar.base.errors import ModelError
from pensar.infer import sampling
from pensar.infer.adapters import read_adapter
from pensar.infer.native import pack, threads, twins
from pensar.infer.native.library import library
from pensar.infer.native.pack import Matrix, Team, gate_and_up, in_order
from pensar.infer.native.runner import NativeRunner
from pensar.infer.rows import FIELDS
from pensar.infer.sampling import rules_of, sample
from pensar.infer.torch_runner import TorchRunner
from pensar.model.adapter import save_adapter
from pensar.model.lora import LoraConfig, adapt, adapted_weights
from tests.infer.native_work import (
    MIXTURE,
    SHAPES,
    batch_of,
    build,
    logits_of,
    pages_for,
    reference,
    text,
    with_adapters,
)

KINDS = ("float32", "bfloat16", "int8", "int4")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


@every_shape
def test_float32_scores_are_the_models_in_float64_up_to_rounding(shape):
    tokens = text(150, vocab_size=build(**SHAPES[shape]).config.vocab_size)
    expected = reference(build(dtype=torch.float64, **SHAPES[shape]), tokens)
    found = logits_of(NativeRunner(build(**SHAPES[shape])), tokens).double()
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


def test_scores_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from pensar.model.weights import save_model

    model = build(tied=True, head_dim=32)
    save_model(model, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = text(70)
    with torch.no_grad():
        expected = peer(torch.tensor([tokens])).logits[0]
    found = logits_of(NativeRunner(model), tokens).double()
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@every_kind
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(64, 32, 1), (200, 70, 5), (513, 97, 29)])
def test_a_product_is_its_twins(kind, inputs, outputs, rows):
    generator = torch.Generator().manual_seed(inputs)
    x, weight = (
        torch.randn(rows, inputs, generator=generator),
        torch.randn(outputs, inputs, generator=generator),
    )
    x[:, 3] *= 20
    weight[1] = 0
    team, matrix = Team(1), Matrix(kind, in_order(outputs), outputs, inputs)
    matrix.fill(weight, team)
    expected = twins.product(x, weight, kind)
    most = 3e-6 * expected.abs().max().item()
    torch.testing.assert_close(matrix.product(x, team).double(), expected, rtol=0, atol=most)


@every_kind
def test_columns_come_out_as_they_were_packed(kind):
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(1))
    matrix = Matrix(kind, in_order(70), 70, 90)
    matrix.fill(weight, Team(1))
    expected = {
        "float32": weight,
        "bfloat16": weight.bfloat16().float(),
        "int8": twins.int8_columns(weight),
        "int4": twins.int4_columns(weight),
    }[kind]
    torch.testing.assert_close(matrix.columns([69, 0, 33]), expected[[69, 0, 33]], rtol=1e-6, atol=1e-7)


def test_a_room_gives_each_matrix_aligned_memory_of_its_own_out_of_few_pieces(monkeypatch):
    monkeypatch.setattr(pack, "PIECE", 4_096)
    room, sizes = pack.Room(), (100, 64, 1, 3_904, 5_000, 64)
    taken = [room.take(size) for size in sizes]
    for number, values in enumerate(taken):
        values.fill_(number)
    assert [len(values) for values in taken] == list(sizes)
    assert all(values.data_ptr() % 64 == 0 for values in taken)
    assert all((values == number).all() for number, values in enumerate(taken))
    pieces = [values.untyped_storage().data_ptr() for values in taken]
    assert [pieces.index(piece) for piece in pieces] == [0, 0, 0, 3, 4, 5]


def test_gates_and_ups_share_panels_of_which_each_holds_every_row_once():
    for width in (1, 8, 24, 71, 128):
        order = gate_and_up(width)
        assert len(order) % library().pensar_columns() == 0
        assert sorted(order[order >= 0]) == list(range(2 * width))


def test_exp_is_exact_to_two_units_in_the_last_place():
    x = torch.cat((torch.linspace(-87.2, 87.9, 200_001), torch.linspace(-1e-3, 1e-3, 1_001)))
    found = torch.empty_like(x)
    library().pensar_exp(x.data_ptr(), len(x), found.data_ptr())
    expected = x.double().exp()
    ulp = torch.from_numpy(np.spacing(expected.float().numpy())).double()
    assert ((found.double() - expected).abs() / ulp).max() <= 2
    special = torch.tensor([-torch.inf, -100.0, torch.nan])
    found = torch.empty_like(special)
    library().pensar_exp(special.data_ptr(), 3, found.data_ptr())
    assert found[:2].tolist() == [0, 0]
    assert found[2].isnan()


@pytest.mark.parametrize("vocabulary", [1, 15, 300, 2_048, 5_003])
@pytest.mark.parametrize("temperature", [None, 0.25, 2.0])
def test_draws_are_those_of_the_inverse_distribution_in_float64(vocabulary, temperature):
    generator = torch.Generator().manual_seed(vocabulary)
    scores = 4 * torch.randn(200, vocabulary, generator=generator)
    scores[:, 1::3] = -torch.inf  # banned
    uniform = torch.rand(200, generator=generator)
    degrees = None if temperature is None else torch.full((200, 1), temperature)
    ids, top, total = NativeRunner(build()).weigh(scores, degrees, uniform)
    weights = np.exp(
        (scores.double().numpy() - scores.double().amax(1, keepdim=True).numpy()) / (temperature or 1)
    )
    sums = weights.cumsum(1)
    wanted = uniform.double().numpy() * sums[:, -1]
    assert torch.equal(top, scores.amax(1))
    np.testing.assert_allclose(total, sums[:, -1], rtol=2e-6)
    rows = np.arange(200)
    assert (weights[rows, ids] > 0).all()
    # The running sum passes what is wanted at the drawn token, up to rounding.
    assert (sums[rows, ids] >= wanted * (1 - 3e-6)).all()
    assert (sums[rows, ids] - weights[rows, ids] <= wanted * (1 + 3e-6)).all()


def test_a_draw_is_a_rows_own_at_any_number_of_threads_and_the_least_and_greatest_numbers_find_a_token():
    scores = 4 * torch.randn(64, 700, generator=torch.Generator().manual_seed(1))
    scores[:, 0] = scores[:, -1] = -torch.inf
    uniform = torch.cat((torch.zeros(1), torch.full((1,), 1 - 2.0**-23), torch.rand(62)))
    together = NativeRunner(build(), threads=3).weigh(scores, None, uniform)
    alone = NativeRunner(build())
    for row in range(64):
        apart = alone.weigh(scores[row : row + 1], None, uniform[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(apart, together, strict=True))
    assert together[0].tolist()[:2] == [1, 698]


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 63, 64, 65, 300, 2_048, 5_003])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary):
    scores = torch.randint(
        -3, 4, (50, vocabulary), generator=torch.Generator().manual_seed(vocabulary)
    ).float()
    scores[0] = -torch.inf
    scores[1, -1] = 9
    scores[2] = -7.5
    for number in (1, 3):
        ids, top, _ = NativeRunner(build(), threads=number).weigh(scores, None, None)
        plain, most, _ = sampling.weigh(scores, None, None)
        assert torch.equal(ids, torch.from_numpy(scores.numpy().argmax(1)))
        assert torch.equal(ids, plain)
        assert torch.equal(top, most)
    scores[3, vocabulary // 2] = torch.nan
    scores[4, -1] = torch.inf
    _, top, _ = NativeRunner(build()).weigh(scores, None, None)
    assert top.isfinite().tolist() == [False, True, True, False, False, *[True] * 45]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_with_nan_or_infinity_has_no_sound_draw_and_the_others_have_theirs(value):
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
    scores[1, 17] = value
    found = sample(scores, rules_of(_sampled(3), scores.device), torch.rand(3), NativeRunner(build()).weigh)
    assert found.sound.tolist() == [True, False, True]


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_a_text_of_any_length_is_read_from_its_pages(cache, length):
    model, tokens = build(num_layers=1), text(length)
    expected = reference(build(num_layers=1, dtype=torch.float64), tokens)
    found = logits_of(NativeRunner(model, cache=cache), tokens).double()
    most = {"float32": 5e-6, "bfloat16": 1e-2, "int8": 2e-2}[cache]
    assert (found - expected).abs().max() <= most * expected.abs().max()


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.02), ("int8", 0.08), ("int4", 0.6)])
def test_fewer_bits_change_scores_as_much_as_their_weights_do(kind, most):
    """The model with the packed weights in it, and its rows as they are, stays close; int4 keeps its head in int8."""
    model, tokens = build(tied=True), text(100)
    lossy = build(tied=True, dtype=torch.float64)
    if kind != "bfloat16":
        shrink = {"int8": twins.int8_columns, "int4": twins.int4_columns}[kind]
        with torch.no_grad():
            for name, weight in lossy.named_parameters():
                if weight.ndim == 2:
                    by = twins.int8_columns if "embed" in name else shrink
                    weight.copy_(by(weight.float()))
    else:
        lossy = build(tied=True).bfloat16().double()
    expected = reference(lossy, tokens)
    plain = reference(build(tied=True, dtype=torch.float64), tokens)
    found = logits_of(NativeRunner(model, kind), tokens).double()
    # Rows of bytes cost a few hundredths more; the loss of the weights themselves explains the rest.
    assert (found - expected).norm() <= 0.06 * expected.norm()
    assert (found - plain).norm() <= most * plain.norm()


def test_it_goes_on_where_another_step_stopped_as_torchs_runner_does():
    model = build(**MIXTURE)
    torchs, ours = TorchRunner(model), NativeRunner(model)
    first, second = text(37, 1), text(50, 2)
    for runner in (torchs, ours):
        runner.reserve(20)
    steps = [
        batch_of([(first[:20], 0, pages_for(37)), (second[:5], 0, pages_for(50, 8))], wanted=[19, 24]),
        batch_of(
            [(second[5:49], 5, pages_for(50, 8)), (first[20:21], 20, pages_for(37))], wanted=[0, 43, 44]
        ),
        batch_of([(first[21:], 21, pages_for(37)), (second[49:], 49, pages_for(50, 8))]),
    ]
    for step in steps:
        expected, found = torchs.run(step), ours.run(step)
        torch.testing.assert_close(found.logits_SV, expected.logits_SV, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.hidden_SD, expected.hidden_SD, rtol=1e-4, atol=1e-4)


def test_nothing_wanted_is_nothing_returned_and_yet_kept():
    runner, tokens = NativeRunner(build()), text(30)
    expected = logits_of(NativeRunner(build()), tokens)[29]
    runner.reserve(4)
    empty = runner.run(batch_of([(tokens[:29], 0, pages_for(30))], wanted=[]))
    assert empty.logits_SV.shape == (0, 320)
    assert torch.equal(runner.run(batch_of([(tokens[29:], 29, pages_for(30))])).logits_SV[0], expected)


def test_pages_are_copied_wiped_and_outlive_growth():
    runner, tokens = NativeRunner(build()), text(33)
    expected = logits_of(runner, tokens)[32]
    runner.reserve(50)
    runner.copy_pages(np.array([1, 2, 3]), np.array([40, 41, 42]))
    runner.wipe_pages(np.array([1, 2, 3]))
    pages = [page + 39 for page in pages_for(33)]
    assert torch.equal(runner.run(batch_of([(tokens[32:], 32, pages)])).logits_SV[0], expected)
    assert not torch.equal(runner.run(batch_of([(tokens[32:], 32, pages_for(33))])).logits_SV[0], expected)
    assert runner.page_bytes() == 3 * 16 * 2 * 2 * 16 * 4


@every_kind
def test_new_weights_are_taken_in_place(kind):
    model, tokens = build(0, **MIXTURE), text(20)
    runner = NativeRunner(model, kind)
    old = logits_of(runner, tokens)
    runner.load(build(1, **MIXTURE))
    assert torch.equal(logits_of(runner, tokens), logits_of(NativeRunner(build(1, **MIXTURE), kind), tokens))
    runner.load(dict(build(0, **MIXTURE).named_parameters()))
    assert torch.equal(logits_of(runner, tokens), old)


def adapter_of(model, folder, config, seed):
    """An adapter on disk that changes a copy of the model much."""
    changed = build(**vars_of(model))
    adapt(changed, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in adapted_weights(changed):
            weight.lora_b.copy_(torch.randn(weight.lora_b.shape, generator=generator) * 0.2)
    save_adapter(changed, folder)
    return read_adapter(model, folder)


def vars_of(model):
    return MIXTURE if model.config.num_experts else {}


@pytest.mark.parametrize("shape", [{}, MIXTURE], ids=["dense", "mixture"])
def test_rows_with_adapters_are_computed_as_torchs_runner_computes_them(tmp_path, shape):
    model = build(**shape)
    attention = ("q_proj", "v_proj", "o_proj")
    configs = [LoraConfig(rank=3), LoraConfig(rank=5, targets=attention, dora=True)]
    adapters = [adapter_of(model, tmp_path / str(i), config, i) for i, config in enumerate(configs)]
    torchs, ours = TorchRunner(model), NativeRunner(model)
    for runner in (torchs, ours):
        runner.reserve(20)
        for number, adapter in enumerate(adapters):
            runner.set_adapter(number, adapter)
    rows = [(text(12 + 3 * row, row), 0, pages_for(32, 1 + 2 * row)) for row in range(5)]
    step = with_adapters(batch_of(rows, wanted=[3, 11, 26, 30, 40, 60, 65, 70]), [1, -1, 0, 1, 0])
    expected, found = torchs.run(step), ours.run(step)
    plain = ours.run(batch_of(rows, wanted=step.wanted_S.tolist()))
    torch.testing.assert_close(found.logits_SV, expected.logits_SV, rtol=1e-4, atol=2e-4)
    assert torch.equal(found.logits_SV[2], plain.logits_SV[2])
    assert (found.logits_SV - plain.logits_SV).abs().amax(1).gt(0.1).sum() == 7
    for runner in (torchs, ours):
        runner.set_adapter(1, None)
    again = ours.run(with_adapters(batch_of(rows[:1]), [1]))
    assert torch.equal(again.logits_SV, ours.run(batch_of(rows[:1])).logits_SV)


@every_kind
def test_a_broken_weight_shows_as_nan_and_not_as_some_token(kind):
    model = build()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[5] = torch.nan
    assert logits_of(NativeRunner(model, kind), text(5)).isnan().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens_N": np.array([320, 1])}, "vocabulary"),
        ({"tokens_N": np.array([-1, 1])}, "vocabulary"),
        ({"positions_N": np.array([-1, 0])}, "position"),
        ({"lengths_R": np.array([17])}, "pages"),
        ({"lengths_R": np.array([1])}, "new token"),
        ({"pages_RP": np.array([[4]])}, "page"),
        ({"wanted_S": np.array([1, 1])}, "wanted"),
        ({"wanted_S": np.array([2])}, "wanted"),
        ({"adapters_R": np.array([0])}, "adapter"),
    ],
)
def test_a_batch_that_points_outside_is_refused_before_memory_is_touched(change, said):
    from dataclasses import replace

    runner = NativeRunner(build())
    runner.reserve(4)
    with pytest.raises(ModelError, match=said):
        runner.run(replace(batch_of([([3, 4], 0, [1])]), **change))


def test_the_number_of_threads_is_what_was_fastest_and_changes_no_bit(monkeypatch):
    runner, tokens = NativeRunner(build(**MIXTURE)), text(40)
    before = logits_of(runner, tokens)
    tried = []

    def spent(_, number, *, pin):
        tried.append(number)
        return {1: 8.0, 2: 4.0, 4: 3.9}[number]

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    with monkeypatch.context() as patch:
        patch.setattr(threads, "seconds", lambda runner, number, pin=False: spent(runner, number, pin=pin))
        assert threads.take_fastest(runner) == 2  # four are hardly faster, eight are not tried
        assert tried == [1, 2, 4]
        assert threads.take_fastest(runner, most=1) == 1
    runner.use_threads(3)
    assert torch.equal(logits_of(runner, tokens), before)
    assert threads.seconds(runner, 2) > 0
    assert "2 threads" in runner.describe()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores can be chosen on Linux alone")
def test_pinned_threads_keep_to_one_core_each_and_the_caller_to_none():
    free = os.sched_getaffinity(0)
    before = {int(path.name) for path in Path("/proc/self/task").iterdir()}
    runner = NativeRunner(build(), threads=3, pin=True)
    logits_of(runner, text(8))
    made = {int(path.name) for path in Path("/proc/self/task").iterdir()} - before
    pinned = [os.sched_getaffinity(thread) for thread in made]
    assert [len(cores) for cores in pinned] == [1, 1]
    assert all(cores <= free for cores in pinned)
    assert len(free) == 1 or pinned[0] != pinned[1]
    assert os.sched_getaffinity(0) == free


def test_a_forked_process_makes_threads_of_its_own():
    runner, tokens = NativeRunner(build(), threads=2), text(40)
    expected = logits_of(runner, tokens)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(logits_of(runner, tokens), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(logits_of(runner, tokens), expected)


def _sampled(num):
    rows = np.zeros(num, FIELDS)
    rows["temperature"] = rows["top_p"] = 1
    return rows

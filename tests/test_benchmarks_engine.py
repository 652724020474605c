"""The pieces of the engine's benchmark: contenders do the same work, and its limits are the formulas they claim."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    engine_costs,
    engine_llama_cpp,
    engine_ours,
    engine_rollouts,
    engine_speeds,
    engine_spill,
    engine_transformers,
    engine_work,
)
from pensar.model.attention import Packed
from pensar.model.gguf import export_gguf
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from tiny import BENCHED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_work.directory(tmp_path_factory.mktemp("small") / "model", BENCHED)


def test_contenders_answer_the_same_prompts_with_the_same_tokens(folder: Path) -> None:
    prompts = engine_work.prompts_of(3, 2, BENCHED, length=20)
    theirs = engine_transformers.generator(str(folder))(prompts, 6)
    assert [len(reply) for reply in theirs] == [6, 6]
    for kind in engine_ours.kinds():
        ours = engine_ours.generator(str(folder), 2, kind)(prompts, 6)
        if kind.endswith("float32"):
            assert ours == theirs
        assert [len(reply) for reply in ours] == [6, 6]


def test_llama_cpp_answers_several_prompts_in_their_order(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    prompts = engine_work.prompts_of(4, 3, BENCHED, length=20)
    ours = engine_ours.generator(str(folder), 3, engine_ours.TORCH)(prompts, 1)
    generate = engine_llama_cpp.generator(str(export_gguf(folder, tmp_path / "model.gguf", "f32")), 3)
    assert generate(prompts, 1) == ours
    assert [len(reply) for reply in generate(prompts, 5)] == [5, 5, 5]
    assert generate(prompts[:1], 1) == ours[:1]


def serving(generate: str, asked: list[dict[str, object]]) -> "subprocess.CompletedProcess[str]":
    program = (
        f"from benchmarks.engine_serve import serve\nimport time, threading\n{generate}\nserve(generate)"
    )
    lines = "".join(json.dumps(one) + "\n" for one in asked)
    return subprocess.run(
        [sys.executable, "-c", program], input=lines, capture_output=True, text=True, check=False
    )


def test_a_contender_counts_the_time_of_all_its_threads() -> None:
    """Two threads that each compute for a while without holding the interpreter."""
    generate = """
import hashlib
def work():
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        hashlib.sha256(b"x" * 2**22)
def generate(prompts, new):
    print("noise of a library")
    threads = [threading.Thread(target=work) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join(0.1) for thread in threads]
    time.sleep(1.5)
    return [[len(prompt)] * new for prompt in prompts]
"""
    done = serving(generate, [{"prompts": [[1, 2], [3]], "new": 3}])
    ready, answer = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": True}
    assert answer["tokens"] == [[2] * 3, [1] * 3]
    assert 0.5 < answer["seconds"] < 1.2
    assert "noise of a library" in done.stderr


def test_replies_of_another_length_are_no_measurement() -> None:
    done = serving("def generate(prompts, new): return [[1]]", [{"prompts": [[1]], "new": 3}])
    assert done.returncode != 0
    assert "replies of [1] tokens, not of 3" in done.stderr


def test_weights_are_counted_as_the_model_has_them_norms_apart() -> None:
    for config in (BENCHED, engine_work.CONFIG, engine_rollouts.CONFIG):
        with torch.device("meta"):
            model = Qwen3(config)
        matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
        assert engine_work.num_weights(config) == matrices
    assert round(engine_work.num_weights(engine_work.CONFIG) / 1e6, 1) == 33.6


def test_limits_follow_from_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_work, "bytes_per_second", lambda num_bytes: 1e9)
    monkeypatch.setattr(engine_work, "operations_per_second", lambda kind: 1e12)
    weights, config = engine_work.num_weights(engine_work.CONFIG), engine_work.CONFIG
    cached = (128 + 15.5) * 8 * 2 * 4 * 64 * 4
    assert engine_work.decode_limit("int8", 1) == pytest.approx(1e9 / (weights + cached))
    assert engine_work.decode_limit("int4", 16) == pytest.approx(16e9 / (weights / 2 + 16 * cached))
    monkeypatch.setattr(engine_work, "bytes_per_second", lambda num_bytes: 1e15)
    assert engine_work.decode_limit("float32", 16) == pytest.approx(1e12 / (2 * weights))
    inner = weights - config.vocab_size * config.hidden_size
    operations = 128 * 2 * (inner + 8 * 8 * 64 * 128) + 2 * config.vocab_size * config.hidden_size
    assert engine_work.prefill_limit("float32") == pytest.approx(128 * 1e12 / operations)


def test_rates_of_the_machine_are_those_of_a_computer() -> None:
    assert 1e8 < engine_work.bytes_per_second(2**22) < 1e12
    for kind in ("float32", "int8"):
        assert 1e8 < engine_work.operations_per_second(kind, size=256) < 1e14


class Counting:
    """A contender whose prefill costs a second a prompt, and a token a hundredth."""

    threads = 1

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.prompts: set[str] = set()

    def ask(self, prompts: list[list[int]], new: int) -> float:
        self.asked.append((len(prompts), new))
        assert json.dumps(prompts) not in self.prompts, "a prompt that a cache may hold"
        self.prompts.add(json.dumps(prompts))
        return len(prompts) * (1 + 0.01 * (new - 1))


def test_decoding_is_what_more_tokens_cost() -> None:
    contender = Counting()
    seconds = engine_speeds.measured({"x": contender}, rounds=2)  # type: ignore[dict-item]
    assert seconds["x", "decode_1"] == pytest.approx([0.31, 0.31])
    assert seconds["x", "decode_16"] == pytest.approx([16 * 0.31] * 2)
    assert seconds["x", "prefill"] == pytest.approx([1.0, 1.0])
    assert contender.asked[:7] == [(1, 1)] * 3 + [(1, 32)] * 3 + [(16, 1)]


def test_every_line_has_a_name_of_its_own_and_known_contenders() -> None:
    names = [row.metric for row in engine_speeds.ROWS]
    assert len(names) == len(set(names))
    kinds = {f"{peer} {kind}" for peer in ("llama.cpp", "openvino") for kind in engine_work.GGUF_KINDS}
    for row in engine_speeds.ROWS:
        assert set(row.peers) <= kinds | {"transformers"}
        assert row.kind in engine_work.BYTES


def test_a_peer_that_is_not_installed_is_named_and_skipped() -> None:
    peer = engine_work.openvino_peer(Path("model.gguf"), "f16", "/nowhere/python")
    assert peer == engine_work.Peer("OpenVINO GenAI (not installed)", None)


# ---------------------------------------------------------------- rollouts


def test_prompts_are_padded_on_the_left_and_completions_end_at_their_stop() -> None:
    ids, mask = engine_rollouts._padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    completions = torch.tensor([[3, 9, 3, 9], [3, 3, 3, 3], [9, 9, 3, 3]])
    kept = engine_rollouts._up_to_the_stop(completions, torch.tensor([9, 10]))
    assert kept.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_the_peers_second_pass_gives_the_log_probabilities_of_the_model(folder: Path) -> None:
    import transformers

    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder)
    ids = torch.tensor(engine_work.prompts_of(0, 10, BENCHED, length=9))  # more rows than a pass takes
    with torch.no_grad():
        found = engine_rollouts._logprobs(peer, ids, torch.ones_like(ids), 4)
        logits = model.logits(model(ids, torch.arange(9).expand(10, -1), Packed()))
    expected = logits.log_softmax(-1)[:, 4:-1].gather(-1, ids[:, 5:, None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


# ---------------------------------------------------------------- costs


def test_the_engines_own_share_is_between_nothing_and_all() -> None:
    share, seconds = engine_costs._own_share(BENCHED, engine_ours.TORCH, steps=8)
    assert 0 < share < 1
    assert 0 < seconds < 5


def test_new_weights_are_taken_by_an_engine_at_work() -> None:
    seconds, least = engine_costs._sync_seconds(engine_costs.TINY, engine_ours.TORCH, rounds=2)
    assert 0 < seconds < 5
    assert 0 < least < 5


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_spill_is_measured_on_prompts_that_push_each_other_out(place: str) -> None:
    row = engine_spill.spill_line(BENCHED, engine_ours.TORCH, place, rounds=1)
    # Keys and values of 2 layers, 2 heads of 8 numbers of 4 bytes.
    assert row["page_kib"] == 2 * 2 * 2 * 8 * 4 * row["page_tokens"] / 2**10
    assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-3)

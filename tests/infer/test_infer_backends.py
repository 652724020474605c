"""Backends answer as our engine does: one contract for it, for vLLM's API and for llama.cpp."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pensar.base.errors import ConfigError, ModelError, RunError
from pensar.infer.backends.llama_cpp import LlamaCpp
from pensar.infer.backends.streams import Streams
from pensar.infer.backends.vllm import Vllm
from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.infer.request import Grammar
from pensar.model.weights import load_model, save_model
from pensar.text.chat import encode_stop_sentence
from pensar.text.tokenizer import THINK, THINK_END
from tests.infer.test_infer_adapters import adapter_in
from tests.infer.vllm_stub import NAME, Stub

NEW = 12
PROMPTS = ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [100, 101])


def quiet(model, tokenizer):
    """Control tokens, whose output weights are zero here, never come first: llama.cpp bans those that end a text."""
    with torch.no_grad():
        model.lm_head.weight[list(tokenizer.control_tokens.values())] = 0
    return model


class Setting:
    """What the backends of one test share."""

    def __init__(self, folder, make_model, tokenizer, **shape):
        self.folder, self.tokenizer = folder / "model", tokenizer
        self.model = quiet(make_model(**shape), tokenizer)
        self.closing = []
        save_model(self.model, self.folder, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(self.folder)

    def engine(self, **changes):
        return Engine(load_model(self.folder), self.tokenizer, **({"slots": 8} | changes))

    def stub(self, **changes):
        stub = Stub(self.engine(), **changes)
        self.closing.append(stub.close)
        return stub

    def vllm(self, stub, **changes):
        given = {"folder": self.folder, "shared": self.folder.parent} | changes
        return Vllm(stub.address, self.tokenizer, **given)

    def llama_cpp(self):
        pytest.importorskip("xllamacpp", exc_type=ImportError)
        backend = LlamaCpp(self.folder, kind="f32", slots=4, positions=256, exact=True)
        self.closing.append(backend.close)
        return backend

    def backend(self, name):
        if name == "engine":
            return self.engine()
        if name == "llama.cpp":
            return self.llama_cpp()
        return self.vllm(self.stub(old=name == "old vLLM"))


@pytest.fixture
def setting(tmp_path, make_model, tokenizer):
    found = Setting(tmp_path, make_model, tokenizer)
    yield found
    for close in found.closing:
        close()


OURS = ["engine", "vLLM", "old vLLM"]
every_backend = pytest.mark.parametrize("name", [*OURS, "llama.cpp"])
every_api = pytest.mark.parametrize("name", OURS)


def requests(**params):
    given = SamplingParams(**({"max_tokens": NEW, "ignore_eos": True} | params))
    return [Request(f"r{number}", prompt, given) for number, prompt in enumerate(PROMPTS)]


def stepped(backend, limit=4_000):
    """All pieces by request, until nothing is under way."""
    pieces = {}
    for _ in range(limit):
        for piece in backend.step():
            pieces.setdefault(piece.id, []).append(piece)
        if (
            not backend.num_running
            and not backend.num_waiting
            and all(p[-1].finish_reason for p in pieces.values())
        ):
            return pieces
    raise AssertionError(f"not done after {limit} steps")


# ---------------------------------------------------------------- the contract


@every_backend
def test_greedy_replies_are_those_of_the_naive_generator(setting, naive, name):
    backend = setting.backend(name)
    for prompt, completion in zip(PROMPTS, backend.run(requests()), strict=True):
        assert completion.error is None
        assert completion.tokens == naive(setting.model, prompt, NEW)["tokens"]
        assert completion.finish_reason == "length"
        assert completion.forced == [False] * NEW
        assert completion.logprobs == []
    assert backend.run([]) == []


@every_backend
def test_pieces_joined_are_the_reply(setting, name):
    backend = setting.backend(name)
    whole = {request.id: done for request, done in zip(requests(), backend.run(requests()), strict=True)}
    for request in requests():
        backend.submit(request)
    pieces = stepped(backend)
    assert pieces.keys() == whole.keys()
    for name, parts in pieces.items():
        assert [token for part in parts for token in part.tokens] == whole[name].tokens
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert backend.step() == []


@every_backend
def test_log_probabilities_are_the_models_own(setting, full_logprobs, name):
    backend = setting.backend(name)
    for prompt, done in zip(PROMPTS, backend.run(requests(logprobs=True, top_logprobs=3)), strict=True):
        told = [not math.isnan(value) for value in done.logprobs]
        assert all(told) or (name == "llama.cpp" and any(told))  # which says nothing inside a character
        expected = full_logprobs(setting.model, prompt, done.tokens)
        for value, right, known in zip(done.logprobs, expected, told, strict=True):
            assert not known or value == pytest.approx(right, abs=2e-5)
        # Greedy: the likeliest was taken.
        likeliest = [top[0][0] if top else None for top in done.top_logprobs]
        assert likeliest == [token if known else None for token, known in zip(done.tokens, told, strict=True)]
        assert [len(top) for top in done.top_logprobs] == [3 * known for known in told]
        assert all(top == sorted(top, key=lambda pair: -pair[1]) for top in done.top_logprobs)


@every_backend
def test_a_stop_token_ends_the_reply_and_belongs_to_it(setting, naive, name):
    backend = setting.backend(name)
    tokens = naive(setting.model, PROMPTS[0], NEW)["tokens"]
    stop = tokens[4]
    (done,) = backend.run([Request("r", PROMPTS[0], SamplingParams(max_tokens=NEW, stop_ids=(stop,)))])
    assert done.tokens == tokens[: tokens.index(stop) + 1]
    assert done.finish_reason == "stop"


@every_backend
def test_the_tokenizers_end_of_turn_ends_a_reply_unless_it_is_ignored(setting, name):
    end = setting.tokenizer.eos_id
    bias = {"logit_bias": ((end, 100.0),), "max_tokens": 3}
    backend = setting.backend(name)
    (done,) = backend.run([Request("r", PROMPTS[0], SamplingParams(**bias))])
    assert (done.tokens, done.finish_reason) == ([end], "stop")
    if name != "llama.cpp":  # which bans the token instead
        (done,) = backend.run([Request("r", PROMPTS[0], SamplingParams(ignore_eos=True, **bias))])
        assert (done.tokens, done.finish_reason) == ([end] * 3, "length")


@every_backend
def test_equal_seeds_give_equal_replies(setting, name):
    backend = setting.backend(name)
    drawn = {"temperature": 1.5, "max_tokens": 24}
    first, second = backend.run(requests(seed=1, **drawn)), backend.run(requests(seed=1, **drawn))
    other = backend.run(requests(seed=2, **drawn))
    assert [done.tokens for done in first] == [done.tokens for done in second]
    assert [done.tokens for done in first] != [done.tokens for done in other]


@every_api
def test_every_field_of_sampling_reaches_the_engine(setting, name):
    """The stub draws as our engine does, so what is lost on the way would show in the text."""
    fields = [
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"repetition_penalty": 3.0},
        {"logit_bias": ((7, 50.0),)},
    ]
    backend, engine = setting.backend(name), setting.engine()
    plain = None
    for field in [{}, *fields]:
        asked = requests(temperature=1.2, seed=5, max_tokens=24, **field)
        found = [done.tokens for done in backend.run(asked)]
        assert found == [done.tokens for done in engine.run(asked)], field
        assert found != plain, field
        plain = found if plain is None else plain


@every_api
def test_log_probabilities_of_the_prompt_are_told(setting, full_logprobs, name):
    backend = setting.backend(name)
    for prompt, done in zip(PROMPTS, backend.run(requests(prompt_logprobs=True)), strict=True):
        expected = [0.0, *full_logprobs(setting.model, prompt[:1], prompt[1:])]
        assert done.prompt_logprobs == pytest.approx(expected, abs=2e-5)
        assert (len(done.tokens), done.logprobs) == (NEW, [])


@every_backend
def test_an_impossible_request_fails_alone(setting, name):
    backend = setting.backend(name)
    good = requests()[0]
    too_long = Request("long", [1] * 250, SamplingParams(max_tokens=100))
    unknown = Request("unknown", [1, 100_000], SamplingParams(max_tokens=3))
    empty = Request("empty", [], SamplingParams(max_tokens=3))
    done = backend.run([too_long, good, unknown, empty])
    assert [one.finish_reason for one in done] == ["error", "length", "error", "error"]
    assert "request long needs 350 positions" in done[0].error
    assert "token 100000" in done[2].error
    assert "request empty is empty" in done[3].error
    with pytest.raises(ModelError, match="request empty is empty"):
        backend.submit(empty)


@every_backend
def test_an_id_that_is_in_use_is_refused(setting, name):
    backend = setting.backend(name)
    backend.submit(requests()[0])
    with pytest.raises(ModelError, match="'r0' is in use"):
        backend.submit(requests()[0])
    stepped(backend)
    assert backend.run(requests()[:1])[0].finish_reason == "length"


@every_backend
def test_an_abort_gives_what_there_is_and_leaves_the_others_alone(setting, naive, name):
    backend = setting.backend(name)
    long = Request("long", PROMPTS[0], SamplingParams(max_tokens=240, ignore_eos=True))
    backend.submit(long)
    backend.submit(requests()[1])
    seen, of_other = [], []
    while not seen and name != "llama.cpp":
        for piece in backend.step():
            (seen if piece.id == "long" else of_other).extend(piece.tokens)
    taken = backend.abort("long")
    assert taken.finish_reason == "abort"
    assert taken.tokens[: len(seen)] == seen
    assert taken.tokens == naive(setting.model, PROMPTS[0], len(taken.tokens))["tokens"]
    assert backend.abort("long") is None
    assert backend.abort("never") is None
    pieces = stepped(backend)
    assert pieces.keys() == {"r1"}
    of_other += [token for piece in pieces["r1"] for token in piece.tokens]
    assert of_other == naive(setting.model, PROMPTS[1], NEW)["tokens"]
    assert backend.run([long])[0].tokens[: len(taken.tokens)] == taken.tokens


@every_api
def test_requests_that_were_submitted_before_a_run_are_reported_after_it(setting, name):
    backend = setting.backend(name)
    first = Request("first", PROMPTS[0], SamplingParams(max_tokens=NEW, ignore_eos=True))
    backend.submit(first)
    done = backend.run(requests())
    pieces = stepped(backend)
    assert [token for piece in pieces["first"] for token in piece.tokens] == done[0].tokens


@every_api
def test_a_thinking_budget_is_kept_and_counted_alike(setting, name):
    think, close = setting.tokenizer.special(THINK), setting.tokenizer.special(THINK_END)
    backend, engine = setting.backend(name), setting.engine()
    asked = [
        Request(
            f"b{budget}",
            [5, 6, think],
            SamplingParams(max_tokens=120, thinking_budget=budget, ignore_eos=True),
        )
        for budget in (0, 3, 9)
    ]
    for request, found, expected in zip(asked, backend.run(asked), engine.run(asked), strict=True):
        assert found.tokens == expected.tokens
        assert found.forced == expected.forced
        assert close in found.tokens
        assert found.num_reasoning_tokens == expected.num_reasoning_tokens == request.params.thinking_budget
    for request in asked:
        backend.submit(request)
    for name, pieces in stepped(backend).items():
        assert [piece.reasoning_left for piece in pieces if piece.finish_reason is None][-1] == 0, name
        assert pieces[-1].reasoning_tokens == int(name[1:])


@every_api
def test_a_deadline_ends_a_reply_as_it_is(setting, name):
    times = [0.0]
    if name == "engine":
        backend = setting.engine(clock=lambda: times[0])
    else:
        backend = setting.vllm(setting.stub(old=name == "old vLLM", step_seconds=0.01))
        backend._clock = lambda: times[0]
    params = SamplingParams(max_tokens=240, ignore_eos=True)
    backend.submit(Request("late", PROMPTS[0], params, timeout_seconds=5.0))
    backend.submit(Request("patient", PROMPTS[1], SamplingParams(max_tokens=60, ignore_eos=True)))
    while not any(piece.tokens for piece in backend.step() if piece.id == "late"):
        pass
    times[0] = 5.5
    pieces = stepped(backend)
    assert pieces["late"][-1].finish_reason == "deadline"
    assert pieces["patient"][-1].finish_reason == "length"


@every_backend
def test_new_weights_change_the_replies_and_their_version(setting, make_model, naive, name):
    backend = setting.backend(name)
    before = backend.run(requests())
    other = quiet(make_model(seed=7), setting.tokenizer)
    backend.load({key: value.detach() for key, value in other.named_parameters()})
    after = backend.run(requests())
    assert [done.version for done in (*before, *after)] == [0] * 3 + [1] * 3
    for prompt, done in zip(PROMPTS, after, strict=True):
        assert done.tokens == naive(other, prompt, NEW)["tokens"]
    odd = dict(other.named_parameters())
    odd["model.norm.weight"] = odd["model.norm.weight"][:-1]
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        backend.load(odd)


@every_api
def test_an_adapter_is_loaded_replaced_and_unloaded(setting, tmp_path, name):
    backend = setting.backend(name)
    folders = [adapter_in(tmp_path / f"adapter-{seed}", load_model(setting.folder), seed) for seed in (1, 2)]
    asked = [Request("r", PROMPTS[0], requests()[0].params, adapter="poet")]
    (refused,) = backend.run(asked)
    assert refused.finish_reason == "error"
    assert "poet" in refused.error
    texts = []
    for folder in folders:
        if name == "engine" and texts:
            backend.unload_adapter("poet")
        backend.load_adapter("poet", folder)
        texts.append(backend.run(asked)[0].tokens)
    plain = backend.run([Request("r", PROMPTS[0], requests()[0].params)])[0].tokens
    assert len({tuple(text) for text in (*texts, plain)}) == 3
    backend.unload_adapter("poet")
    assert backend.run(asked)[0].finish_reason == "error"


# ---------------------------------------------------------------- vLLM's API


def test_weights_are_taken_while_requests_wait_and_old_prefixes_are_forgotten(setting, make_model):
    stub = setting.stub(step_seconds=0.005)
    backend = setting.vllm(stub)
    backend.submit(Request("long", PROMPTS[0], SamplingParams(max_tokens=120, ignore_eos=True)))
    pieces = []
    while sum(len(piece.tokens) for piece in pieces) < 10:
        pieces += backend.step()
    backend.load(make_model(seed=3))
    assert stub.calls == ["pause", "collective_rpc", "reset_prefix_cache", "resume"]
    pieces += stepped(backend)["long"]
    versions = [piece.version for piece in pieces for _ in piece.tokens]
    assert len(versions) == 120
    assert versions == sorted(versions)
    assert set(versions) == {0, 1}


@pytest.mark.parametrize("old", [False, True])
def test_a_transfer_sends_while_the_server_receives(setting, old):
    stub = setting.stub(old=old)
    backend = setting.vllm(stub)
    sent = []
    backend.transfer({"names": ["a"], "shapes": [[1]]}, lambda: sent.append(threading.current_thread()))
    assert len(sent) == 1
    assert sent[0] is not threading.current_thread()
    assert stub.bodies[-1] == {"update_info": {"names": ["a"], "shapes": [[1]]}}
    begin, end = ([], []) if old else ([], ["finish_weight_update"])
    expected = [
        "pause",
        "start_weight_update",
        *begin,
        "update_weights",
        *end,
        "reset_prefix_cache",
        "resume",
    ]
    assert stub.calls == expected
    assert backend.version == 1
    with pytest.raises(OSError, match="no route"):
        backend.transfer({}, lambda: (_ for _ in ()).throw(OSError("no route")))
    assert stub.calls[-1] == "resume"
    assert not stub.paused


def test_closing_the_connection_is_what_cancels(setting):
    stub = setting.stub(step_seconds=0.005)
    backend = setting.vllm(stub)
    backend.submit(Request("long", PROMPTS[0], SamplingParams(max_tokens=240, ignore_eos=True)))
    while not backend.step():
        pass
    backend.abort("long")
    for _ in range(400):
        if stub.aborted:
            break
        threading.Event().wait(0.01)
    assert stub.aborted == ["cmpl-1"]
    assert stub.engine.num_running == 0


@pytest.mark.parametrize(
    ("breaking", "message"),
    [("cut", "ended the reply without a reason"), ("error", "EngineCore encountered an issue")],
)
def test_a_stream_that_breaks_off_is_an_error_of_that_request_alone(setting, breaking, message):
    stub = setting.stub()
    backend = setting.vllm(stub)
    stub.broken_after, stub.breaking = 3, breaking
    (done,) = backend.run(requests()[:1])
    assert done.finish_reason == "error"
    assert message in done.error
    assert len(done.tokens) == 3
    stub.broken_after = None
    assert backend.run(requests())[0].finish_reason == "length"


def test_a_server_that_goes_away_is_an_error_of_what_runs(setting):
    stub = setting.stub()
    backend = setting.vllm(stub)
    stub.server.shutdown()
    stub.server.server_close()
    done = backend.run(requests())
    assert [one.finish_reason for one in done] == ["error"] * 3
    assert "broke" in done[0].error
    with pytest.raises(RunError, match="is the server up"):
        backend.load_adapter("a", Path("b"))


def test_more_requests_than_connections_wait_their_turn(setting):
    backend = setting.vllm(setting.stub(), connections=2)
    asked = [Request(f"q{number}", [number + 1], requests()[0].params) for number in range(7)]
    for request in asked:
        backend.submit(request)
    assert backend.num_running + backend.num_waiting == 7
    assert backend.num_running <= 2
    waiting = backend.abort("q6")
    assert (waiting.tokens, waiting.finish_reason) == ([], "abort")
    assert stepped(backend).keys() == {f"q{number}" for number in range(6)}


def test_the_body_says_what_vllm_reads(setting):
    stub = setting.stub()
    backend = setting.vllm(stub)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    params = SamplingParams(
        max_tokens=3,
        stop=("end",),
        bad_ids=(8,),
        logit_bias=((7, 2.5),),
        grammar=Grammar(kind="json_schema", text=json.dumps(schema)),
        thinking_budget=0,
    )
    body = backend.dialect.body(Request("r", (1, 2), params, user="ann", priority=3, salt="s"))
    expected = {
        "model": NAME,
        "prompt": [1, 2],
        "stop": ["end"],
        "logit_bias": {"7": 2.5, "8": -100.0},
        "structured_outputs": {"json": schema},
        "thinking_token_budget": 0,
        "user": "ann",
        "priority": 3,
        "cache_salt": "s",
        "return_token_ids": True,
    }
    assert {key: body[key] for key in expected} == expected
    assert not {"echo", "logprobs"} & body.keys()
    plain = backend.dialect.body(Request("r", (1, 2), SamplingParams(max_tokens=3)))
    assert (
        not {"priority", "cache_salt", "user", "structured_outputs", "thinking_token_budget"} & plain.keys()
    )
    with pytest.raises(ModelError, match="min_thinking, which vLLM does not know"):
        backend.submit(Request("r", (1, 2), SamplingParams(max_tokens=3, min_thinking=2)))
    assert backend.num_running == 0


def test_what_a_server_lacks_is_named_with_the_remedy(setting):
    stub = setting.stub()
    with pytest.raises(ConfigError, match=r"does not serve 'big'; it serves tiny"):
        setting.vllm(stub, model="big")
    with pytest.raises(ConfigError, match="no shared folder"):
        setting.vllm(stub, shared=None).load(setting.model)
    with pytest.raises(ConfigError, match="need folder="):
        setting.vllm(stub, folder=None).load(dict(setting.model.named_parameters()))
    with pytest.raises(RunError, match="refused adapter 'gone'"):
        setting.vllm(stub).unload_adapter("gone")
    with pytest.raises(ConfigError, match="'localhost:1' is not one of a server"):
        Streams("localhost:1")
    with pytest.raises(ModelError, match="the backend no tokenizer to count with"):
        Vllm(stub.address).submit(Request("r", [1], SamplingParams(max_tokens=2, thinking_budget=1)))


# ---------------------------------------------------------------- llama.cpp


def test_llama_cpp_counts_what_was_in_its_cache(setting):
    backend = setting.llama_cpp()
    asked = [Request("r", list(range(1, 60)), requests()[0].params)]
    assert backend.run(asked)[0].num_cached_tokens == 0
    assert backend.run(asked)[0].num_cached_tokens >= 50


def test_llama_cpp_refuses_what_it_does_not_know(setting):
    backend = setting.llama_cpp()
    for field in (
        {"thinking_budget": 0},
        {"thinking_budget": 4},
        {"min_tokens": 2},
        {"prompt_logprobs": True},
    ):
        (done,) = backend.run([Request("r", [1], SamplingParams(max_tokens=4, **field))])
        assert done.finish_reason == "error"
        assert next(iter(field)) in done.error
    with pytest.raises(ConfigError, match="at its start only"):
        backend.load_adapter("poet", Path("poet"))


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
def test_llama_cpp_computes_with_our_file_what_we_compute_with_the_same_weights(
    tmp_path, make_model, tokenizer, naive, kind, sparse
):
    """Weights that the kind holds exactly: block values are small integers times a power of two."""
    pytest.importorskip("xllamacpp", exc_type=ImportError)
    experts = {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 64, "intermediate_size": 0}
    model = make_model(hidden_size=64, head_dim=16, **(experts if sparse else {"intermediate_size": 64}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                drawn = torch.randint(-7, 8, parameter.shape, generator=generator)
                drawn[..., ::32] = -8  # the scale of a block of q4_0
                parameter.copy_(drawn * 2.0**-5)
                if kind == "q8_0":
                    parameter.copy_(torch.randint(-126, 127, parameter.shape, generator=generator) * 2.0**-9)
                    parameter[..., ::32] = 127 * 2.0**-9
    quiet(model, tokenizer)
    save_model(model, tmp_path, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    tokenizer.save(tmp_path)
    backend = LlamaCpp(tmp_path, kind=kind, slots=2, positions=128, exact=True)
    try:
        done = backend.run(requests(logprobs=True))
    finally:
        backend.close()
    for prompt, one in zip(PROMPTS, done, strict=True):
        expected = naive(model, prompt, NEW)["tokens"]
        if kind in ("f32", "f16"):
            assert one.tokens == expected
        else:  # llama.cpp rounds activations to 8 bits, and a reply may part from ours where two tokens are close
            assert one.tokens[0] == expected[0]


# ---------------------------------------------------------------- the real one


def vllm_python():
    """An interpreter that has vLLM."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    return os.environ.get("VLLM_PYTHON")


def start_vllm(folder, sentence, log):
    command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", "8765", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    tags = {"reasoning_start_str": THINK, "reasoning_end_str": sentence}
    command += ["--reasoning-parser", "qwen3", "--reasoning-config", json.dumps(tags)]
    command += ["--enable-prompt-tokens-details"]
    allowed = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | allowed)


@pytest.mark.slow
@pytest.mark.skipif(
    vllm_python() is None, reason="vLLM is not installed; VLLM_PYTHON may name an interpreter with it"
)
def test_a_real_vllm_answers_as_our_engine_does(full_logprobs, make_model, tokenizer, naive, tmp_path):
    shape = {"hidden_size": 64, "head_dim": 32}  # vLLM's kernels on CPUs know no smaller heads
    setting = Setting(tmp_path, make_model, tokenizer, **shape)
    sentence = tokenizer.decode(encode_stop_sentence(tokenizer))
    with (tmp_path / "vllm.log").open("w") as log:
        server = start_vllm(setting.folder, sentence, log)
        try:
            backend = setting.vllm(type("At", (), {"address": "http://127.0.0.1:8765"}), start_seconds=400)
            check_replies(backend, setting, naive, full_logprobs)
            think = tokenizer.special(THINK)
            params = SamplingParams(max_tokens=100, thinking_budget=5, ignore_eos=True)
            asked = [Request("b", [5, 6, think], params)]
            (found,), (expected,) = backend.run(asked), setting.engine().run(asked)
            assert (found.tokens, found.forced) == (expected.tokens, expected.forced)
            assert found.num_reasoning_tokens == 5
            other = quiet(make_model(seed=7, **shape), tokenizer)
            backend.load(other)
            for prompt, done in zip(PROMPTS, backend.run(requests()), strict=True):
                assert done.tokens == naive(other, prompt, NEW)["tokens"]
                assert done.version == 1
        finally:
            server.terminate()
            server.wait()


def check_replies(backend, setting, naive, full_logprobs):
    done = backend.run(requests(logprobs=True, top_logprobs=2, prompt_logprobs=True))
    for prompt, one in zip(PROMPTS, done, strict=True):
        assert one.error is None
        assert one.tokens == naive(setting.model, prompt, NEW)["tokens"]
        assert one.logprobs == pytest.approx(full_logprobs(setting.model, prompt, one.tokens), abs=1e-4)
        assert one.prompt_logprobs[1:] == pytest.approx(
            full_logprobs(setting.model, prompt[:1], prompt[1:]), abs=1e-4
        )
        assert [len(top) for top in one.top_logprobs] == [2] * NEW
        assert [len(top) for top in one.prompt_top_logprobs] == [0] + [2] * (len(prompt) - 1)
    stop = done[0].tokens[4]
    params = SamplingParams(max_tokens=NEW, stop_ids=(stop,))
    (stopped,) = backend.run([Request("s", PROMPTS[0], params)])
    assert stopped.tokens == done[0].tokens[: done[0].tokens.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    long = Request("long", PROMPTS[0], SamplingParams(max_tokens=240, ignore_eos=True))
    backend.submit(long)
    while not backend.step():
        pass
    taken = backend.abort("long")
    assert taken.tokens == naive(setting.model, PROMPTS[0], len(taken.tokens))["tokens"]
    (refused,) = backend.run([Request("bad", [1], SamplingParams(max_tokens=3), adapter="nobody")])
    assert refused.finish_reason == "error"
    assert "nobody" in refused.error

import itertools
import json

import pytest
import torch

from pensar.base.errors import ConfigError, ModelError
from pensar.infer.engine import Completion
from pensar.infer.generation import DIRECT_DEFAULTS, GREEDY, THINKING_DEFAULTS, Defaults, read_generation
from pensar.infer.llm import LLM
from pensar.infer.native.library import available
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3, initialize
from pensar.model.weights import save_model
from pensar.text.chat import STOP_SENTENCE, encode_prompt
from pensar.text.conversation import Conversation, Message, ToolCall
from pensar.text.tokenizer import THINK, THINK_END

QUESTION = [{"role": "user", "content": "the mat?"}]


def scripted(tokenizer, chain):
    """A model whose next token depends on the last one alone: each token of `chain` is followed by the next."""
    size = tokenizer.vocab_size
    config = ModelConfig(
        vocab_size=size,
        hidden_size=size,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=2,
        max_positions=400,
    )
    model = Qwen3(config)
    initialize(model, 0)
    with torch.no_grad():
        for parameter in (
            *model.model.layers[0].self_attn.o_proj.parameters(),
            *model.model.layers[0].mlp.parameters(),
        ):
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.lm_head.weight[after, before] = 100.0
    return model


@pytest.fixture(scope="module")
def vocables(tokenizer):
    return [tokenizer.encode(text)[0] for text in ("the", " cat", " sat")]


@pytest.fixture
def open_llm(tokenizer, tmp_path):
    def make(chain):
        save_model(scripted(tokenizer, chain), tmp_path, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        tokenizer.save(tmp_path)
        return LLM(tmp_path)

    return make


@pytest.fixture
def llm(open_llm, tokenizer, vocables):
    """Says `<think>the cat</think> sat<|im_end|>` after a line feed."""
    [feed] = tokenizer.encode("\n")
    think, close = tokenizer.special(THINK), tokenizer.special(THINK_END)
    return open_llm([feed, think, vocables[0], vocables[1], close, vocables[2], tokenizer.eos_id])


def test_a_chat_reply_has_its_reasoning_apart_and_its_tokens_counted(llm, tokenizer):
    reply = llm.chat(QUESTION, max_tokens=20)
    assert (reply.reasoning_content, reply.content) == ("the cat", " sat")
    assert reply.finish_reason == "stop"
    assert reply.tool_calls == ()
    conversation = Conversation(messages=(Message(role="user", content="the mat?"),))
    assert reply.usage.prompt_tokens == len(encode_prompt(tokenizer, conversation))
    assert (reply.usage.completion_tokens, reply.usage.reasoning_tokens) == (6, 2)
    assert llm.chat(conversation) == llm.chat(conversation.messages, max_tokens=20) == reply


def test_a_thinking_budget_ends_the_reasoning_with_the_stop_sentence(llm):
    reply = llm.chat(QUESTION, thinking=True, thinking_budget=1)
    sentence, _, _ = STOP_SENTENCE.partition("</think>")
    assert reply.reasoning_content == ("the" + sentence).rstrip("\n")
    assert reply.usage.reasoning_tokens == 1
    assert reply.content.endswith(" sat")
    assert llm.chat(QUESTION, thinking_budget=0).usage.reasoning_tokens == 0
    assert llm.chat(QUESTION, thinking_budget=2) == llm.chat(QUESTION)


def test_thinking_off_ignores_a_budget(llm):
    reply = llm.chat(QUESTION, thinking=False, thinking_budget=0)
    assert reply == llm.chat(QUESTION, thinking=False)
    assert reply.usage.reasoning_tokens == 0


def test_a_stream_joined_equals_the_reply(llm):
    for options in ({}, {"thinking_budget": 1}, {"max_tokens": 2}):
        stream = llm.stream(QUESTION, **options)
        parts = {"reasoning": "", "content": ""}
        while True:
            try:
                delta = next(stream)
            except StopIteration as end:
                reply = end.value
                break
            parts[delta.kind] += delta.text
        assert reply == llm.chat(QUESTION, **options)
        assert (parts["reasoning"], parts["content"]) == (reply.reasoning_content or "", reply.content)
    stream = llm.stream(QUESTION)
    next(stream)
    stream.close()
    assert (llm.engine.num_running, llm.engine.num_waiting) == (0, 0)


def test_tools_come_back_as_calls(llm, tokenizer):
    request = llm._request(QUESTION, {"tools": [{"type": "function", "function": {"name": "add"}}]}, 0)
    assert "# Tools" in tokenizer.decode(request.tokens)
    call = tokenizer.encode('\n{"name": "add", "arguments": {"a": 1}}\n')
    tokens = [tokenizer.special("<tool_call>"), *call, tokenizer.special("</tool_call>"), tokenizer.eos_id]
    reply = llm._reply(
        request, Completion(tokens=tokens, logprobs=[], forced=[False] * len(tokens), finish_reason="stop")
    )
    assert reply.tool_calls == (ToolCall(name="add", arguments={"a": 1}),)
    assert (reply.content, reply.finish_reason) == ("", "tool_calls")


def test_a_batch_keeps_its_order_and_a_seed_its_reply(make_model, tokenizer, tmp_path):
    save_model(make_model(), tmp_path)
    tokenizer.save(tmp_path)
    llm = LLM(tmp_path, slots=3)
    questions = [[{"role": "user", "content": text}] for text in ("one", "two", "three", "the cat", "on")]
    replies = llm.chat_batch(questions, max_tokens=12, seed=5)
    assert len({reply.content for reply in replies}) > 1
    assert llm.chat(questions[0], max_tokens=12, seed=5) == replies[0]
    assert llm.chat_batch(questions, max_tokens=12, seed=5) == replies
    assert llm.chat_batch(questions, max_tokens=12, seed=6) != replies
    greedy = llm.chat_batch(questions, max_tokens=12, temperature=0.0)
    assert [llm.chat(question, max_tokens=12, temperature=0.0) for question in questions] == greedy


def test_generate_continues_tokens_and_score_gives_what_generate_reported(make_model, tokenizer, tmp_path):
    save_model(make_model(), tmp_path)
    tokenizer.save(tmp_path)
    llm = LLM(tmp_path)
    prompts = [[1, 2, 3], [9] * 40, [7]]
    completions = llm.generate(prompts, max_tokens=10, temperature=1.0, logprobs=True)
    whole = [[*prompt, *completion.tokens] for prompt, completion in zip(prompts, completions, strict=True)]
    for prompt, completion, scores in zip(prompts, completions, llm.score(whole), strict=True):
        assert len(scores) == len(prompt) + len(completion.tokens)
        assert scores[0] == 0
        assert scores[len(prompt) :] == pytest.approx(completion.logprobs, abs=1e-5)
    assert llm.score([[3]]) == [[0.0]]
    assert llm.score([]) == []


def test_scores_do_not_depend_on_how_the_work_is_cut(make_model, full_logprobs, monkeypatch):
    from pensar.infer.score import score

    model = make_model()
    sequences = [
        torch.randint(0, 320, (n,), generator=torch.Generator().manual_seed(n)).numpy()
        for n in (5, 80, 31, 2)
    ]
    monkeypatch.setattr("pensar.infer.score.MAX_BATCH_TOKENS", 100)
    monkeypatch.setattr("pensar.infer.score.MAX_LOGITS", 320 * 7)
    for tokens, scores in zip(sequences, score(model, sequences), strict=True):
        wanted = full_logprobs(model, tokens[:1].tolist(), tokens[1:].tolist())
        assert scores == pytest.approx([0.0, *wanted], abs=1e-5)


def test_sampling_defaults_follow_the_mode_and_the_models_file(llm, tmp_path):
    def defaults_for(**options):
        params = llm._request(QUESTION, options, 0).params
        return Defaults(params.temperature, params.top_p, params.top_k, params.min_p)

    assert defaults_for() == defaults_for(thinking=True) == THINKING_DEFAULTS
    assert defaults_for(thinking=False) == DIRECT_DEFAULTS
    assert defaults_for(thinking=False, temperature=0.0, top_k=0).temperature == 0.0
    flagged = [{"role": "user", "content": "hello /no_think"}]
    assert llm._request(flagged, {}, 0).params.temperature == DIRECT_DEFAULTS.temperature
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.3, "top_k": 5, "eos_token_id": 7}))
    changed = LLM(tmp_path)
    params = changed._request(QUESTION, {}, 0).params
    assert (params.temperature, params.top_k, params.top_p, params.stop_ids) == (0.3, 5, 0.95, (7,))
    path.write_text(json.dumps({"do_sample": False}))
    greedy = LLM(tmp_path).generation
    assert greedy.defaults(True) == greedy.defaults(False) == GREEDY


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ('{"temperature": "warm"}', "wrong type.*`float`, got `str`"),
        ('{"eos_token_id": ["end"]}', "wrong type.*`int`, got `str`"),
    ],
)
def test_a_broken_generation_file_is_explained(tmp_path, content, words):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=words):
        read_generation(tmp_path)


def test_messages_are_understood_in_openais_shape(llm):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "add"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    same = Conversation(
        messages=(
            Message(role="user", content="add"),
            Message(role="assistant", tool_calls=(ToolCall(name="add", arguments={"a": 1}, id="c1"),)),
            Message(role="tool", content="2", tool_call_id="c1"),
        )
    )
    assert llm._request(messages, {}, 0).tokens == llm._request(same, {}, 0).tokens


@pytest.mark.parametrize(
    ("messages", "options", "error", "words"),
    [
        ([], {}, ConfigError, "messages is empty"),
        ("hello", {}, ConfigError, r"messages\[0\] is 'h'"),
        ([{"role": "robot", "content": "x"}], {}, ConfigError, r"messages\[0\].*robot"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            {},
            ConfigError,
            "not JSON",
        ),
        (QUESTION, {"temprature": 1}, ConfigError, "unknown option 'temprature'"),
        (QUESTION, {"max_tokens": 0}, ModelError, "max_tokens 0"),
        (QUESTION, {"max_tokens": 4000}, ModelError, "max_tokens 4,000.*limit is 400"),
        ([{"role": "user", "content": "x" * 500}], {}, ModelError, "tokens and the context 400"),
        (QUESTION, {"thinking_budget": -5}, ModelError, "thinking_budget -5"),
    ],
)
def test_a_conversation_that_cannot_be_served_is_explained(llm, messages, options, error, words):
    with pytest.raises(error, match=words):
        llm.chat(messages, **options)
    assert llm.chat(QUESTION).content == " sat"


def test_scoring_more_than_the_context_is_explained(llm):
    with pytest.raises(ModelError, match="sequence 1 has 401 tokens, the model takes 400"):
        llm.score([[1], [1] * 401])
    with pytest.raises(ModelError, match="sequence 0 is empty"):
        llm.score([[]])


def test_a_tokenizer_larger_than_the_model_is_refused(make_model, tokenizer, tmp_path):
    save_model(make_model(vocab_size=100), tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ModelError, match="100 embeddings"):
        LLM(tmp_path)
    with pytest.raises(ModelError, match="not a folder"):
        LLM(tmp_path / "nothing")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(open_llm, tokenizer, vocables, streamed):
    llm = open_llm([*vocables, *tokenizer.encode(" on the mat"), tokenizer.eos_id])
    whole = llm.chat(QUESTION, max_tokens=20).content
    stop = whole[5:7]
    options = {"max_tokens": 20, "stop": [stop]}
    if streamed:
        deltas = list(llm.stream(QUESTION, **options))
        assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
        return
    reply = llm.chat(QUESTION, **options)
    assert reply.content == whole[: whole.index(stop)]
    assert reply.finish_reason == "stop"
    assert llm.chat(QUESTION, max_tokens=20, logit_bias={vocables[2]: 100.0}).content != whole


@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
def test_fewer_bits_and_guesses_are_options_of_the_front_door(
    open_llm, tokenizer, vocables, weights, tmp_path
):
    plain = open_llm([*vocables, tokenizer.eos_id])
    if not available():
        with pytest.raises(ConfigError, match="needs native kernels"):
            LLM(tmp_path, weights=weights)
        return
    fewer = LLM(tmp_path, weights=weights, lookup=True)
    assert fewer.chat(QUESTION, max_tokens=9).content == plain.chat(QUESTION, max_tokens=9).content
    assert fewer.engine.speculation is not None

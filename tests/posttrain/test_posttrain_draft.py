"""The draft head's stage: what it computes, that it learns, what its figures mean, and that a kill leaves no trace."""

from collections.abc import Callable, Sequence
from pathlib import Path

import killed
import msgspec
import numpy as np
import pytest
import torch

from pensar.base.errors import ConfigError, DataError
from pensar.base.files import files_under, read_jsonl, seed_of
from pensar.base.ranks import Crew, World
from pensar.base.stage import Runtime
from pensar.infer.drafts.head import HeadDrafts
from pensar.infer.drafts.proposer import Asked, States
from pensar.infer.engine import Engine
from pensar.infer.request import Ints
from pensar.infer.rollout import RolloutConfig, roll
from pensar.infer.rows import RunningRows
from pensar.infer.speculate import Speculation
from pensar.model.attention import Packed
from pensar.model.draft_head import DraftHead, initialize_head
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import load_model
from pensar.posttrain import draft
from pensar.posttrain.draft import DraftHeadConfig, Kept, acceptance, answers
from pensar.posttrain.unrolled import Replies, unroll
from pensar.recipe import load, stages
from pensar.tasks.task import Task
from pensar.text.packing import one_per_row
from pensar.text.sample import Sample
from pensar.text.tokenizer import Tokenizer
from pensar.train.optimizer import Optimizer
from tiny import SPARSE, tiny_model

MakeRuntime = Callable[[str], Runtime]
ROOT = Path(__file__).parent.parent.parent
CONFIG = DraftHeadConfig(
    steps=6,
    batch_size=4,
    queries="reinforcement",
    num_queries=8,
    held_out=4,
    checkpoint_every=2,
    window=24,
    rollout=RolloutConfig(max_tokens=24, temperature=0.8),
)


def samples() -> list[Sample]:
    """Two rows: a prompt and a reply, and two replies with something between."""
    generator = np.random.default_rng(0)
    marks = [[0, 0, 0, *[1] * 7], [0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]]
    return [
        Sample(tokens=generator.integers(0, 300, len(row)).astype(np.int32), ce=np.array(row, np.float32))
        for row in marks
    ]


def pair(window: int = 64, **changes: object) -> tuple[Qwen3, DraftHead]:
    model = tiny_model(**changes).double().eval().requires_grad_(requires_grad=False)
    head = DraftHead(model.config, window)
    initialize_head(head, 0)
    return model, head.double()


def one_by_one(
    model: Qwen3, head: DraftHead, tokens: Sequence[int], first: int, base: int, depth: int
) -> torch.Tensor:
    """The head's state after `depth` further guesses of a row that begins at `base`: plain causal attention over the
    model's states from `first` to `base`, then the head's own."""
    ids = torch.tensor([list(tokens)])
    states = model(ids, torch.arange(len(tokens))[None], Packed())[:, first : base + 1]
    for _ in range(depth + 1):
        stop = first + states.shape[1]
        positions = torch.arange(first, stop)[None]
        out = head(model, ids[:, first + 1 : stop + 1], states, positions, Packed())
        states = torch.cat((states, out[:, -1:]), 1)
    return states[0, -1]


# ---------------------------------------------------------------- the unrolled head


def test_every_row_of_guesses_is_what_it_would_be_alone() -> None:
    model, head = pair()
    replies = Replies.of(one_per_row(samples()))
    hidden = replies.hidden(model)
    checked = 0
    with torch.no_grad():
        for depth, states in enumerate(unroll(model, head, replies, hidden, 4)):
            for row, first in ((0, 2), (1, 0), (1, 6)):
                number = replies.entries_BT[row, first]
                for at in range(first + depth, replies.entries_BT.shape[1]):
                    if replies.entries_BT[row, at] == number and replies.guessed(depth)[row, at]:
                        alone = one_by_one(model, head, samples()[row].tokens, first, at - depth, depth)
                        torch.testing.assert_close(states[row, at], alone, rtol=1e-9, atol=1e-9)
                        checked += 1
    assert checked == sum(int(replies.guessed(depth).sum()) for depth in range(4)) == 14 + 11 + 8 + 5


def test_nothing_beyond_the_window_is_looked_back_on() -> None:
    model, head = pair(window=3)
    replies = Replies.of(one_per_row(samples()))
    hidden = replies.hidden(model)
    changed = hidden.clone()
    changed[0, 4] += 1.0
    with torch.no_grad():
        for depth, (states, others) in enumerate(
            zip(
                unroll(model, head, replies, hidden, 3), unroll(model, head, replies, changed, 3), strict=True
            )
        ):
            differs = (states[0] - others[0]).abs().amax(-1) > 1e-12
            # Rows of guesses that begin at 4 or up to 2 positions later, whose own states hand it on.
            expected = [4 <= at - depth < 4 + 3 for at in range(differs.shape[0])]
            inside = replies.guessed(depth)[0].tolist()
            assert [d for d, i in zip(differs.tolist(), inside, strict=True) if i] == [
                e for e, i in zip(expected, inside, strict=True) if i
            ]


@pytest.mark.parametrize("changes", [{}, {"tied": False}, SPARSE], ids=["tied", "untied", "mixture"])
def test_the_loss_is_the_divergence_and_the_tokens_surprise(changes: dict[str, object]) -> None:
    model, head = pair(**changes)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = msgspec.structs.replace(CONFIG, depths=3, decay=0.5, token_weight=0.25)
    batch = one_per_row(samples())
    replies = Replies.of(batch)
    hidden = replies.hidden(model)
    losses, divergences = [], []
    with torch.no_grad():
        for depth, states in enumerate(unroll(model, head, replies, hidden, 3)):
            rows, at = replies.guessed(depth).nonzero(as_tuple=True)
            p = torch.distributions.Categorical(logits=model.logits(hidden[rows, at + 1]))
            q = torch.distributions.Categorical(logits=model.logits(states[rows, at]))
            divergences.append(float(torch.distributions.kl_divergence(p, q).mean()))
            losses.append(divergences[-1] - 0.25 * float(q.log_prob(replies.tokens_BT[rows, at + 2]).mean()))
    metrics = draft.train_step(model, head, Optimizer(head, config.optimizer), [batch], 1.0, World(), config)
    expected = (losses[0] + 0.5 * losses[1] + 0.25 * losses[2]) / 1.75
    assert metrics["loss"] == pytest.approx(expected, rel=1e-6)
    assert [metrics[f"divergence/{n}"] for n in (1, 2, 3)] == pytest.approx(divergences, rel=1e-6)
    assert metrics["tokens"] == 23
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the model is frozen"


def test_gradients_flow_through_the_head_s_own_states() -> None:
    model, head = pair()
    replies = Replies.of(one_per_row(samples()))
    hidden = replies.hidden(model).requires_grad_()
    states = list(unroll(model, head, replies, hidden, 2))[1]
    states[0, 6].sum().backward()
    assert hidden.grad is not None
    reached = hidden.grad[0].abs().amax(-1) > 0
    assert reached.nonzero().flatten().tolist() == [2, 3, 4, 5], "the state at 6 is the head's own"


# ---------------------------------------------------------------- the stage


def trained(
    school: Path, tasks: Path, out: Path, runtime: Runtime, config: DraftHeadConfig = CONFIG
) -> dict[str, object]:
    out.mkdir(exist_ok=True)
    return draft.run(config, {"model": school, "tasks": tasks}, out, runtime)


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in files_under(folder).items()}


def test_a_killed_stage_goes_on_to_the_very_same_bytes(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = trained(school, guesses, tmp_path / "whole", runtime("whole"))
    with monkeypatch.context() as patch:
        killed.at_step(patch, draft, 5)
        with pytest.raises(killed.Killed):
            trained(school, guesses, tmp_path / "cut", runtime("cut"))
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    trained(school, guesses, tmp_path / "cut", runtime("cut"))
    whole = bytes_under(tmp_path / "whole")
    assert whole == bytes_under(tmp_path / "cut")
    assert set(whole) == {"draft_head.safetensors", "draft_head.json", "acceptance.json", "metrics.jsonl"}
    kept = msgspec.json.decode(whole["acceptance.json"], type=Kept)
    assert counts == {"queries": 8, "steps": 6, "tokens_per_pass": kept.tokens_per_pass}
    head = DraftHead.load(tmp_path / "whole", load_model(school))
    assert head.window == 24
    assert not any(p.isnan().any() for p in head.parameters())


def test_two_ranks_make_the_head_of_one(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    trained(school, guesses, tmp_path / "one", runtime("one"))
    with Crew(ranks=2, threads=1) as crew:
        trained(school, guesses, tmp_path / "two", Runtime(logs=tmp_path / "two-logs", crew=crew))
    one, two = (list(read_jsonl(tmp_path / name / "metrics.jsonl", dict)) for name in ("one", "two"))
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        assert [right[key] for key in left] == pytest.approx(list(left.values()), rel=1e-3, abs=1e-5)
    first, second = (
        msgspec.json.decode((tmp_path / name / "acceptance.json").read_bytes(), type=Kept)
        for name in ("one", "two")
    )
    assert first.tried == second.tried


def test_the_head_learns_and_its_figure_is_what_an_engine_keeps(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    """The engine draws every token by a pass of its own; the head's guesses at each are compared with what came."""
    config = msgspec.structs.replace(CONFIG, steps=60, measured=3)
    model, tokenizer = load_model(school), Tokenizer.load(school)
    tasks = list(read_jsonl(guesses / "train" / "reinforcement.jsonl", Task))[:12]
    seeds = [seed_of(config.seed, "draft head", i) for i in range(12)]
    rollouts = answers(model, tokenizer, tasks, seeds, config.rollout, World())[8:]
    untrained = DraftHead(model.config, config.window)
    initialize_head(untrained, config.seed)
    before = acceptance(model, untrained, rollouts, seeds[8:], config, World())
    trained(school, guesses, tmp_path / "out", runtime("out"), config)
    after = msgspec.json.decode((tmp_path / "out" / "acceptance.json").read_bytes(), type=Kept)
    assert after.tokens_per_pass > before.tokens_per_pass + 0.2
    assert after.tokens_per_pass == pytest.approx(1 + sum(after.kept) / after.passes, abs=1e-4)
    rows = list(read_jsonl(tmp_path / "out" / "metrics.jsonl", dict))
    assert np.mean([row["divergence"] for row in rows[-5:]]) < 0.5 * rows[0]["divergence"]

    head = DraftHead.load(tmp_path / "out", model)
    watched = Watched(HeadDrafts(head, model))
    by_engine = engine_counts(watched, model, tokenizer, tasks[8:], seeds[8:], config.rollout)
    assert by_engine == (after.tried, after.kept)


class Watched:
    """Hands on to a head what an engine says, notes its guesses, and makes none itself."""

    wants_states = True

    def __init__(self, head: HeadDrafts) -> None:
        self.head = head
        self.guesses: dict[tuple[str, int], list[int]] = {}

    def propose(self, asked: Asked) -> list[Ints]:
        found = self.head.propose(asked)
        for row, guess in zip(asked.chosen.tolist(), found, strict=True):
            name, total = asked.rows.requests[row].id, len(asked.rows.text(row))
            self.guesses[name, total] = guess.tolist()
        return [guess[:0] for guess in found]

    def observe(self, rows: RunningRows, states: Sequence[States]) -> None:
        self.head.observe(rows, states)

    def forget(self, name: str) -> None:
        self.head.forget(name)


def engine_counts(
    watched: Watched,
    model: Qwen3,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    rollout: RolloutConfig,
) -> tuple[list[int], list[int]]:
    """Rows of up to 3 guesses by their lengths, and those that became the reply, as an engine makes them."""
    engine = Engine(model, tokenizer, slots=3)
    engine.speculation = Speculation(watched, 3, adaptive=False)
    tried, kept = [0, 0, 0], [0, 0, 0]
    for index, replied in enumerate(roll(engine, tokenizer, tasks, rollout, seeds)):
        for (name, total), guess in watched.guesses.items():
            if name != str(index):
                continue
            came = replied.tokens[total : total + 3]
            for place in range(min(3, len(came))):
                tried[place] += 1
                kept[place] += guess[: place + 1] == came[: place + 1]
    return tried, kept


def test_what_cannot_be_trained_is_told(
    school: Path, guesses: Path, tmp_path: Path, runtime: MakeRuntime
) -> None:
    many = msgspec.structs.replace(CONFIG, held_out=12)
    with pytest.raises(DataError, match="has 12 queries, 12 are held out"):
        trained(school, guesses, tmp_path / "out", runtime("out"), many)
    with pytest.raises(ConfigError, match="depths 0"):
        DraftHeadConfig(depths=0)
    with pytest.raises(ConfigError, match="a stop sentence is nothing to be guessed"):
        DraftHeadConfig(rollout=RolloutConfig(thinking_budget=5))


def test_a_recipe_has_the_stage_where_it_asks_for_one() -> None:
    path = ROOT / "recipes" / "tiny.yaml"
    plain = {stage.name for stage in stages(load(path))}
    asked = {stage.name: stage for stage in stages(load(path, ["draft_head.steps=50"]))}
    assert asked.keys() - plain == {"draft-head"}
    assert asked["draft-head"].inputs == {"model": "general-rl", "tasks": "tasks"}
    assert asked["draft-head"].config.seed == load(path).seed

"""A made-up run folder, as a recipe leaves it: for looking at the page, and for testing it."""

import math
import random
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.files import write_jsonl
from pensar.base.manifest import InputEntry, Manifest, Timings, folder_name, list_files, write_manifest
from pensar.data.language import language_table

STAGES: dict[str, tuple[str, ...]] = {
    "demo": (),
    "sources": ("demo",),
    "extract": ("sources",),
    "language": ("extract",),
    "filter": ("language",),
    "dedup": ("filter",),
    "tasks": (),
    "decontaminate": ("dedup", "tasks"),
    "annotate": ("decontaminate",),
    "mixture": ("annotate",),
    "tokenizer": ("annotate", "mixture"),
    "shards": ("annotate", "mixture", "tokenizer"),
    "pretrain-general": ("shards", "tokenizer"),
    "pretrain-reasoning": ("shards", "tokenizer", "pretrain-general"),
    "pretrain-long": ("shards", "tokenizer", "pretrain-reasoning"),
    "cold-start": ("pretrain-long", "tasks"),
    "reasoning-rl": ("cold-start", "tasks"),
    "fusion": ("reasoning-rl", "tasks"),
    "general-rl": ("fusion", "tasks"),
    "student-pretrain": ("shards", "tokenizer"),
    "student": ("student-pretrain", "tasks", "general-rl"),
    "student-rl": ("student", "tasks"),
    "student-distilled": ("student", "tasks", "general-rl"),
    "evaluate": (
        "tasks", "shards", "pretrain-reasoning", "pretrain-long", "cold-start", "reasoning-rl", "fusion", "general-rl",
        "student", "student-rl", "student-distilled",
    ),
}  # fmt: skip
SECONDS = {
    "demo": 6.2, "sources": 3.9, "extract": 11.4, "language": 2.8, "filter": 4.1, "dedup": 9.3, "tasks": 5.0,
    "decontaminate": 3.3, "annotate": 4.8, "mixture": 0.7, "tokenizer": 7.2, "shards": 3.1, "pretrain-general": 148.0,
    "pretrain-reasoning": 61.0, "pretrain-long": 44.0, "cold-start": 21.0, "reasoning-rl": 88.0, "fusion": 26.0,
    "general-rl": 47.0, "student-pretrain": 31.0, "student": 12.0, "student-rl": 39.0, "student-distilled": 17.0,
    "evaluate": 71.0,
}  # fmt: skip
LOSSES = {
    "pretrain-general": (8.31, 2.42, 420, 4096), "pretrain-reasoning": (2.2, 1.31, 180, 4096),
    "pretrain-long": (1.5, 1.22, 90, 4096), "cold-start": (0.9, 0.21, 120, 2600), "fusion": (0.35, 0.12, 120, 2800),
    "student-pretrain": (8.3, 2.9, 120, 4096), "student": (1.1, 0.34, 120, 2400),
}  # fmt: skip
REWARDS = {"reasoning-rl": (0.24, 0.985, 40), "general-rl": (0.61, 0.97, 30), "student-rl": (0.33, 0.71, 30)}
FAMILIES = ("last_digit", "chain_sum", "sort_letters", "parity")
FUNNEL: dict[str, tuple[int, dict[str, int]]] = {
    "demo": (3120, {}),
    "sources": (3120, {"too_large": 1, "truncated_member": 1}),
    "extract": (3118, {"no_text": 9, "broken_pdf": 1, "invalid_utf8": 3}),
    "language": (3105, {}),
    "filter": (3105, {"min_words": 61, "max_repeated_lines": 28, "min_letters": 12, "max_symbols": 9, "stop_words": 4}),
    "dedup": (2991, {"near_duplicate": 143, "exact_duplicate": 67}),
    "decontaminate": (2781, {"contains_item_ngram": 22, "contains_whole_item": 5}),
    "annotate": (2754, {"educational_value": 118, "unsafe": 2}),
    "mixture": (2634, {}),
    "shards": (2634, {}),
}  # fmt: skip


def make_run(root: Path, until: str = "evaluate", hostile: str = "") -> Path:
    """A run's folder with every stage up to `until`; `hostile` is put where a run holds foreign text."""
    folders: dict[str, tuple[str, str]] = {}
    for number, (stage, inputs) in enumerate(STAGES.items()):
        fingerprint = f"{number + 17:02x}a9c4e1b7d2" * 6
        folder = root / folder_name(stage, fingerprint[:64])
        folder.mkdir(parents=True)
        _content(stage, folder, root / "logs" / folder.name, hostile)
        write_manifest(folder, _manifest(stage, fingerprint[:64], inputs, folders, folder, number, hostile))
        folders[stage] = folder.name, fingerprint[:64]
        if stage == until:
            break
    return root


def _manifest(
    stage: str,
    fingerprint: str,
    inputs: tuple[str, ...],
    folders: dict[str, tuple[str, str]],
    folder: Path,
    number: int,
    hostile: str,
) -> Manifest:
    entries = {
        name: InputEntry(stage=name, fingerprint=folders[name][1], folder=folders[name][0]) for name in inputs
    }
    minutes, seconds = divmod(int(sum(list(SECONDS.values())[: number + 1])), 60)
    timings = Timings(
        seconds=SECONDS[stage],
        cpu_seconds=SECONDS[stage] * 1.84,
        peak_memory_bytes=int((380 + 9 * SECONDS[stage] ** 0.8) * 2**20),
        ranks=2,
        resumed=stage == "dedup",
        finished=f"2026-05-04T10:{minutes:02d}:{seconds:02d}.{number:03d}+00:00",
    )
    return Manifest(
        stage=stage,
        revision=1,
        fingerprint=fingerprint,
        inputs=entries,
        config=_config(stage, hostile),
        outside={},
        files=list_files(folder),
        counts=_counts(stage, hostile),
        versions={
            "python": "3.11.9",
            "pensar": "0.1.0",
            "torch": "2.13.0+cpu",
            "numpy": "2.3.1",
            "tokenizers": "0.22.1",
        },
        timings=timings,
    )


def _config(stage: str, hostile: str) -> dict[str, Any]:
    if stage in LOSSES:
        return {
            "steps": LOSSES[stage][2],
            "optimizer": {"lr": 0.02, "muon": True},
            "mixture": "general",
            "seed": 3,
        }
    return (
        {"note": hostile, "sources": [{"name": "web", "path": "demo:web/*.warc.gz"}]}
        if stage == "sources"
        else {"seed": 3}
    )


def _counts(stage: str, hostile: str) -> dict[str, Any]:
    if stage in FUNNEL:
        documents, dropped = FUNNEL[stage]
        if hostile and stage == "sources":
            dropped = {**dropped, hostile: 2}
        counts: dict[str, Any] = {
            "documents_in": documents,
            "documents_out": documents - sum(dropped.values()),
            "bytes_in": documents * 3700,
            "bytes_out": (documents - sum(dropped.values())) * 3650,
            "dropped": dropped,
        }
        if stage in ("language", "filter", "dedup", "decontaminate", "annotate"):
            counts["languages"] = _languages(hostile)
        if stage == "shards":
            counts["tokens"] = 2_310_442
        return counts
    if stage in LOSSES:
        counts = {
            "steps": LOSSES[stage][2],
            "tokens": LOSSES[stage][2] * LOSSES[stage][3],
            "parameters": 1_246_976,
        }
        if stage == "cold-start":
            dropped = {"query: solved without reasoning": 212, "response: wrong answer": 171,
                       "response: guesswork": 160,
                       "response: repetition": 94, "response: thinking and answer disagree": 101}  # fmt: skip
            counts = {"queries": 1500, "examples": 1838, "dropped": dropped, "steps": 120}
        if stage == "fusion":
            counts = {"queries": 1200, "examples": 2040, "rejected": 31, "steps": 120}
        return counts
    return {"rollouts": 10240} if stage in REWARDS else {}


def _languages(hostile: str) -> dict[str, int]:
    rng = random.Random(5)
    rows = {language.code: rng.choice((3, 3, 3, 4, 8)) for language in language_table()[:99]}
    return {**rows, "eng_Latn": 2140, "und": 6, **({hostile: 1} if hostile else {})}


def _content(stage: str, folder: Path, logs: Path, hostile: str) -> None:
    rng = random.Random(stage)
    rows: list[dict[str, float]] = []
    if stage in LOSSES:
        high, low, steps, tokens = LOSSES[stage]
        for step in range(steps):
            loss = low + (high - low) * math.exp(-6 * step / steps) + rng.gauss(0, 0.015 * low)
            rows.append({"step": step, "loss": loss, "gradient_norm": 0.7, "tokens": tokens, "lr": 0.01})
    elif stage in REWARDS:
        rows = [_reward_row(stage, step, rng) for step in range(REWARDS[stage][2])]
    elif stage == "student-distilled":
        for step in range(30):
            divergence = 0.62 * math.exp(-step / 9) + 0.02 + rng.gauss(0, 0.004)
            reward = 0.33 + 0.6 * (1 - math.exp(-step / 7)) + rng.gauss(0, 0.02)
            rows.append({"step": step, "divergence": divergence, "reward": min(1, reward), "tokens": 1900})
    if rows:
        write_jsonl(folder / "metrics.jsonl", rows)
        seconds = SECONDS[stage] * 0.9 / len(rows)
        write_jsonl(logs / "timings.jsonl", [{"step": row["step"], "seconds": seconds} for row in rows])
    if stage == "evaluate":
        (folder / "results.json").write_bytes(msgspec.json.encode(results(hostile)))


def _reward_row(stage: str, step: int, rng: random.Random) -> dict[str, float]:
    first, last, steps = REWARDS[stage]
    rise = 1 / (1 + math.exp(-9 * (step / steps - 0.4)))
    row = {
        "step": step,
        "policy_loss": rng.gauss(0, 0.01),
        "tokens": 9800.0,
        "length": 18 + 14 * rise + rng.gauss(0, 0.5),
    }
    for number, family in enumerate(FAMILIES):
        own = first + (last - first) * rise ** (0.6 + 0.45 * number) + rng.gauss(0, 0.015)
        row[f"reward/{family}"] = min(1.0, max(0.0, own))
    row["reward"] = sum(row[f"reward/{family}"] for family in FAMILIES) / len(FAMILIES)
    row["entropy"] = 0.34 - 0.19 * rise + rng.gauss(0, 0.006)
    return row


def _scored(score: float, n: int = 300) -> dict[str, Any]:
    half = 1.96 * math.sqrt(max(score * (1 - score), 0.002) / n)
    return {"score": score, "low": max(0.0, score - half), "high": min(1.0, score + half), "n": n}


def results(hostile: str = "") -> dict[str, Any]:
    """What the evaluation writes."""
    return {
        "stage_table": _stage_table(),
        "budget_curve": [
            {"budget": budget, "accuracy": values.pop("score"), **values}
            for budget, values in (
                (b, _scored(0.343 + 0.635 / (1 + math.exp(-(b - 17) / 5.2)), 300))
                for b in (0, 4, 8, 12, 16, 20, 24, 32, 40, 48)
            )
        ],
        "budget_references": {"non_thinking": 0.353, "thinking": 0.983},
        "rl_against_distillation": [
            _method("off-policy distillation", "student", 0.412, 0.86, 0, 0.0),
            _method("+ reinforcement learning", "student-rl", 0.668, 0.87, 7680, 4.4e12),
            _method("+ on-policy distillation", "student-distilled", 0.902, 0.98, 1920, 1.3e12),
        ],
        "think_follow": _scored(0.993),
        "long_context": [
            {"after_stage": stage, "benchmark": name, "length_tokens": length, **values}
            for stage, name, length, values in (
                (
                    "pretrain-reasoning",
                    "bits_per_byte",
                    1024,
                    {"score": 1.713, "low": 1.66, "high": 1.77, "n": 48},
                ),
                ("pretrain-reasoning", "recall", 981.4, _scored(0.07, 100)),
                (
                    "pretrain-long",
                    "bits_per_byte",
                    1024,
                    {"score": 1.482, "low": 1.43, "high": 1.53, "n": 48},
                ),
                ("pretrain-long", "recall", 981.4, _scored(0.91, 100)),
            )
        ],
        "validation": [
            {"stage": "cold-start", **_scored(0.243), **_passes(0.26, 0.96)},
            {"stage": "reasoning-rl", **_scored(0.987), **_passes(0.97, 0.98)},
        ],
        "conversations": _conversations(hostile),
    }


def _passes(one: float, many: float) -> dict[str, Any]:
    return {
        "pass_at_1": one, "pass_at_1_low": one - 0.05, "pass_at_1_high": min(1, one + 0.05), "pass_at_k": many,
        "pass_at_k_low": many - 0.04, "pass_at_k_high": min(1.0, many + 0.04), "k": 64,
    }  # fmt: skip


def _method(method: str, stage: str, one: float, many: float, samples: int, flops: float) -> dict[str, Any]:
    return {"method": method, "stage": stage, **_passes(one, many), "samples": samples, "cost_flops": flops}


def _stage_table() -> list[dict[str, Any]]:
    scores = {
        "reasoning": {"thinking": (0.24, 0.981, 0.972, 0.983), "non-thinking": (0.2, 0.187, 0.347, 0.353)},
        "instructions": {"thinking": (0.31, 0.33, 0.74, 0.96), "non-thinking": (0.28, 0.29, 0.77, 0.97)},
        "tools": {"thinking": (0.02, 0.0, 0.62, 0.94), "non-thinking": (0.0, 0.0, 0.58, 0.91)},
        "think_follow": {"flags": (0.49, 0.5, 0.887, 0.993)},
    }
    rows = []
    for place, stage in enumerate(("cold-start", "reasoning-rl", "fusion", "general-rl")):
        for benchmark, modes in scores.items():
            for mode, values in modes.items():
                score = values[place]
                families = {family: min(1.0, score + 0.01 * n) for n, family in enumerate(FAMILIES)}
                row = {"benchmark": benchmark, "after_stage": stage, "mode": mode, **_scored(score)}
                tokens = 4.0 if mode == "non-thinking" else 27.3
                rows.append(
                    {**row, "families": families if benchmark == "reasoning" else {}, "tokens": tokens}
                )
    return rows


def _conversations(hostile: str) -> list[dict[str, Any]]:
    thought = "7+5=12>2 2*3=6>6 6+8=14>4"
    call = {"name": "add", "arguments": {"a": 17, "b": 25}}
    return [
        {"title": "reasoning: last_digit", "mode": "thinking", "score": 1.0, "messages": [
            {"role": "user", "content": f"Last digit, left to right: 7+5*3+8 {hostile}"},
            {"role": "assistant", "content": "4", "reasoning_content": f"{thought}{hostile}"}]},
        {"title": "reasoning: last_digit", "mode": "non-thinking", "score": 0.0, "messages": [
            {"role": "user", "content": "Last digit, left to right: 7+5*3+8"},
            {"role": "assistant", "content": "6"}]},
        {"title": "think_follow: flags", "mode": "flags", "score": 1.0, "messages": [
            {"role": "user", "content": "Sort the letters: qwerty /think"},
            {"role": "assistant", "content": "eqrtwy", "reasoning_content": "e<q<r<t<w<y"},
            {"role": "user", "content": "And these: zebra /no_think"},
            {"role": "assistant", "content": "aberz"}]},
        {"title": "tools: add", "mode": "thinking", "score": 1.0, "messages": [
            {"role": "system", "content": "You can call tools."},
            {"role": "user", "content": "What is 17 + 25?"},
            {"role": "assistant", "content": hostile, "reasoning_content": "a sum, so the tool", "tool_calls": [call]},
            {"role": "tool", "content": "42", "name": "add"},
            {"role": "assistant", "content": "42"}]},
    ]  # fmt: skip

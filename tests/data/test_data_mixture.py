"""Labels and weights: rules by hand, formulas against plain Python, caps and held-out documents."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars
import pytest

from pensar.base.errors import ConfigError, DataError
from pensar.base.stage import Runtime
from pensar.data import annotate, mixture
from pensar.data.annotate import AnnotateConfig
from pensar.data.documents import read_documents, read_dropped
from pensar.data.mixture import Labels, Mixture, MixtureConfig, capped, mix, score
from pensar.text.document import Document

Make = Callable[..., Document]
LESSON = (
    "A prime number is a number that is divided by one and itself only. For example, seven is prime. "
    "Because every number is a product of primes, the theorem is called fundamental.\n\n"
) + "\n\n".join(f"Therefore the sum of {n} and its equation follows, step by step." for n in range(8))


def row(name: str, tokens: int = 100, **fields: object) -> Labels:
    labels = {"source": "s", "language": "eng_Latn", "kind": "text", "educational": 3, "difficulty": 2}
    labels |= {"domain": "web", "field": "general"}
    return Labels(id=name, tokens=tokens, **(labels | fields))


def test_labels_follow_their_rules(make: Make) -> None:
    lesson = make(
        LESSON,
        marks={"ended_line_share": 1.0, "compression": 0.6, "repeated_line_share": 0.0, "format": "pdf"},
    )
    annotate.annotate(lesson)
    assert lesson.marks["educational"] == 5
    assert lesson.marks["field"] == "mathematics"
    assert (lesson.marks["domain"], lesson.marks["safety"]) == ("print", "safe")
    code = make('def f(x):\n    """Adds."""\n    # reason\n    return x + 1\n', kind="code")
    annotate.annotate(code)
    assert (code.marks["field"], code.marks["domain"], code.marks["educational"]) == ("computing", "code", 4)
    task = make("3+4\n7", kind="task", marks={"domain": "facts"})
    annotate.annotate(task)
    assert (task.marks["domain"], task.marks["tokens"]) == ("facts", 3)
    empty = make("...")
    annotate.annotate(empty)
    assert (empty.marks["educational"], empty.marks["difficulty"]) == (0, 1)


def test_unsafe_and_worthless_documents_can_be_dropped(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    documents = [
        make(LESSON, "lesson"),
        make("casino jackpot casino betting now " * 5, "spam"),
        make("bla " * 9, "poor"),
    ]
    config = AnnotateConfig(min_educational=1)
    counts = annotate.run(config, {"documents": store(documents)}, tmp_path / "out", runtime)
    assert [document.locator for document in read_documents(tmp_path / "out")] == ["lesson"]
    assert {row.document.locator: row.reason for row in read_dropped(tmp_path / "out")} == {
        "spam": "unsafe",
        "poor": "educational_value",
    }
    assert counts["labels"]["safety"] == {"safe": 2, "unsafe": 1}


def test_a_weight_is_exp_of_theta_times_features() -> None:
    labels = [row("a", educational=5), row("b", educational=0), row("c", kind="task", educational=4)]
    theta = {"educational": 1.5, "kind:task": 0.7}
    plain = [math.exp(1.5 * r.educational / 5 + (0.7 if r.kind == "task" else 0)) for r in labels]
    expected = [w * 300 / (100 * sum(plain)) for w in plain]
    weights = mix(labels, Mixture(theta=theta, language_temperature=1.0))
    assert weights.tolist() == pytest.approx(expected)
    assert score(row("d", tokens=4_000), {"length": 0.5}) == pytest.approx(1.0)


def test_language_temperature_makes_shares_follow_a_power() -> None:
    labels = [row(f"e{i}") for i in range(90)] + [row(f"p{i}", language="por_Latn") for i in range(10)]
    weights = mix(labels, Mixture(language_temperature=0.3, max_epochs=100.0))
    english, portuguese = weights[:90].sum(), weights[90:].sum()
    assert portuguese / english == pytest.approx((10 / 90) ** 0.3)
    assert (weights * 100).sum() == pytest.approx(100 * 100)


def test_capping_keeps_the_total_and_the_order() -> None:
    rng = np.random.default_rng(0)
    raw, tokens = rng.exponential(size=200) ** 3, rng.integers(1, 1_000, 200).astype(float)
    weights = capped(raw, tokens, 4.0)
    assert weights.max() <= 4.0
    assert (weights * tokens).sum() == pytest.approx(tokens.sum())
    assert (np.argsort(weights, kind="stable")[:100] == np.argsort(raw, kind="stable")[:100]).all()


def test_mixtures_are_written_and_held_out_documents_have_no_weight(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    documents = [make(f"{LESSON} {n}", str(n)) for n in range(200)]
    annotate.run(AnnotateConfig(), {"documents": store(documents)}, tmp_path / "labels", runtime)
    config = MixtureConfig(held_out=0.1)
    counts = mixture.run(config, {"documents": tmp_path / "labels"}, tmp_path / "out", runtime)
    general = polars.read_parquet(tmp_path / "out" / "mixture-general.parquet")
    held_out = polars.read_parquet(tmp_path / "out" / "mixture-held_out.parquet")
    assert general["id"].to_list() == held_out["id"].to_list()
    assert ((general["weight"] > 0) ^ (held_out["weight"] > 0)).all()
    assert 5 <= counts["held_out"] <= 40
    assert general["cell"][0].startswith("und/text/")
    summary = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert set(summary) == {"general", "reasoning", "long", "held_out"}
    assert sum(summary["general"]["shares"]["kind"].values()) == pytest.approx(1.0, abs=1e-3)


def test_mixtures_that_cannot_be_meant_are_refused(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    for config, message in (
        (MixtureConfig(held_out=1.0), "held_out is 1.0; it is a share"),
        (
            MixtureConfig(mixtures={"general": Mixture(theta={"quality": 1.0})}),
            "'quality'; a feature is one of",
        ),
        (MixtureConfig(mixtures={"general": Mixture(max_epochs=0.5)}), "max_epochs is 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            mixture.check(config)
    unlabelled = store([make(LESSON)], name="unlabelled")
    with pytest.raises(DataError, match="has no labels; mix what the annotate stage wrote"):
        mixture.run(MixtureConfig(), {"documents": unlabelled}, tmp_path / "out", runtime)

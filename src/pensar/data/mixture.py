"""The stage that decides how often each document is read: a weight per document and pre-training stage.

Documents are mixed at the level of the instance, by their labels. The report says that Qwen3 does so but not how;
this form is ours: weight = exp(theta . features) times a language temperature, scaled so that one pass over the
mixture is as long as the corpus, and capped. A weight is the number of times that one pass reads the document.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pensar.base.config import Config
from pensar.base.errors import ConfigError, DataError
from pensar.base.files import seed_of, write_atomic
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import read_documents, write_table

Floats = npt.NDArray[np.float64]
SUMMARY = "mixture.json"
HELD_OUT = "held_out"
FEATURE_NAMES = ("educational", "difficulty", "length", "kind", "domain", "field", "source", "language")
NUM_BALANCING_ROUNDS = 50


class Mixture(Config, frozen=True, kw_only=True):
    """One pre-training stage's preferences."""

    theta: dict[str, float] = msgspec.field(default_factory=dict)
    """Feature -> factor in the exponent. Numeric: `educational`, `difficulty` (each brought to 0..1), `length` (log2
    of thousands of tokens). Categories count 1: `kind:code`, `domain:web`, `field:mathematics`, `source:NAME`,
    `language:por_Latn`."""
    language_temperature: float = 0.3
    """alpha: a language's share of natural text becomes proportional to share^alpha; 1 leaves it as it is."""
    max_epochs: float = 4.0
    """No document is read more often in one pass."""


def default_mixtures() -> dict[str, Mixture]:
    """One mixture for each pre-training stage of the report, section 3.2."""
    reasoning = {"educational": 1.0, "difficulty": 0.3, "kind:task": 1.0, "kind:code": 0.5}
    long = {"educational": 0.5, "length": 0.3, "kind:code": 0.3, "domain:long-recall": 1.0}
    return {
        "general": Mixture(theta={"educational": 0.5}),
        "reasoning": Mixture(theta=reasoning),
        "long": Mixture(theta=long),
    }


class MixtureConfig(Config, frozen=True, kw_only=True):
    """The mixtures by name, and how much is held out of all of them."""

    mixtures: dict[str, Mixture] = msgspec.field(default_factory=default_mixtures)
    held_out: float = 0.02
    """Share of documents, chosen by a hash of their id, that no training stage reads; they make the mixture
    `held_out` that losses are measured on."""
    seed: int = 0


class Labels(msgspec.Struct, frozen=True):
    """What mixing knows of one document."""

    id: str
    source: str
    language: str
    kind: str
    educational: int
    difficulty: int
    domain: str
    field: str
    tokens: int

    @property
    def cell(self) -> str:
        """The document's place in the table of cells: language, kind, educational value and domain."""
        return "/".join((self.language, self.kind, str(self.educational), self.domain))


def run(config: MixtureConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads annotated `documents`; writes mixture-<name>.parquet (id, weight, cell) and mixture.json."""
    check(config)
    labels = read_labels(inputs["documents"])
    if not labels:
        raise DataError("no document is left to mix; look at what the stages before this one dropped")
    held_out = [is_held_out(row.id, config) for row in labels]
    summary: dict[str, Any] = {}
    for name, mixture in [*config.mixtures.items(), (HELD_OUT, None)]:
        chosen = np.array(held_out if mixture is None else [not flag for flag in held_out])
        weights = chosen.astype(np.float64)
        if mixture is not None and chosen.any():
            weights[chosen] = mix([row for row, flag in zip(labels, chosen, strict=True) if flag], mixture)
        table = {"id": [row.id for row in labels], "weight": weights, "cell": [row.cell for row in labels]}
        write_table(out / f"mixture-{name}.parquet", pa.table(table))
        summary[name] = summarise(labels, weights)
    write_atomic(
        out / SUMMARY, msgspec.json.format(msgspec.json.encode(summary, order="deterministic"), indent=2)
    )
    return {
        "documents_in": len(labels),
        "documents_out": len(labels),
        "dropped": {},
        "held_out": sum(held_out),
        "estimated_tokens": sum(row.tokens for row in labels),
        "cells": len({row.cell for row in labels}),
    }


def check(config: MixtureConfig) -> None:
    """Raises ConfigError for a mixture that cannot be meant."""
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"held_out is {config.held_out}; it is a share from 0 to below 1")
    for name, mixture in config.mixtures.items():
        for feature in mixture.theta:
            if feature.partition(":")[0] not in FEATURE_NAMES:
                known = ", ".join(FEATURE_NAMES)
                raise ConfigError(f"mixtures.{name}.theta names {feature!r}; a feature is one of {known}")
        if mixture.max_epochs < 1:
            raise ConfigError(
                f"mixtures.{name}.max_epochs is {mixture.max_epochs}; at least 1 is needed to fill a pass"
            )


def read_labels(folder: Path) -> list[Labels]:
    """The labels of every document of an annotated artifact."""
    rows = []
    for document in read_documents(folder):
        marks = document.marks
        if "educational" not in marks:
            raise DataError(
                f"document {document.id} of {folder} has no labels; mix what the annotate stage wrote"
            )
        names = ("educational", "difficulty", "domain", "field", "tokens")
        labels: dict[str, Any] = {name: marks[name] for name in names}
        labels |= {"source": document.source, "language": document.language, "kind": document.kind}
        rows.append(Labels(id=document.id, **labels))
    return rows


def is_held_out(name: str, config: MixtureConfig) -> bool:
    """Whether a document is kept for measuring; a function of its id alone."""
    return seed_of(config.seed, "held out", name) / (1 << 63) < config.held_out


def mix(labels: Sequence[Labels], mixture: Mixture) -> Floats:
    """Weights of documents: times per pass, at most `max_epochs`, together as many tokens as the documents have."""
    tokens = np.array([max(row.tokens, 1) for row in labels], np.float64)
    exponents = np.array([score(row, mixture.theta) for row in labels])
    weights = np.exp(exponents - exponents.max()) * language_factors(
        labels, tokens, mixture.language_temperature
    )
    return capped(weights, tokens, mixture.max_epochs)


def score(row: Labels, theta: Mapping[str, float]) -> float:
    """theta . features of one document."""
    features: dict[str, float] = {
        "educational": row.educational / 5,
        "difficulty": row.difficulty / 5,
        "length": float(np.log2(max(row.tokens, 1) / 1000)),
        **{f"{name}:{getattr(row, name)}": 1.0 for name in ("kind", "domain", "field", "source", "language")},
    }
    return sum(factor * features.get(name, 0.0) for name, factor in theta.items())


def language_factors(labels: Sequence[Labels], tokens: Floats, alpha: float) -> Floats:
    """share^(alpha - 1) of each document's language, among natural text; 1 for code and tasks."""
    totals: dict[str, float] = defaultdict(float)
    for row, size in zip(labels, tokens.tolist(), strict=True):
        if row.kind == "text":
            totals[row.language] += size
    whole = sum(totals.values())
    factors = {language: (size / whole) ** (alpha - 1) for language, size in totals.items()}
    # Relative to the commonest language, so that natural text keeps its place beside code and tasks.
    least = min(factors.values(), default=1.0)
    return np.array([factors[row.language] / least if row.kind == "text" else 1.0 for row in labels])


def capped(weights: Floats, tokens: Floats, most: float) -> Floats:
    """Weights scaled so that weights . tokens = sum(tokens), none above `most`; what is cut goes to the others."""
    budget = tokens.sum()
    result = weights * (budget / (weights * tokens).sum())
    for _ in range(NUM_BALANCING_ROUNDS):
        over = result >= most
        rest = (result * tokens)[~over].sum()
        if not (result > most).any() or rest == 0:
            break
        result = np.where(over, most, result * (budget - most * tokens[over].sum()) / rest)
    return np.asarray(np.minimum(result, most))


def summarise(labels: Sequence[Labels], weights: Floats) -> dict[str, Any]:
    """Estimated tokens of one pass by cell part, and the largest cells."""
    shares: dict[str, dict[str, float]] = {
        name: defaultdict(float) for name in ("kind", "language", "domain", "source")
    }
    cells: dict[str, float] = defaultdict(float)
    total = max(sum(row.tokens * weight for row, weight in zip(labels, weights.tolist(), strict=True)), 1e-9)
    for row, weight in zip(labels, weights.tolist(), strict=True):
        for name, table in shares.items():
            table[getattr(row, name)] += row.tokens * weight / total
        cells[row.cell] += row.tokens * weight / total
    largest = sorted(cells.items(), key=lambda cell: (-cell[1], cell[0]))[:30]
    return {
        "tokens": round(total),
        "documents": int((weights > 0).sum()),
        "max_weight": round(float(weights.max()), 4),
        "shares": {
            name: {key: round(share, 6) for key, share in sorted(table.items()) if share > 0}
            for name, table in shares.items()
        },
        "largest_cells": {cell: round(share, 6) for cell, share in largest if share > 0},
    }

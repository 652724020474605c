"""The stage that labels documents by transparent rules: educational value, field, domain, safety, difficulty.

The Qwen3 report labels over 30T tokens in these dimensions with a model. This is the rule-based form: every label
is a sum of features that can be read below and computed by hand, meant for small corpora and as the baseline that a
learned labeller has to beat. It knows the form of a text in any language, and words of English only.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pensar.base.config import Config
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Judged, add_counts, map_shards
from pensar.data.words import ALONE, Words
from pensar.text.document import Document

FIELDS: Mapping[str, frozenset[str]] = {
    "computing": frozenset(
        "function functions class method argument arguments object objects python module string syntax expression "
        "statement integer exception import interpreter code software file bytes attribute iterable computer".split()
    ),
    "mathematics": frozenset(
        "number numbers sum digit equation theorem proof integral polynomial matrix triangle multiply divide "
        "arithmetic fraction remainder probability algebra geometry".split()
    ),
    "science": frozenset(
        "energy atom molecule cell species planet physics chemistry biology evolution temperature experiment "
        "water light plant animal earth gravity ocean".split()
    ),
    "society": frozenset(
        "law government history people country war rights economy city school language culture king century".split()
    ),
    "daily life": frozenset(
        "food family house garden recipe bread morning village market children walk cook".split()
    ),
}
MIN_FIELD_SHARE = 0.02
EXPLAINING = re.compile(
    r"\b(for example|for instance|because|therefore|means that|is called|defined as|consider|note that|"
    r"in other words|as follows|the following|step|let us|thus)\b",
    re.IGNORECASE,
)
UNSAFE = frozenset("porn xxx viagra casino jackpot escort nude betting".split())
MAX_UNSAFE_SHARE = 0.01
BYTES_PER_TOKEN = {"text": 3.6, "code": 3.0, "task": 1.9}
DOCSTRING = re.compile(r'"""|\'\'\'')


class AnnotateConfig(Config, frozen=True, kw_only=True):
    """Which documents go on after labelling."""

    min_educational: int = 0
    """Documents of lower value are dropped as `educational_value`."""
    drop_unsafe: bool = True


def run(config: AnnotateConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents`; adds the marks educational, field, domain, safety, difficulty and tokens."""

    def judge(documents: list[Document]) -> Judged:
        judged = Judged()
        for document in documents:
            annotate(document)
            marks = document.marks
            labels = {name: {str(marks[name]): 1} for name in ("educational", "field", "domain", "safety")}
            add_counts(judged.counts, {"labels": labels})
            if config.drop_unsafe and marks["safety"] == "unsafe":
                judged.drop(document, "unsafe")
            elif marks["educational"] < config.min_educational:
                judged.drop(document, "educational_value")
            else:
                judged.kept.append(document)
        return judged

    return map_shards(inputs["documents"], out, runtime, "labelling", judge)


def annotate(document: Document) -> None:
    """Adds the labels to the document's marks."""
    words = Words(document.text)
    tokens = Counter(re.findall(r"[a-z]+", document.text.lower()))
    document.marks |= {
        "educational": educational_value(document, words),
        "field": field_of(document, tokens),
        "domain": domain_of(document),
        "safety": safety_of(tokens, len(words)),
        "difficulty": difficulty_of(document, words),
        "tokens": round(len(document.text.encode()) / BYTES_PER_TOKEN.get(document.kind, 3.6)),
    }


def educational_value(document: Document, words: Words) -> int:
    """0 (none) to 5: one point each for length, sentences, variety, explanation and structure or origin."""
    if document.kind == "task":
        return 4
    text = document.text
    if document.kind == "code":
        definitions = len(re.findall(r"^\s*(?:def|class) ", text, re.MULTILINE))
        documented = len(DOCSTRING.findall(text)) / 2 / max(definitions, 1)
        comments = len(re.findall(r"^\s*#", text, re.MULTILINE)) / max(text.count("\n"), 1)
        rules = (definitions > 0, documented >= 0.3, documented >= 0.8, comments >= 0.05, len(text) >= 1_500)
        return sum(rules)
    marks = document.marks
    rules = (
        len(words) >= 40,
        float(marks.get("ended_line_share", 0.0)) >= 0.4,
        float(marks.get("compression", 0.0)) >= 0.3 and float(marks.get("repeated_line_share", 0.0)) < 0.05,
        len(EXPLAINING.findall(text)) / max(len(words), 1) >= 0.004,
        bool(marks.get("topic")) or text.count("\n\n") >= 4,
    )
    return sum(rules)


def field_of(document: Document, tokens: Counter[str]) -> str:
    """The field whose words are most frequent, or the topic that the document brings, or `general`."""
    if document.kind == "code":
        return "computing"
    if document.kind == "task":
        return "mathematics"
    total = max(sum(tokens.values()), 1)
    scores = {field: sum(tokens[word] for word in words) / total for field, words in FIELDS.items()}
    best = max(scores, key=lambda field: scores[field])
    return best if scores[best] >= MIN_FIELD_SHARE else "general"


def domain_of(document: Document) -> str:
    """What sort of writing it is: the source's own word, else by container."""
    stated = document.marks.get("domain")
    if isinstance(stated, str) and stated:
        return stated
    if document.kind in {"code", "task"}:
        return document.kind
    container = str(document.marks.get("format", "text"))
    return {"warc": "web", "html": "web", "pdf": "print"}.get(container, "prose")


def safety_of(tokens: Counter[str], num_words: int) -> str:
    """`unsafe` where words of adult and gambling pages are common, else `safe`."""
    share = sum(tokens[word] for word in UNSAFE) / max(num_words, 1)
    return "unsafe" if share > MAX_UNSAFE_SHARE else "safe"


def difficulty_of(document: Document, words: Words) -> int:
    """1 (easy) to 5, by the length of words and sentences as in readability formulas; nesting for code."""
    if not len(words):
        return 1
    if document.kind == "code":
        indents = [len(line) - len(line.lstrip()) for line in document.text.split("\n") if line.strip()]
        return min(5, 1 + int(sum(indents) / max(len(indents), 1) / 2.5))
    sentences = max(1, len(re.findall(r"[.!?。！？।؟]+", document.text)))
    length = 0.0 if words.share_of(ALONE) > 0.5 else float(words.lengths().mean())
    # Automated Readability Index (Senter and Smith 1967), brought to 1..5.
    index = 4.71 * length + 0.5 * len(words) / sentences - 21.43
    return int(min(5, max(1, 1 + index // 4)))

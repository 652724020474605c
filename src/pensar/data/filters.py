"""The stage that drops documents of poor form, by thresholds that can be read; then private data is masked.

One policy for each kind of document. The defaults follow Gopher, C4 and FineWeb (see signals.py), loosened where
they assume English or long pages; word-length rules are not asked of scripts that write no spaces.
"""

from collections.abc import Mapping
from pathlib import Path

from pensar.base.config import Config
from pensar.base.stage import Counts, Runtime
from pensar.data.documents import Judged, add_counts, map_shards
from pensar.data.privacy import mask_private
from pensar.data.signals import Signals, signals_of
from pensar.text.document import Document

NEVER = 1e9
MOSTLY_UNSPACED = 0.5
MIN_LINES = 4
MAX_REPEATED_NGRAMS = (0.20, 0.19, 0.18, 0.17, 0.16, 0.15)
MAX_TOP_NGRAMS = (0.20, 0.18, 0.16)
MARKED_SIGNALS = ("num_words", "mean_word_length", "ended_line_share", "repeated_line_share", "compression")


class Policy(Config, frozen=True, kw_only=True):
    """Limits for one kind of document; each is the last value that is kept. A limit's name is its reason."""

    min_words: int = 20
    max_words: int = 1_000_000
    min_mean_word_length: float = 2.5
    max_mean_word_length: float = 12.0
    max_symbol_ratio: float = 0.1
    min_alphabetic_share: float = 0.6
    min_stop_words: int = 0
    """Different English stop words that an English text of 50 words or more must have."""
    max_bullet_line_share: float = 0.9
    max_ellipsis_line_share: float = 0.3
    min_ended_line_share: float = 0.12
    max_short_line_share: float = 0.67
    max_line_characters: int = 100_000
    max_repeated_line_share: float = 0.2
    max_repeated_paragraph_share: float = 0.2
    max_top_ngram_shares: tuple[float, ...] = MAX_TOP_NGRAMS
    """For runs of 2, 3 and 4 words; empty to leave the rule out, as below."""
    max_repeated_ngram_shares: tuple[float, ...] = MAX_REPEATED_NGRAMS
    """For runs of 5 to 10 words."""
    max_link_ratio: float = 0.1
    max_boilerplate_ratio: float = 0.02
    """Phrases of cookie banners and the like, per word."""
    allow_lorem_ipsum: bool = False
    min_distinct_share: float = 0.05


TEXT = Policy(min_stop_words=2)
CODE = Policy(
    min_mean_word_length=1.5,
    max_mean_word_length=25.0,
    max_symbol_ratio=NEVER,
    min_alphabetic_share=0.25,
    max_bullet_line_share=1.0,
    max_ellipsis_line_share=1.0,
    min_ended_line_share=0.0,
    max_short_line_share=1.0,
    max_line_characters=2_000,
    max_repeated_line_share=0.5,
    max_repeated_paragraph_share=0.5,
    max_top_ngram_shares=(),
    max_repeated_ngram_shares=(),
    max_link_ratio=0.5,
    max_boilerplate_ratio=1.0,
    allow_lorem_ipsum=True,
)
TASK = Policy(
    min_words=3,
    min_mean_word_length=0.0,
    max_mean_word_length=NEVER,
    max_symbol_ratio=NEVER,
    min_alphabetic_share=0.0,
    max_bullet_line_share=1.0,
    max_ellipsis_line_share=1.0,
    min_ended_line_share=0.0,
    max_short_line_share=1.0,
    max_repeated_line_share=1.0,
    max_repeated_paragraph_share=1.0,
    max_top_ngram_shares=(),
    max_repeated_ngram_shares=(),
    max_link_ratio=0.5,
    max_boilerplate_ratio=1.0,
    allow_lorem_ipsum=True,
    min_distinct_share=0.0,
)


class FiltersConfig(Config, frozen=True, kw_only=True):
    """A policy for each kind of document, and whether private data is masked."""

    text: Policy = TEXT
    code: Policy = CODE
    task: Policy = TASK
    mask_private: bool = True
    """Replaces e-mail addresses and public IP addresses in texts and code that are kept."""

    def policy(self, kind: str) -> Policy:
        return {"code": self.code, "task": self.task}.get(kind, self.text)


def run(config: FiltersConfig, inputs: Mapping[str, Path], out: Path, runtime: Runtime) -> Counts:
    """Reads `documents`; what is dropped keeps the signals that decided."""

    def judge(documents: list[Document]) -> Judged:
        judged = Judged()
        for document in documents:
            signals = signals_of(document.text)
            marks = {name: round(float(getattr(signals, name)), 4) for name in MARKED_SIGNALS}
            document.marks.update(marks)
            reason = reason_to_drop(signals, config.policy(document.kind), document.language)
            if reason:
                judged.drop(document, reason)
                continue
            if config.mask_private and document.kind != "task":
                document.text, masked = mask_private(document.text)
                document.marks.update(masked)
                add_counts(judged.counts, {"masked": masked})
            judged.kept.append(document)
        return judged

    return map_shards(inputs["documents"], out, runtime, "filtering", judge)


def reason_to_drop(signals: Signals, policy: Policy, language: str) -> str:
    """The first rule that a text breaks, or nothing."""
    rules = {
        "min_words": signals.num_words < policy.min_words,
        "max_words": signals.num_words > policy.max_words,
        **_word_rules(signals, policy, language),
        "max_bullet_line_share": signals.bullet_line_share > policy.max_bullet_line_share,
        "max_ellipsis_line_share": signals.ellipsis_line_share > policy.max_ellipsis_line_share,
        "max_short_line_share": signals.short_line_share > policy.max_short_line_share,
        "max_line_characters": signals.longest_line > policy.max_line_characters,
        "max_repeated_line_share": signals.repeated_line_share > policy.max_repeated_line_share,
        "max_repeated_paragraph_share": signals.repeated_paragraph_share
        > policy.max_repeated_paragraph_share,
        "max_top_ngram_shares": _any_above(signals.top_ngram_shares, policy.max_top_ngram_shares),
        "max_repeated_ngram_shares": _any_above(
            signals.repeated_ngram_shares, policy.max_repeated_ngram_shares
        ),
        "max_link_ratio": signals.link_ratio > policy.max_link_ratio,
        "max_boilerplate_ratio": signals.boilerplate_lines > policy.max_boilerplate_ratio * signals.num_words,
        "lorem_ipsum": signals.has_lorem_ipsum and not policy.allow_lorem_ipsum,
        "min_distinct_share": signals.compression < policy.min_distinct_share,
    }
    return next((reason for reason, broken in rules.items() if broken), "")


def _word_rules(signals: Signals, policy: Policy, language: str) -> dict[str, bool]:
    """Rules about words and sentences, some of which need a script that separates words."""
    spaced = signals.unspaced_share < MOSTLY_UNSPACED
    english = language == "eng_Latn" and signals.num_words >= 50
    return {
        "min_mean_word_length": spaced and signals.mean_word_length < policy.min_mean_word_length,
        # Thai and Lao end sentences with a space; two or three lines say little.
        "min_ended_line_share": spaced
        and signals.num_lines >= MIN_LINES
        and signals.ended_line_share < policy.min_ended_line_share,
        "max_mean_word_length": spaced and signals.mean_word_length > policy.max_mean_word_length,
        "max_symbol_ratio": signals.symbol_ratio > policy.max_symbol_ratio,
        "min_alphabetic_share": signals.alphabetic_share < policy.min_alphabetic_share,
        "min_stop_words": english and signals.num_stop_words < policy.min_stop_words,
    }


def _any_above(values: tuple[float, ...], limits: tuple[float, ...]) -> bool:
    return any(value > limit for value, limit in zip(values, limits, strict=False))

"""The page: a report as one HTML file that needs nothing else."""

from collections.abc import Mapping
from pathlib import Path

from pensar.report.contents import Report
from pensar.report.html import Markup, element
from pensar.report.sections.budgets import learned_budgets
from pensar.report.sections.conversations import conversations
from pensar.report.sections.costs import costs
from pensar.report.sections.documents import funnel, languages
from pensar.report.sections.effects import budget, distillation, long_context
from pensar.report.sections.experts import experts
from pensar.report.sections.learning import learning
from pensar.report.sections.provenance import lineage, versions
from pensar.report.sections.scaling import scaling
from pensar.report.sections.scores import stage_table
from pensar.report.sections.summary import summary

STYLE = "style.css"
CONTENTS = {
    "funnel": "documents",
    "languages": "languages",
    "training": "training",
    "stages": "scores",
    "budget": "budget",
    "distillation": "distillation",
    "long": "long context",
    "conversations": "conversations",
    "costs": "time",
    "lineage": "lineage",
    "versions": "configuration",
}
"""Anchor -> its word in the line of contents."""
OPTIONAL = {
    "scaling": ("scaling laws", "training"),
    "experts": ("experts", "stages"),
    "learned-budgets": ("learned budgets", "distillation"),
}
"""Of sections that few runs have: the word, and the anchor that it stands before."""


def render(report: Report) -> str:
    """The whole page; a pure function of the report."""
    optional = {
        "scaling": scaling(report),
        "experts": experts(report),
        "learned-budgets": learned_budgets(report),
    }
    sections = [
        summary(report),
        _contents(optional),
        funnel(report),
        languages(report),
        optional["scaling"],
        learning(report),
        optional["experts"],
        stage_table(report),
        budget(report),
        optional["learned-budgets"],
        distillation(report),
        long_context(report),
        conversations(report),
        costs(report),
        lineage(report),
        versions(report),
    ]
    body = element("body", element("main", _header(report), sections, _footer(report)))
    return f"<!DOCTYPE html>\n{element('html', _head(report), body, lang='en')}\n"


def _head(report: Report) -> Markup:
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{report.recipe}: report of a run"),
        element("style", Markup(Path(__file__).with_name(STYLE).read_text("utf-8"))),
    )


def _header(report: Report) -> Markup:
    when = report.finished[:16].replace("T", " ")
    line = f"Report of a run, last artifact finished {when} UTC" if when else "Report of a run"
    return element(
        "header",
        element("p", "Pensar", class_="brand"),
        element("h1", report.recipe),
        element("p", line, class_="when"),
    )


def _contents(optional: Mapping[str, Markup | None]) -> Markup:
    words: dict[str, str] = {}
    for anchor, word in CONTENTS.items():
        words |= {
            name: own
            for name, (own, before) in OPTIONAL.items()
            if before == anchor and optional[name] is not None
        }
        words[anchor] = word
    links = [element("a", word, href=f"#{anchor}") for anchor, word in words.items()]
    return element("nav", links, aria_label="Contents")


def _footer(report: Report) -> Markup:
    version = report.versions.get("pensar", "")
    by = f"Made by Pensar {version}" if version else "Made by Pensar"
    return element(
        "footer", f"{by} from the artifacts of the run. Every number stands in report.json beside this page."
    )

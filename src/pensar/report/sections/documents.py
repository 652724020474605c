"""What became of the documents: the funnel with the reason for every drop, and their languages."""

import math

from pensar.report.contents import ExamplesRow, FunnelRow, LanguageRow, Report
from pensar.report.html import Child, Markup, element
from pensar.report.numbers import count, listing, percent, plural, size, words
from pensar.report.sections.frame import bar, figure, fold, lead, pending, section

LOUDEST = 3
"""Reasons that the lead names."""


def funnel(report: Report) -> Markup:
    """Documents in and out of every data stage, reasons beside."""
    rows = report.funnel
    if not rows:
        return section(
            "funnel", "Documents", pending("sources", "how many documents there were and what became of them")
        )
    widest = max(max(row.documents_in, row.documents_out) for row in rows)
    parts: list[Child] = [
        lead(*_funnel_words(rows)),
        figure(element("div", [_stage(row, widest) for row in rows], class_="funnel")),
    ]
    if report.examples:
        parts.append(element("h3", "Examples for post-training"))
        parts.append(
            lead("Stages that choose what to learn from drop queries and replies; each drop has its reason.")
        )
        widest = max(row.examples + sum(row.dropped.values()) for row in report.examples)
        parts.append(
            figure(element("div", [_examples(row, widest) for row in report.examples], class_="funnel"))
        )
    return section("funnel", "Documents", *parts)


def languages(report: Report) -> Markup:
    """Documents by language, and the languages that are missing."""
    found = report.languages
    if found is None:
        return section("languages", "Languages", pending("language", "the languages of the documents"))
    largest = max((row.documents for row in found.present), default=1)
    parts: list[Child] = [
        lead(
            f"{count(len(found.present))} of Qwen3's {count(found.table_size)} languages and dialects have documents "
            f"after the stage {found.stage}.",
            "Bars are on a logarithmic scale, so that the small languages can be seen.",
        ),
        figure(element("ol", [_language(row, largest) for row in found.present], class_="languages")),
    ]
    if found.other:
        others = [f"{row.name} ({count(row.documents)})" for row in found.other]
        parts.append(element("p", f"Beside the table: {listing(others)}.", class_="note"))
    if found.missing:
        names = [row.name for row in found.missing]
        parts.append(
            fold(f"{plural(len(names), 'language')} without a document", element("p", f"{listing(names)}."))
        )
    return section("languages", "Languages", *parts)


def _funnel_words(rows: list[FunnelRow]) -> list[str]:
    reasons: dict[str, int] = {}
    for row in rows:
        for reason, num in row.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + num
    loudest = sorted(reasons.items(), key=lambda item: -item[1])[:LOUDEST]
    total = sum(reasons.values())
    last = rows[-1]
    said = [
        f"Of {plural(rows[0].documents_in, 'document')}, {count(last.documents_out)} reach the stage {last.stage}."
    ]
    if total:
        named = listing([f"{words(reason)} ({count(num)})" for reason, num in loudest])
        said.append(f"{plural(total, 'document')} were dropped; the commonest reasons are {named}.")
    said.append("Every dropped document is kept beside the others with its reason.")
    return said


def _stage(row: FunnelRow, widest: int) -> Markup:
    share = (
        f" ({percent(row.documents_out / row.documents_in)})"
        if any(row.dropped.values()) and row.documents_in
        else ""
    )
    amounts = f"{count(row.documents_out)}{share}"
    if row.bytes_out:
        amounts += f", {size(row.bytes_out)}"
    return _step(row.stage, row.documents_out, row.dropped, amounts, widest)


def _examples(row: ExamplesRow, widest: int) -> Markup:
    amounts = count(row.examples)
    if row.queries is not None:
        amounts += f" from {plural(row.queries, 'query', 'queries')}"
    return _step(row.stage, row.examples, row.dropped, amounts, widest)


def _step(stage: str, kept: int, dropped: dict[str, int], amounts: str, widest: int) -> Markup:
    """One step of a funnel: a bar of what is kept, behind it pale what is dropped, and the reasons."""
    whole = max(widest, 1)
    return element(
        "div",
        element("b", stage),
        bar(kept / whole, rest=sum(dropped.values()) / whole),
        element("span", amounts, class_="amount"),
        _reasons(dropped),
        class_="step",
    )


def _reasons(dropped: dict[str, int]) -> Markup | None:
    if not dropped:
        return None
    chips = [element("li", f"{words(reason)} ", element("b", count(num))) for reason, num in dropped.items()]
    return element("ul", chips, class_="reasons")


def _language(row: LanguageRow, largest: int) -> Markup:
    share = (1 + math.log(max(row.documents, 1))) / (1 + math.log(max(largest, 1)))
    return element(
        "li",
        element("span", row.name, title=row.code, class_="name"),
        bar(share),
        element("span", count(row.documents), class_="amount"),
    )

"""Where everything came from: the lineage graph, exact versions, and the configuration of every stage."""

import json
from collections.abc import Iterator
from typing import Any

from pensar.report.contents import Report, StageRow
from pensar.report.html import Child, Markup, element
from pensar.report.lineage import lineage_chart
from pensar.report.numbers import plural
from pensar.report.sections.frame import figure, fold, lead, nothing_yet, scrolling, section, table

SHOWN_DIGITS = 12
CONFIGURATION = "Versions and configuration"


def lineage(report: Report) -> Markup:
    """The graph, and every artifact with its fingerprint and inputs."""
    if not report.stages:
        return section("lineage", "Lineage", nothing_yet())
    folders = {row.folder for row in report.stages}
    adopted = {folder for row in report.stages for folder in row.inputs.values() if folder not in folders}
    said = [
        f"{plural(len(report.stages), 'artifact')}, each below what it was made from; a box holds a chain.",
        "Edges that a longer path implies are left out; the list below has all.",
        f"{plural(len(adopted), 'input')} came from outside the run." if adopted else None,
    ]
    listed = table(["artifact", "made from"], [_artifact(row) for row in report.stages], text_columns=2)
    return section(
        "lineage",
        "Lineage",
        lead(*said),
        figure(scrolling(lineage_chart(report.stages)), class_="graph"),
        fold("Every artifact with its inputs", listed),
    )


def versions(report: Report) -> Markup:
    """Versions of what computed the run, and each stage's settings that differ from the defaults."""
    if not report.stages:
        return section("versions", CONFIGURATION, nothing_yet())
    pairs = [
        element("div", element("dt", name), element("dd", version))
        for name, version in report.versions.items()
    ]
    said = (
        "Versions are those recorded when each artifact was made. Settings are those that differ from the defaults, as "
        "they entered each stage's fingerprint."
    )
    stages = [_settings(row) for row in report.stages]
    return section("versions", CONFIGURATION, lead(said), element("dl", pairs, class_="versions"), stages)


def _artifact(row: StageRow) -> list[str | Markup]:
    inputs: list[Child] = []
    for role, folder in row.inputs.items():
        inputs.append(element("li", f"{role}: ", element("code", folder)))
    for path, digest in row.outside.items():
        inputs.append(
            element("li", "outside: ", element("code", path), f" (SHA-256 {digest[:SHOWN_DIGITS]})")
        )
    return [element("code", row.folder), element("ul", inputs, class_="plain")]


def _settings(row: StageRow) -> Markup:
    leaves = list(_leaves(row.config))
    summary = [
        element("b", row.name),
        f" {plural(len(leaves), 'setting')}, fingerprint {row.fingerprint[:SHOWN_DIGITS]}",
    ]
    if not leaves:
        return fold(summary, element("p", "Everything is at its default."), class_="settings")
    lines = [
        element("tr", element("td", element("code", path)), element("td", element("code", value)))
        for path, value in leaves
    ]
    return fold(summary, scrolling(element("table", element("tbody", lines))), class_="settings")


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and value of every setting."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{index}]")
    elif path:
        yield path, tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False)

"""The page: whole, self-contained, drawn from report.json alone, safe with any text."""

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from report_run import make_run

from pensar.report import write
from pensar.report.contents import Report
from pensar.report.page import CONTENTS, render

VOID = {"meta", "br"}
MAX_BYTES = 2_000_000
URL_ATTRIBUTES = {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}


class Balance(HTMLParser):
    """Opens and closes every element once, and keeps what a test asks for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def parsed(page: Path) -> Balance:
    balance = Balance()
    balance.feed(page.read_text("utf-8"))
    balance.close()
    assert balance.open == []
    return balance


def decoded(page: Path) -> Report:
    return msgspec.json.decode(page.with_name("report.json").read_bytes(), type=Report)


def test_the_page_is_drawn_from_report_json_and_nothing_else(run_folder: Path) -> None:
    page = write(run_folder)
    assert render(decoded(page)) == page.read_text("utf-8")


def test_the_page_is_balanced_small_and_has_every_section(run_folder: Path) -> None:
    page = write(run_folder)
    balance = parsed(page)
    assert set(CONTENTS) <= set(balance.ids)
    assert len(balance.ids) == len(set(balance.ids))
    assert page.stat().st_size < MAX_BYTES


@pytest.mark.parametrize("which", ["run_folder", "hostile_run"])
def test_the_page_fetches_nothing(which: str, request: pytest.FixtureRequest) -> None:
    balance = parsed(write(request.getfixturevalue(which)))
    addresses = [value or "" for name, value in balance.attributes if name in URL_ATTRIBUTES]
    assert all(value.startswith("#") for value in addresses)
    assert not balance.names & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    style = Path(render.__code__.co_filename).with_name("style.css").read_text("utf-8")
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_is_shown_and_never_obeyed(hostile_run: Path) -> None:
    page = write(hostile_run)
    balance = parsed(page)
    assert not [name for name, _ in balance.attributes if name.startswith("on")]
    # In a prompt, in a reasoning, in a tool's name, in a reason for a drop, in a language code, in a setting.
    assert balance.text.count("<script>alert(1)</script>") >= 5
    assert "\x00" not in page.read_text("utf-8")


def test_both_colour_schemes_and_phones_are_provided_for(run_folder: Path) -> None:
    text = write(run_folder).read_text("utf-8")
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert "@media (max-width" in text


def test_every_colour_of_text_has_contrast_in_both_schemes() -> None:
    style = Path(render.__code__.co_filename).with_name("style.css").read_text("utf-8")
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "soft", "thinking", "non-thinking", "good", "bad"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        assert contrast(colours["faint"], colours["paper"]) >= 3.0


def contrast(one: str, other: str) -> float:
    """WCAG 2.1, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_scores_on_the_page_are_those_of_the_evaluation(run_folder: Path) -> None:
    text = parsed(write(run_folder)).text
    for shown in (
        "98.3%",
        "35.3%",
        "+63",
        "24.3%",
        "98.7%",
        "99.3%",
        "2,140",
        "near duplicate",
        "1/4 of RL",
        "1.71",
    ):
        assert shown in text, shown


@pytest.mark.parametrize("until", ["demo", "shards", "pretrain-general", "reasoning-rl", "student-distilled"])
def test_an_unfinished_run_shows_what_is_there_and_who_will_fill_the_rest(tmp_path: Path, until: str) -> None:
    page = write(make_run(tmp_path / "tiny", until=until))
    balance = parsed(page)
    assert "Not yet: the stage evaluate will fill in" in balance.text
    assert until in balance.text
    assert decoded(page).stage_table == []
    assert set(CONTENTS) <= set(balance.ids)


def test_an_empty_run_has_a_page_too(tmp_path: Path) -> None:
    assert "No stage has finished" in parsed(write(tmp_path)).text

"""The documentation tells the truth: links lead somewhere, named files exist, shown commands are real ones."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ROOT / "src" / "pensar"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "recipes" / "README.md"])

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)[^)]*\)|<img[^>]*\ssrc=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def anchors(page: Path) -> set[str]:
    """The fragment of every heading, by the rule that code hosts and site builders share for plain titles."""
    titles = HEADING.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for groups in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target = groups[0] or groups[1]
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, fragment = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{name(page)} links to {target}, which is not there"
        if fragment and goal.suffix == ".md":
            assert fragment in anchors(goal), f"{name(page)} links to {target}: no such heading"


@every_page
def test_every_file_named_in_the_text_exists(page: Path) -> None:
    if page.name in {"CHANGELOG.md", "log.md"}:  # they tell of the past
        return
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|yaml|toml|md))(?:::\w+)?`", text)
    roots = (ROOT, PRODUCT, page.parent)
    missing = [file for file in named if not any((root / file).exists() for root in roots)]
    assert not missing, f"{name(page)} names files that do not exist"


def shown_commands() -> Iterator[tuple[str, str]]:
    """Every `pensar ...` line of a shell block, with its page; continuation lines joined, comments dropped."""
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language not in {"", "sh", "bash", "console"}:
                continue
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split(" #")[0].strip().removeprefix("$ ").removeprefix(".venv/bin/")
                if command.startswith("pensar "):
                    yield name(page), command


COMMANDS = sorted({command: page for page, command in shown_commands()}.items())


@pytest.mark.parametrize(("command", "page"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_every_shown_command_is_a_real_one(command: str, page: str) -> None:
    words = shlex.split(command)[1:]
    words = words[: next((at for at, word in enumerate(words) if word in {"|", ">", "&&", "&"}), len(words))]
    # --help after the words makes the parser look at the verb and at every option, and do nothing.
    asked = subprocess.run(
        [sys.executable, "-c", "import pensar.cli; pensar.cli.main()", *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert asked.returncode == 0, f"{page} shows `{command}`: {asked.stderr or asked.stdout}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_every_make_target_that_is_shown_exists(page: Path) -> None:
    targets = set(
        re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    shown = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert shown
    assert shown <= targets


def test_every_decision_is_listed_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    decisions = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    numbers = [int(decision.name[:3]) for decision in decisions]
    assert numbers == list(range(1, len(numbers) + 1)), "decisions are numbered without gaps"
    missing = [decision.name for decision in decisions if f"decisions/{decision.name}" not in index]
    assert not missing


def test_the_version_is_told_in_the_changelog() -> None:
    version = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

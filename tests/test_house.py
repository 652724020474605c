"""The house rules that a linter does not know: pages that open with a sentence, stay short, and speak one language."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ROOT / "src" / "pensar"
PAGES = sorted(PRODUCT.rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
SPEAKERS = {"cli", "__main__"}
"""The rooms that may print."""
GATHERERS = {"cli", "recipe", "__init__", "__main__"}
"""Rooms that name everybody's configuration because they put the whole together; they coin no nouns by it."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def page_name(page: Path) -> str:
    return page.relative_to(PRODUCT).as_posix()


def room(page: Path) -> str:
    return page.relative_to(PRODUCT).parts[0].removesuffix(".py")


def tree(page: Path) -> ast.Module:
    return ast.parse(page.read_text(encoding="utf-8"), filename=str(page))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


@every_page
def test_every_page_opens_by_saying_what_it_is(page: Path) -> None:
    text = ast.get_docstring(tree(page))
    assert text, "no docstring: say in one sentence what this file is"
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith((".", "?", "!", ":")), f"the opening is not a sentence: {first!r}"


@every_page
def test_every_page_fits_in_the_head(page: Path) -> None:
    lines = len(page.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines, at most {MAX_FILE_LINES}: split by idea"


@every_page
def test_every_function_fits_on_a_screen(page: Path) -> None:
    functions = (node for node in ast.walk(tree(page)) if isinstance(node, Function))
    lengths = {f"{node.name}, line {node.lineno}": own_lines(node) for node in functions}
    too_long = {name: length for name, length in lengths.items() if length >= MAX_FUNCTION_LINES}
    assert not too_long, f"a function stays under {MAX_FUNCTION_LINES} lines"


def own_lines(function: Function) -> int:
    """Lines from `def` to the end, docstring left out: explaining is never too long."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    opening = function.body[0]
    if ast.get_docstring(function, clean=False) is not None and opening.end_lineno is not None:
        total -= opening.end_lineno - opening.lineno + 1
    return total


@every_page
def test_no_page_changes_a_global(page: Path) -> None:
    found = [node.lineno for node in ast.walk(tree(page)) if isinstance(node, ast.Global)]
    assert not found, "state belongs to an object that somebody owns"


@every_page
def test_only_the_command_line_prints(page: Path) -> None:
    if room(page) in SPEAKERS:
        return
    calls = (node for node in ast.walk(tree(page)) if isinstance(node, ast.Call))
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    found = [call.lineno for call in prints if all(word.arg != "file" for word in call.keywords)]
    assert not found, "write to the log or to a stream that was handed in, or return the value"


@every_page
def test_no_page_swallows_every_error(page: Path) -> None:
    handlers = (node for node in ast.walk(tree(page)) if isinstance(node, ast.ExceptHandler))
    found = [handler.lineno for handler in handlers if handler.type is None]
    assert not found, "catch the error that can be explained, let the others through"


def test_no_room_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc", "core", "lib"}
    names = {part.removesuffix(".py") for page in PAGES for part in page.relative_to(PRODUCT).parts}
    assert not names & drawers


def test_every_room_is_a_package() -> None:
    silent = [
        folder.name
        for folder in PRODUCT.iterdir()
        if any(folder.glob("*.py")) and not (folder / "__init__.py").exists()
    ]
    assert not silent, "a room without __init__.py is invisible to the check of the floors"


def test_no_name_says_manager_or_helper() -> None:
    vague = re.compile(r"(Manager|Helper|Utils?|Handler)$|^(Base|Abstract)[A-Z]")
    names = {node.name for page in PAGES for node in ast.walk(tree(page)) if isinstance(node, ast.ClassDef)}
    assert not sorted(name for name in names if vague.search(name))


def test_test_files_have_names_of_their_own() -> None:
    seen: dict[str, Path] = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        assert file.name not in seen, f"{file} and {seen[file.name]} would shadow each other"
        seen[file.name] = file


def nouns_that_cross_a_door() -> Iterator[tuple[str, str]]:
    """Classes that one room imports from another, with the page that asks; errors and configurations aside."""
    for page in PAGES:
        if room(page) in GATHERERS:
            continue
        for node in ast.walk(tree(page)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("pensar."):
                continue
            if (node.module or "").split(".")[1] == room(page):
                continue
            for alias in node.names:
                if re.fullmatch(r"[A-Z][a-z]\w*", alias.name) and not alias.name.endswith(
                    ("Error", "Config")
                ):
                    yield alias.name, page_name(page)


def test_the_glossary_names_every_noun_that_crosses_a_door() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`?\b([A-Z]\w+)\b`?", glossary))
    missing = {noun: page for noun, page in nouns_that_cross_a_door() if noun not in named}
    assert not missing, "rooms share these nouns, and docs/glossary.md does not explain them"

"""The corpus of passages: it parses, is in the script its name says, and covers or excuses every language."""

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import pensar.data
from pensar.data.language import language_table

PASSAGES = Path(pensar.data.__file__).parent / "passages"
FILES = sorted(PASSAGES.glob("*.jsonl"))
HAN = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")
SCRIPT_NAMES = {
    "Arab": ("ARABIC",),
    "Armn": ("ARMENIAN",),
    "Beng": ("BENGALI",),
    "Cyrl": ("CYRILLIC",),
    "Deva": ("DEVANAGARI",),
    "Geor": ("GEORGIAN",),
    "Grek": ("GREEK",),
    "Gujr": ("GUJARATI",),
    "Guru": ("GURMUKHI",),
    "Hang": ("HANGUL",),
    "Hans": HAN,
    "Hant": HAN,
    "Hebr": ("HEBREW",),
    "Jpan": ("HIRAGANA", "KATAKANA", *HAN),
    "Khmr": ("KHMER",),
    "Knda": ("KANNADA",),
    "Laoo": ("LAO",),
    "Latn": ("LATIN",),
    "Mlym": ("MALAYALAM",),
    "Mymr": ("MYANMAR",),
    "Orya": ("ORIYA",),
    "Sinh": ("SINHALA",),
    "Taml": ("TAMIL",),
    "Telu": ("TELUGU",),
    "Thai": ("THAI",),
}
"""How the Unicode names of a script's letters begin."""
MIN_CHARACTERS = {"Hans": 150, "Hant": 150, "Jpan": 150, "Hang": 150}
LARGE = ("eng", "por", "spa", "fra", "deu", "ita", "rus", "jpn", "arb", "hin")

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def missing() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((PASSAGES / "missing.json").read_text(encoding="utf-8"))
    return rows


def share_in_script(text: str, script: str) -> float:
    names = [unicodedata.name(character, "") for character in text if character.isalpha()]
    return sum(name.startswith(SCRIPT_NAMES[script]) for name in names) / len(names)


def test_every_language_of_the_table_has_passages_or_a_reason() -> None:
    table = {language.code: language.name for language in language_table()}
    written = {file.stem for file in FILES}
    excused = {row["code"]: row["name"] for row in missing()}
    assert len(table) == 119
    assert len(written) + len(excused) == 119
    assert written | set(excused) == set(table)
    assert all(table[code] == name for code, name in excused.items())
    assert all(row["reason"] for row in missing())


@every_file
def test_rows_have_a_title_a_topic_and_a_text_in_normal_form_c(file: Path) -> None:
    rows = rows_of(file)
    assert len(rows) >= 3
    for row in rows:
        assert list(row) == ["title", "topic", "text"]
        assert all(value and value == value.strip() for value in row.values())
        assert all(unicodedata.is_normalized("NFC", value) for value in row.values())
        assert row["topic"].isascii()


@every_file
def test_letters_are_in_the_script_that_the_file_name_says(file: Path) -> None:
    script = file.stem.split("_")[1]
    for row in rows_of(file):
        assert share_in_script(row["text"], script) >= 0.8, row["title"]


@every_file
def test_lengths_are_those_of_a_passage(file: Path) -> None:
    longest = 3_500 if file.stem == "eng_Latn" else 900
    shortest = MIN_CHARACTERS.get(file.stem.split("_")[1], 350)
    for row in rows_of(file):
        assert shortest <= len(row["text"]) <= longest, row["title"]


def test_no_text_appears_twice() -> None:
    counts = Counter(row["text"] for file in FILES for row in rows_of(file))
    assert [text for text, count in counts.items() if count > 1] == []


def test_large_languages_have_more_and_english_has_long_ones() -> None:
    sizes = {file.stem: [len(row["text"]) for row in rows_of(file)] for file in FILES}
    large = {code: lengths for code, lengths in sizes.items() if code.startswith(LARGE) or code == "zho_Hans"}
    assert len(large) == 11
    assert all(len(lengths) >= 8 for lengths in large.values())
    assert len(sizes["eng_Latn"]) == 20
    assert sum(length >= 2_000 for length in sizes["eng_Latn"]) == 5


def test_simplified_and_traditional_chinese_are_told_apart_by_their_characters() -> None:
    simplified = "".join(row["text"] for row in rows_of(PASSAGES / "zho_Hans.jsonl"))
    traditional = "".join(row["text"] for row in rows_of(PASSAGES / "zho_Hant.jsonl"))
    assert not set("個來說們這對時會後為過學開") & set(simplified)
    assert not set("个来说们这对时会后为过学开") & set(traditional)

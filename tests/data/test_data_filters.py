"""Signals against naive counts, each rule against a text that breaks it, and the masking of private data."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pensar.base.errors import DataError
from pensar.base.stage import Runtime
from pensar.data import filters
from pensar.data.documents import read_documents, read_dropped
from pensar.data.filters import TEXT, FiltersConfig, reason_to_drop
from pensar.data.privacy import MASKED_EMAIL, MASKED_IP, mask_private
from pensar.data.signals import repeated_ngram_share, signals_of, top_ngram_share
from pensar.data.words import Words
from pensar.text.document import Document

PROSE = (
    "The river rises in the hills and runs for a long way through the plain. Before it meets the sea, it turns "
    "twice around an old town that was built of grey stone. People there have always lived from fish and from "
    "salt, which they sold to merchants with ships. In winter the water stands high, and children are told to "
    "stay away from the quay until spring has come."
)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def naive_repeated_share(words: list[str], n: int) -> float:
    """Characters in later occurrences of n-grams, counted word by word."""
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


def naive_top_share(words: list[str], n: int) -> float:
    """Characters of the commonest n-gram times its count; among equals any may be meant, so all are returned."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values())
    if most < 2:
        return 0.0
    total = sum(map(len, words))
    return max(min(1.0, sum(map(len, gram)) * most / total) for gram, num in counts.items() if num == most)


@pytest.mark.parametrize("seed", range(8))
def test_ngram_shares_equal_a_naive_count(seed: int) -> None:
    rng = random.Random(seed)
    words = [rng.choice("aa bbb c dddd ee".split()) for _ in range(rng.randint(12, 200))]
    view = Words(" ".join(words))
    for n in range(5, 11):
        assert repeated_ngram_share(view, n) == pytest.approx(naive_repeated_share(words, n))
    same = ["word"] * 5 + [f"w{i:02d}x" for i in range(20)]
    assert top_ngram_share(Words(" ".join(same)), 2) == pytest.approx(naive_top_share(same, 2))


@pytest.mark.parametrize("text", [PROSE, "Ça va? Très bien, merci; et toi — l'été...", "x", "", "३ पुस्तकें हैं।"])
def test_words_are_those_of_a_plain_split(text: str) -> None:
    import unicodedata

    marks = "".join(chr(c) for c in range(0x900, 0x980) if unicodedata.category(chr(c))[0] == "M")
    expected = re.findall(rf"[\w{marks}]+", text.lower().replace("_", " "))
    words = Words(text)
    lowered = text.lower()
    assert [lowered[a:b] for a, b in zip(words.starts, words.ends, strict=True)] == expected


def test_every_character_is_a_word_where_no_spaces_are_written() -> None:
    assert len(Words("河流入海")) == 4
    assert len(Words("แม่น้ำ")) >= 4
    assert len(Words("강이 흐른다")) == 2
    assert len(Words("3+4=7")) == 3
    assert len(Words("3+4=7", operators=True)) == 5


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    words = Words("one two One ONE twö two")
    hashes = words.hashes.tolist()
    assert hashes[0] == hashes[2] == hashes[3]
    assert hashes[1] == hashes[5]
    assert len(set(hashes)) == 3
    grams = Words("a b c a b c a b").ngrams(3).tolist()
    assert grams[0] == grams[3]
    assert len(set(grams)) == 3
    vocabulary = [f"{a}{b}" for a in "abcdefghij" for b in range(500)]
    assert len(set(Words(" ".join(vocabulary)).hashes.tolist())) == len(vocabulary)


def test_good_prose_is_kept_in_many_scripts() -> None:
    texts = [
        PROSE,
        "这条河从山上流下来，经过很长的平原。" * 1
        + "沿岸的人们靠捕鱼和种稻为生，学校也在河边，孩子们每天去读书。",
    ]
    texts.append("แม่น้ำไหลจากภูเขาลงสู่ทะเล ผู้คนริมฝั่งจับปลาและปลูกข้าว เด็กเดินไปโรงเรียนทุกเช้า")
    for text in texts:
        assert reason_to_drop(signals_of(text), TEXT, "eng_Latn" if text is PROSE else "und") == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Hello there.", "min_words"),
        ("Buy cheap watches online today, best price! " * 40, "max_top_ngram_shares"),
        ("\n".join(f"- point {i} and more" for i in range(40)), "min_ended_line_share"),
        ("\n".join(f"- point {i} and more." for i in range(40)), "max_bullet_line_share"),
        (
            "\n".join(
                f"thought {i} of {i * 7} people goes to city number {i * 31} in year {i + 1900}, and then it fades..."
                for i in range(40)
            ),
            "max_ellipsis_line_share",
        ),
        ((PROSE + "\n") * 3, "max_repeated_line_share"),
        ("# # # # " + PROSE.replace(" ", " # "), "max_symbol_ratio"),
        ("1234 5678 9012 3456. " * 5 + PROSE[:60], "min_alphabetic_share"),
        ("\n".join(f"Line {i} is short." for i in range(40)), "max_short_line_share"),
        (PROSE + " lorem ipsum dolor", "lorem_ipsum"),
        ("x" * 200_000 + ". " + PROSE, "max_mean_word_length"),
        (
            PROSE.replace(
                ".", ". See https://a.example and www.b.example and http://c.example; www.d.example."
            ),
            "",
        ),
    ],
)
def test_each_rule_names_itself(text: str, reason: str) -> None:
    found = reason_to_drop(signals_of(text), TEXT, "und")
    if reason:
        assert found == reason
    else:
        assert found in {"max_link_ratio", "max_repeated_ngram_shares", "max_top_ngram_shares"}


def test_english_needs_stop_words_and_other_languages_do_not() -> None:
    text = " ".join(f"kalimera{i % 37} logos{i % 41} nomos{i}." for i in range(60))
    assert reason_to_drop(signals_of(text), TEXT, "eng_Latn") == "min_stop_words"
    assert reason_to_drop(signals_of(text), TEXT, "ell_Grek") == ""


def test_what_is_dropped_stands_beside_what_is_kept(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Callable[..., Document]
) -> None:
    documents = [make(PROSE, "good"), make("short", "bad"), make("Sum: 3+4\n7", "task", kind="task")]
    documents.append(
        make("def add(a, b):\n    # from ann@corp.example.io\n    return a + b\n" * 9, "code", kind="code")
    )
    counts = filters.run(FiltersConfig(), {"documents": store(documents)}, tmp_path / "out", runtime)
    kept = {document.locator: document for document in read_documents(tmp_path / "out")}
    dropped = {row.document.locator: row for row in read_dropped(tmp_path / "out")}
    assert set(kept) | set(dropped) == {"good", "bad", "task", "code"}
    assert dropped["bad"].reason == "min_words"
    assert dropped["bad"].document.text == "short"
    assert MASKED_EMAIL in kept["code"].text if "code" in kept else "code" in dropped
    assert counts["documents_in"] == 4
    assert counts["documents_out"] + sum(counts["dropped"].values()) == 4


def test_a_policy_that_drops_everything_is_an_error_with_its_reasons(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Callable[..., Document]
) -> None:
    strict = FiltersConfig(text=msgspec.structs.replace(TEXT, min_words=10_000))
    with pytest.raises(DataError, match=r"left none of 1 documents .min_words 1.; look at the dropped"):
        filters.run(strict, {"documents": store([make(PROSE)])}, tmp_path / "out", runtime)


def test_addresses_are_masked_and_examples_are_not() -> None:
    text = "Write to ann.b+c@mail.corp.io or bob@example.org; at 8.8.8.8, 127.0.0.1, 10.0.0.7, 999.1.1.1, v1.2.3.4.5."
    masked, counts = mask_private(text)
    assert masked == text.replace("ann.b+c@mail.corp.io", MASKED_EMAIL).replace("8.8.8.8", MASKED_IP)
    assert counts == {"emails_masked": 1, "ips_masked": 1}
    assert mask_private("nothing here @ all") == ("nothing here @ all", {})

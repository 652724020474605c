"""Duplicates: MinHash against true similarity, groups against a naive search, and the choice that stays put."""

import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pensar.base.stage import Runtime
from pensar.data import dedup
from pensar.data.dedup import DedupConfig, Groups, decide, minhash, signatures_table
from pensar.data.documents import read_documents, read_dropped
from pensar.data.words import Words
from pensar.text.document import Document

CONFIG = DedupConfig()
Make = Callable[..., Document]


def prose(rng: random.Random, size: int = 300) -> list[str]:
    return [f"w{rng.randrange(2_000)}" for _ in range(size)]


def edited(words: list[str], rng: random.Random, num: int) -> list[str]:
    words = list(words)
    for place in rng.sample(range(len(words)), num):
        words[place] = f"edit{rng.randrange(10_000)}"
    return words


def jaccard(a: list[str], b: list[str], n: int = 5) -> float:
    left = {tuple(a[i : i + n]) for i in range(len(a) - n + 1)}
    right = {tuple(b[i : i + n]) for i in range(len(b) - n + 1)}
    return len(left & right) / len(left | right)


def naive_groups(texts: list[list[str]], threshold: float) -> set[frozenset[int]]:
    """Connected components of all pairs at least so similar, by comparing everything with everything."""
    groups = [{i} for i in range(len(texts))]
    for i, j in combinations(range(len(texts)), 2):
        if jaccard(texts[i], texts[j]) >= threshold:
            a, b = (next(g for g in groups if x in g) for x in (i, j))
            if a is not b:
                a |= b
                groups.remove(b)
    return {frozenset(group) for group in groups}


def test_signature_agreement_estimates_the_jaccard_similarity() -> None:
    rng = random.Random(1)
    config = DedupConfig(bands=64)
    for num_edits in (2, 10, 30):
        words = prose(rng)
        other = edited(words, rng, num_edits)
        left, right = (minhash(Words(" ".join(text)), config) for text in (words, other))
        # The standard error of 512 hashes is below 0.022.
        assert float(np.mean(left == right)) == pytest.approx(jaccard(words, other), abs=0.08)


def test_minhash_equals_a_naive_minimum() -> None:
    from pensar.data.hashing import mix64

    words = Words(" ".join(prose(random.Random(2), 40)))
    numbers = np.arange(CONFIG.num_hashes, dtype=np.uint64)
    a = [int(x) | 1 for x in mix64(numbers, CONFIG.seed + 1)]
    b = [int(x) for x in mix64(numbers, CONFIG.seed + 2)]
    grams = words.ngrams(CONFIG.ngram).tolist()
    naive = [min((x * gram + y) % 2**64 >> 32 for gram in grams) for x, y in zip(a, b, strict=True)]
    assert minhash(words, CONFIG).tolist() == naive


def test_groups_are_those_of_a_search_over_all_pairs(make: Make) -> None:
    rng = random.Random(3)
    texts: list[list[str]] = []
    for _ in range(25):
        original = prose(rng)
        texts.append(original)
        texts += [edited(original, rng, 3) for _ in range(rng.randrange(3))]
    documents = [make(" ".join(words), str(i)) for i, words in enumerate(texts)]
    fates = decide(signatures_table(documents, CONFIG), CONFIG)
    clusters: dict[str, set[int]] = {}
    for number, document in enumerate(documents):
        clusters.setdefault(fates[document.id].cluster, set()).add(number)
    assert {frozenset(group) for group in clusters.values()} == naive_groups(texts, 0.7)


def test_the_result_does_not_depend_on_the_order_of_documents(make: Make) -> None:
    rng = random.Random(4)
    base = prose(rng)
    documents = [make(" ".join(edited(base, rng, num)), str(num)) for num in range(0, 60, 4)]
    table = signatures_table(documents, CONFIG)
    shuffled = table.take(rng.sample(range(len(documents)), len(documents)))
    assert decide(table, CONFIG) == decide(shuffled, CONFIG)


def test_one_of_each_group_is_kept_with_its_size(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    rng = random.Random(5)
    words = prose(rng)
    text = " ".join(words)
    documents = [
        make(text, "original"),
        make(text.upper() + "  ", "same but for case and space"),
        make(" ".join(edited(words, rng, 2)) + " tail", "longest of the group"),
        make(" ".join(prose(rng)), "another"),
        make("Sum: 3+4\n7", "task a", kind="task"),
        make("Sum:  3+4 7", "task a again", kind="task"),
        make("Sum: 3+5\n8", "task b", kind="task"),
    ]
    source = store(documents[:3], documents[3:])
    counts = dedup.run(CONFIG, {"documents": source}, tmp_path / "out", runtime)
    kept = {document.locator: document for document in read_documents(tmp_path / "out")}
    dropped = {row.document.locator: row.reason for row in read_dropped(tmp_path / "out")}
    assert "longest of the group" in kept
    assert kept["longest of the group"].marks["cluster_size"] == 3
    assert "another" in kept
    assert "task b" in kept
    assert len([name for name in kept if name.startswith("task a")]) == 1
    assert sorted(dropped.values()) == ["exact_duplicate", "exact_duplicate", "near_duplicate"]
    assert counts["documents_out"] == 4


def test_tasks_of_one_template_are_not_duplicates(make: Make) -> None:
    documents = [
        make(f"Tom has {n} apples and buys two more at the market. How many has he now?", kind="task")
        for n in range(9)
    ]
    assert all(not fate.reason for fate in decide(signatures_table(documents, CONFIG), CONFIG).values())


def test_near_copies_are_found_without_spaces_between_words(make: Make) -> None:
    rng = random.Random(6)
    characters = [chr(rng.randrange(0x4E00, 0x9000)) for _ in range(600)]
    copy = list(characters)
    for place in rng.sample(range(600), 4):
        copy[place] = "改"
    documents = [make("".join(characters), "a"), make("".join(copy), "b")]
    fates = decide(signatures_table(documents, CONFIG), CONFIG)
    assert sorted(fate.reason for fate in fates.values()) == ["", "near_duplicate"]


def test_union_find_equals_naive_labels() -> None:
    rng = random.Random(7)
    groups, labels = Groups(60), list(range(60))
    for _ in range(45):
        a, b = rng.randrange(60), rng.randrange(60)
        groups.join(a, b)
        old, new = labels[a], labels[b]
        labels = [new if label == old else label for label in labels]
    roots = [groups.root(i) for i in range(60)]
    assert all((roots[i] == roots[j]) == (labels[i] == labels[j]) for i, j in combinations(range(60), 2))
    assert all(root <= i for i, root in enumerate(roots))

"""Evaluation items in documents: found as a naive search finds them, reported, and never let through."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pensar.base.errors import ConfigError, DataError
from pensar.base.stage import Runtime
from pensar.data import decontaminate
from pensar.data.decontaminate import DecontaminateConfig, EvaluationIndex, read_items, require_clean
from pensar.data.documents import read_documents, read_dropped
from pensar.text.document import Document

Make = Callable[..., Document]
CONFIG = DecontaminateConfig()
LONG_ITEM = (
    "A train leaves the old station at seven in the morning and another one follows it after forty minutes "
    "at twice the speed; when do they meet?"
)
SHORT_ITEM = "Name the largest moon of Saturn"


def evaluation(tmp_path: Path, **sets: list[str]) -> Path:
    folder = tmp_path / "tasks" / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in sets.items():
        rows = [json.dumps({"prompt": prompt, "answer": "x"}) + "\n" for prompt in prompts]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path / "tasks"


def test_items_are_found_in_other_dress(make: Make) -> None:
    index = EvaluationIndex([("set#1", LONG_ITEM), ("set#2", SHORT_ITEM)], CONFIG)
    part = " ".join(LONG_ITEM.split()[3:17])
    dressed = "Before.\n" + part.upper().replace(" ", "\n ") + " after that."
    hit = index.find(make(dressed))
    assert hit is not None
    assert (hit.item, hit.how) == ("set#1", "ngram")
    hit = index.find(make("Quiz: NAME the largest -- moon of saturn! Titan."))
    assert hit is not None
    assert (hit.item, hit.how) == ("set#2", "whole")
    assert index.find(make(" ".join(LONG_ITEM.split()[3:14]))) is None
    assert index.find(make("Name the largest moon of Jupiter")) is None


@pytest.mark.parametrize("seed", range(5))
def test_ngram_hits_equal_a_naive_search(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    config = DecontaminateConfig(ngram=4, min_item_words=4, max_items_per_ngram=1_000)
    items = [(f"s#{i}", " ".join(rng.choice("abcd") for _ in range(rng.randint(4, 9)))) for i in range(4)]
    index = EvaluationIndex(items, config)
    for _ in range(60):
        words = [rng.choice("abcde") for _ in range(rng.randint(1, 14))]
        text = " ".join(words)
        grams = {tuple(words[i : i + 4]) for i in range(len(words) - 3)}
        expected = any(
            tuple(item.split()[i : i + 4]) in grams for _, item in items for i in range(len(item.split()) - 3)
        )
        assert (index.find(make(text)) is not None) == expected, text


def test_template_wording_is_not_contamination(make: Make) -> None:
    template = "Read the numbers in the list below with care and then say which one of them is the largest: "
    items = [(f"set#{i}", template + f"{i} {i + 5} {i + 9}") for i in range(50)]
    index = EvaluationIndex(items, CONFIG)
    assert index.find(make(template + "and here follows something else")) is None
    hit = index.find(make("An exercise. " + template + "7 12 16 was the question."))
    assert hit is not None
    assert (hit.item, hit.how) == ("set#7", "whole")


def test_a_task_is_contaminated_by_a_whole_question_only(make: Make) -> None:
    index = EvaluationIndex([("chain#1", "Last digit, left to right: 3+4*5")], CONFIG)
    asks = "Last digit, left to right: {}\n3+4=7*5=5\n5"
    assert index.find(make(asks.format("3+4*5"), kind="task")) is not None
    assert index.find(make(asks.format("3+4*5-2"), kind="task")) is None
    assert index.find(make(asks.format("3-4*5"), kind="task")) is None
    assert index.find(make(asks.format("3+4"), kind="task")) is None


def test_the_stage_drops_reports_and_leaves_the_rest(
    tmp_path: Path, runtime: Runtime, store: Callable[..., Path], make: Make
) -> None:
    documents = [
        make("A page that quotes: " + LONG_ITEM, "bad page", source="web"),
        make(
            "Nothing of the kind is on this page, which is about rivers and hills.", "good page", source="web"
        ),
        make(LONG_ITEM + "\nAt noon.", "bad task", source="problems", kind="task"),
    ]
    inputs = {
        "documents": store(documents),
        "evaluation": evaluation(tmp_path, moon=[SHORT_ITEM, "2+2"], train=[LONG_ITEM]),
    }
    counts = decontaminate.run(CONFIG, inputs, tmp_path / "out", runtime)
    assert [document.locator for document in read_documents(tmp_path / "out")] == ["good page"]
    assert {row.document.locator: row.reason for row in read_dropped(tmp_path / "out")} == {
        "bad page": "contains_item",
        "bad task": "contains_item",
    }
    report = json.loads((tmp_path / "out" / "contamination.json").read_text())["sets"]
    assert report["evaluation/train"]["sources"]["web"]["hits"] == 1
    assert report["evaluation/train"]["sources"]["web"]["example"]["item"] == "evaluation/train#1"
    assert report["evaluation/moon"] == {"items": 2, "not_checked": 1, "sources": {}}
    assert (counts["evaluation_items"], counts["not_checked"]) == (3, 1)


def test_an_item_that_survives_stops_the_run(make: Make) -> None:
    index = EvaluationIndex([("set#1", LONG_ITEM)], CONFIG)
    require_clean([make("clean as can be")], index)
    with pytest.raises(DataError, match=r"still holds evaluation item set#1; .* remove its folder"):
        require_clean([make("x " + LONG_ITEM)], index)


def test_evaluation_files_that_cannot_be_protected_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no .*jsonl"):
        read_items(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "fine words"}\n{"question": "no prompt"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2 has no text `prompt`"):
        read_items(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": \n')
    with pytest.raises(DataError, match=r"a.jsonl:1 is not JSON"):
        read_items(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "from the root"}\n')
    assert read_items(tmp_path) == [("a#1", "from the root")]

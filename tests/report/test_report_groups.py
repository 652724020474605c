"""Loss by groups in the report: numbers from the record, weighted by tokens, and lines that carry their names."""

from pathlib import Path

import pytest
from report_run import make_run

from pensar.base.errors import DataError
from pensar.base.files import write_jsonl
from pensar.report.collect import collect
from pensar.report.contents import GroupLoss
from pensar.report.groups import MOST_LINES, MOST_POINTS, group_chart, group_losses
from pensar.report.page import render


def entry(loss: float, tokens: float) -> dict[str, float]:
    return {"loss": loss, "tokens": tokens}


ROWS = [
    {"step": 9, "steps": 10, "domain": {"web": entry(4.0, 30), "books": entry(3.0, 50)}},
    {"step": 19, "steps": 10, "domain": {"web": entry(2.0, 10)}},
]


def test_groups_come_largest_first_with_their_ends() -> None:
    books, web = group_losses(ROWS)["domain"]
    assert (books.label, books.tokens, books.first, books.last) == ("books", 50, 3.0, 3.0)
    assert (web.label, web.tokens, web.first, web.last) == ("web", 40, 4.0, 2.0)
    assert web.points == [(9, 4.0), (19, 2.0)]
    assert group_losses([]) == {}


def test_points_are_thinned_to_means_over_tokens() -> None:
    rows = [
        {"step": n, "steps": 1, "kind": {"text": entry(float(n), 1.0 + n % 2)}}
        for n in range(2 * MOST_POINTS)
    ]
    (text,) = group_losses(rows)["kind"]
    assert len(text.points) == MOST_POINTS
    assert text.points[0] == (1, pytest.approx((0 * 1 + 1 * 2) / 3, rel=1e-5))
    assert text.points[-1] == (79, pytest.approx((78 * 1 + 79 * 2) / 3, rel=1e-5))
    assert text.tokens == sum(1 + n % 2 for n in range(80))


def test_a_chart_draws_the_largest_groups_with_their_names() -> None:
    groups = [
        GroupLoss(
            label=f"group-{n}", tokens=100 - n, first=5.0, last=4.0 - n / 10, points=[(0, 5.0), (9, 4.0)]
        )
        for n in range(MOST_LINES + 3)
    ]
    chart = str(group_chart("pretrain-general", "domain", groups))
    assert chart.count("<path") == MOST_LINES
    assert "Loss by domain over the steps of pretrain-general" in chart
    assert f"group-{MOST_LINES - 1} " in chart
    assert f"group-{MOST_LINES} " not in chart


def test_the_page_and_the_numbers_have_the_record(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    run = make_run(tmp_path / "run", until="pretrain-reasoning")
    assert "Loss by domain and language" not in render(collect(run))
    folder = next(run.glob("pretrain-general-*"))
    rows = [{**row, "language": {"eng_Latn": entry(2.0, 60), hostile: entry(5.0, 2)}} for row in ROWS]
    write_jsonl(folder / "losses.jsonl", rows)
    report = collect(run)
    training = next(stage for stage in report.training if stage.stage == "pretrain-general")
    assert [group.label for group in training.groups["domain"]] == ["books", "web"]
    page = render(report)
    assert "Loss by domain and language" in page
    assert "it goes by domain from 2 (web) to 3 (books)" in page
    assert hostile not in page
    assert page.count("Loss by language over the steps of pretrain-general") == 1
    (folder / "losses.jsonl").write_text("no row\n")
    with pytest.raises(DataError, match=r"losses.jsonl:1: not a row of a record"):
        collect(run)

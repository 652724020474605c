"""How training went: loss over all stages, then the rewards of each stage of reinforcement learning."""

from pensar.report.charts import responsive
from pensar.report.contents import Report, Training
from pensar.report.curves import DIVERGENCE, LOSS, loss_chart, reward_chart, value_chart
from pensar.report.groups import MOST_LINES, group_chart
from pensar.report.html import Child, Markup, element
from pensar.report.numbers import DASH, count, listing, percent, plural, short, significant, words
from pensar.report.sections.frame import caption, figure, fold, lead, pending, section, table

REWARD, ENTROPY, LENGTH = "reward", "entropy", "length"
FAMILY = "reward/"
MARKS = ("domain", "language", "source", "kind")
MOST_ROWS = 24
"""Groups of a mark in a table; `report.json` has all."""


def learning(report: Report) -> Markup:
    """Loss of all stages on one axis with a table of its ends, and a row of charts for each stage with rewards."""
    trainings = report.training
    if not trainings:
        return section(
            "training",
            "Training",
            pending("pretrain-general", "the loss of every training stage"),
        )
    chart = responsive(lambda width: loss_chart(trainings, width))
    parts: list[Child] = [lead(*_loss_words(trainings)), figure(chart, _ends(trainings))]
    grouped = [(stage, marks) for stage in trainings if (marks := _telling(stage))]
    if grouped:
        parts.append(element("h3", "Loss by domain and language"))
        parts.append(lead(*_group_words(grouped)))
        parts += [_by_group(stage, marks) for stage, marks in grouped]
    rewarded = [stage for stage in trainings if REWARD in stage.series]
    if rewarded:
        parts.append(element("h3", "Rewards"))
        parts.append(lead(*_reward_words(rewarded)))
        parts += [_rewards(stage) for stage in rewarded]
    return section("training", "Training", *parts)


def _loss_words(trainings: list[Training]) -> list[str | None]:
    first = next((stage for stage in trainings if LOSS in stage.series), None)
    tokens = short(sum(stage.tokens for stage in trainings))
    ends = f"{significant(first.first[LOSS])} to {significant(first.last[LOSS])}" if first else ""
    begun = [stage.stage for stage in trainings if not stage.finished]
    return [
        f"{plural(len(trainings), 'stage')} learnt from {tokens} tokens.",
        f"In {first.stage} the loss goes from {ends} nats per token." if first else None,
        "A band is wider the more tokens its stage learnt from, with a least width; within a band steps run evenly.",
        "Solid: a running mean of the cross-entropy on the stage's own data; it may jump from one stage to the next.",
        "Dashed: divergence from the teacher."
        if any(DIVERGENCE in stage.series for stage in trainings)
        else None,
        f"Not finished: {listing(begun)}." if begun else None,
    ]


def _ends(trainings: list[Training]) -> Markup:
    rows = []
    for number, stage in enumerate(trainings, start=1):
        name = next((name for name in (LOSS, DIVERGENCE, REWARD) if name in stage.series), "")
        shown = percent if name == REWARD else significant
        ends = f"{name} {shown(stage.first[name])} → {shown(stage.last[name])}" if name else DASH
        rows.append([f"{number} {stage.stage}", ends, count(stage.steps), short(stage.tokens)])
    return table(["stage", "first → last tenth of its steps", "steps", "tokens"], rows, text_columns=2)


def _telling(stage: Training) -> list[str]:
    """The marks to draw, of which there are several groups: domain and language, else source and kind."""
    several = [mark for mark in MARKS if len(stage.groups.get(mark, [])) > 1]
    return [mark for mark in several if mark in MARKS[:2]] or several


def _group_words(grouped: list[tuple[Training, list[str]]]) -> list[str]:
    stage, marks = grouped[-1]
    said = [
        "The training loss on the documents of each group, nats per token; the groups of the most tokens are drawn."
    ]
    for mark in marks:
        groups = stage.groups[mark][:MOST_LINES]
        low, high = (choose(groups, key=lambda group: group.last) for choose in (min, max))
        said.append(
            f"At the end of {stage.stage} it goes by {mark} from {significant(low.last)} ({low.label}) "
            f"to {significant(high.last)} ({high.label})."
        )
    return said


def _by_group(stage: Training, marks: list[str]) -> Markup:
    panels = []
    for mark in marks:
        groups = stage.groups[mark]
        chart = group_chart(stage.stage, mark, groups)
        panels.append(element("div", caption(f"loss by {mark}"), chart, class_="panel"))
    rows = [
        [mark, group.label, significant(group.first), significant(group.last), short(group.tokens)]
        for mark in MARKS
        for group in stage.groups.get(mark, [])[:MOST_ROWS]
    ]
    header = ["mark", "group", "first tenth", "last tenth", "tokens"]
    numbers = fold("the numbers", table(header, rows, text_columns=2))
    return figure(element("h4", stage.stage), element("div", panels, class_="panels even"), numbers)


def _reward_words(rewarded: list[Training]) -> list[str]:
    ends = [
        f"{percent(stage.first[REWARD])} to {percent(stage.last[REWARD])} in {stage.stage}"
        for stage in rewarded
    ]
    said = [f"The mean reward of the drawn replies goes from {listing(ends)}."]
    entropic = [stage for stage in rewarded if ENTROPY in stage.series]
    if entropic:
        kept = [
            f"{significant(stage.first[ENTROPY], 2)} to {significant(stage.last[ENTROPY], 2)} in {stage.stage}"
            for stage in entropic
        ]
        said.append(f"Entropy, which must not collapse, goes from {listing(kept)} (nats per token).")
    return said


def _rewards(stage: Training) -> Markup:
    families = {name: words(name.removeprefix(FAMILY)) for name in stage.series if name.startswith(FAMILY)}
    panels = [element("div", caption("reward"), reward_chart(stage, families), class_="panel large")]
    if ENTROPY in stage.series:
        panels.append(
            element("div", caption("entropy, nats per token"), value_chart(stage, ENTROPY), class_="panel")
        )
    elif DIVERGENCE in stage.series:
        chart = value_chart(stage, DIVERGENCE)
        panels.append(element("div", caption("divergence from the teacher"), chart, class_="panel"))
    if LENGTH in stage.series:
        panels.append(
            element("div", caption("length of a reply, tokens"), value_chart(stage, LENGTH), class_="panel")
        )
    return figure(element("h4", stage.stage), element("div", panels, class_="panels"))

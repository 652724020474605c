"""The top of the page: one paragraph and a few tiles, computed from the run's numbers."""

from pensar.report.contents import Headline, Report
from pensar.report.html import Markup, element
from pensar.report.numbers import (
    bare_percent,
    count,
    duration,
    interval,
    listing,
    multiple,
    percent,
    plural,
    points,
    short,
    size,
)


def summary(report: Report) -> Markup:
    """The summary; of an unfinished run, as much as its stages have found so far."""
    head = report.headline
    sentences = [*_state(report), *_findings(head), _cost(head, len(report.stages))]
    paragraph = element("p", " ".join(sentence for sentence in sentences if sentence), class_="summary")
    return element("section", paragraph, element("div", _tiles(head), class_="tiles"), id="summary")


def _state(report: Report) -> list[str]:
    """Nothing of a run that is complete."""
    said = []
    begun = [draft.name for draft in report.unfinished]
    if begun:
        verb = "has" if len(begun) == 1 else "have"
        said.append(
            f"This run has not ended: {listing(begun)} {verb} begun, and the page shows what is there."
        )
    elif not report.evaluated:
        said.append("This run has not been evaluated yet; the page shows what is there.")
    if report.left_out:
        said.append(f"Artifacts of {listing(report.left_out)} that do not go with those shown are left out.")
    return said


def _findings(head: Headline) -> list[str]:
    found = []
    if head.thinking and head.non_thinking:
        asked = plural(head.thinking.n, "held-out reasoning problem")
        both = f"{percent(head.thinking.score)} right when it thinks and {percent(head.non_thinking.score)}"
        found.append(f"Of {asked} the model answers {both} when it does not.")
    if head.rl:
        rise = f"from {percent(head.rl.before.score)} to {percent(head.rl.after.score)}"
        found.append(f"Reinforcement learning on reasoning took its validation problems {rise}.")
    if head.think_follow:
        share = percent(head.think_follow.score)
        found.append(f"In {share} of replies it follows the mode that the conversation asks for.")
    first, last = head.budget_first, head.budget_last
    if first and last and first != last:
        verb = "rises" if last.accuracy >= first.accuracy else "falls"
        start = f"{percent(first.accuracy)} with a thinking budget of {plural(first.budget, 'token')}"
        found.append(f"Accuracy {verb} from {start} to {percent(last.accuracy)} with {count(last.budget)}.")
    rl, distilled = head.student_rl, head.student_distilled
    if rl and distilled:
        ratio = distilled.samples_ratio
        cost = f" from {percent(ratio)} of the samples" if ratio is not None else ""
        found.append(
            f"A smaller student reaches {percent(rl.pass_at_1)} by reinforcement learning and, from the same start, "
            f"{percent(distilled.pass_at_1)} by distillation{cost}."
        )
    return found


def _cost(head: Headline, num_stages: int) -> str:
    if not num_stages:
        return "No stage has finished."
    model = f" for a model of {short(head.parameters)} parameters" if head.parameters else ""
    processes = plural(head.ranks, "process", "processes")
    return (
        f"{plural(num_stages, 'stage')} took {duration(head.seconds)} on {processes}{model}, "
        f"{size(head.peak_memory_bytes)} of memory at the most."
    )


def _tiles(head: Headline) -> list[Markup]:
    tiles = []
    if head.thinking and head.non_thinking and head.mode_gap is not None:
        both = [
            element("b", percent(head.thinking.score), class_="thinking"),
            element("b", percent(head.non_thinking.score), class_="non-thinking"),
        ]
        tiles.append(
            _tile("Thinking | non-thinking", both, f"{points(head.mode_gap)} points on held-out reasoning")
        )
    if head.rl:
        small = f"{bare_percent(head.rl.before.score)} → {bare_percent(head.rl.after.score)} on its validation set"
        tiles.append(
            _tile("Reasoning RL", [element("b", points(head.rl.points), element("small", " points"))], small)
        )
    if head.think_follow:
        span = interval(head.think_follow.low, head.think_follow.high)
        small = f"{span}, " if span else ""
        tiles.append(
            _tile(
                "ThinkFollow",
                [element("b", percent(head.think_follow.score))],
                f"{small}{plural(head.think_follow.n, 'reply', 'replies')}",
            )
        )
    first, last = head.budget_first, head.budget_last
    if first and last and first != last:
        big = [element("b", percent(first.accuracy, 0), element("small", " → "), percent(last.accuracy, 0))]
        tiles.append(_tile("Thinking budget", big, f"{count(first.budget)} → {plural(last.budget, 'token')}"))
    if head.distillation_gain is not None and head.student_distilled:
        ratio = head.student_distilled.samples_ratio
        small = f"pass@1 over RL, {multiple(ratio)} of its samples" if ratio is not None else "pass@1 over RL"
        tiles.append(
            _tile(
                "Distillation",
                [element("b", points(head.distillation_gain), element("small", " points"))],
                small,
            )
        )
    if head.seconds:
        small = f"{size(head.peak_memory_bytes)} peak, {plural(head.ranks, 'process', 'processes')}"
        tiles.append(_tile("All stages", [element("b", duration(head.seconds))], small))
    return tiles


def _tile(label: str, big: list[Markup], small: str) -> Markup:
    return element(
        "div",
        element("h3", label),
        element("p", big, class_="big"),
        element("p", small, class_="small"),
        class_="tile",
    )

"""Three effects: accuracy bought by thinking, distillation against reinforcement learning, and longer context."""

from collections.abc import Sequence
from itertools import pairwise

from pensar.report.charts import responsive
from pensar.report.compare import ON_POLICY, RL, THINKING
from pensar.report.contents import LongContext, Method, Report
from pensar.report.curves import budget_chart
from pensar.report.html import Markup, element
from pensar.report.intervals import ALONE, Mark, Row, interval_chart, pass_at_k
from pensar.report.numbers import (
    DASH,
    bare_percent,
    count,
    duration,
    interval,
    multiple,
    percent,
    plural,
    points,
    scientific,
    significant,
)
from pensar.report.sections.frame import caption, figure, lead, pending, section, table

BITS_PER_BYTE = "bits_per_byte"
BUDGET, DISTILLATION, LONG = "Thinking budget", "Distillation against reinforcement learning", "Long context"


def budget(report: Report) -> Markup:
    """Accuracy against thinking budget."""
    curve = sorted(report.budget_curve, key=lambda point: point.budget)
    if not curve:
        return section("budget", BUDGET, pending("evaluate", "accuracy against thinking budget"))
    first, last = curve[0], curve[-1]
    falls = sum(after.accuracy < before.accuracy for before, after in pairwise(curve))
    shape = "without a fall" if not falls else f"with {plural(falls, 'fall')} between neighbours"
    asked = f"; the same {plural(last.n, 'held-out problem')} at every budget" if last.n else ""
    rise = f"From {percent(first.accuracy)} at {plural(first.budget, 'token')} to {percent(last.accuracy)} at"
    said = [
        f"When the budget is spent, the engine writes a stop sentence and the answer follows{asked}.",
        f"{rise} {count(last.budget)}, {shape}; the surface is the 95% interval.",
    ]
    chart = responsive(lambda width: budget_chart(curve, report.budget_references, width))
    return section("budget", BUDGET, lead(*said), figure(chart))


def distillation(report: Report) -> Markup:
    """Two ways on from one start: pass@1, pass@k and what each cost."""
    methods = report.rl_against_distillation
    if not methods:
        return section("distillation", DISTILLATION, pending("evaluate", "both methods' scores and costs"))
    rows = [_method_row(method) for method in methods]
    chart = responsive(
        lambda width: interval_chart(rows, "pass@1 and pass@k of each method", width=width), ALONE
    )
    said = lead(*_distillation_words(methods))
    return section("distillation", DISTILLATION, said, figure(_methods(methods)), figure(chart))


def long_context(report: Report) -> Markup:
    """Bits per byte and recall at the long length, before and after the stage that learns it."""
    rows = report.long_context
    if not rows:
        return section(
            "long",
            LONG,
            pending("evaluate", "scores at the long length before and after the long-context stage"),
        )
    panels, said = [], []
    for name in dict.fromkeys(row.benchmark for row in rows):
        own = [row for row in rows if row.benchmark == name]
        said.append(_long_words(name, own))
        bits = name == BITS_PER_BYTE
        title = "bits per byte, lower is better" if bits else f"{name}, higher is better"
        chart = interval_chart(
            _long_rows(own), title, *((significant, None) if bits else (percent, (0.0, 1.0)))
        )
        panels.append(element("div", caption(title), chart, class_="panel"))
    return section("long", LONG, lead(*said), figure(element("div", panels, class_="panels even")))


def _distillation_words(methods: Sequence[Method]) -> list[str | None]:
    by_role = {method.role: method for method in methods}
    rl, distilled = by_role.get(RL), by_role.get(ON_POLICY)
    k = max(method.k for method in methods)
    said: list[str | None] = ["The same small student, two ways on from one start."]
    if k:
        said.append(f"pass@1 is the mean over samples, pass@{k} the chance that one of {count(k)} is right.")
    if rl is None or distilled is None:
        return said
    gain = distilled.pass_at_1 - rl.pass_at_1
    cost = (
        f" with {percent(distilled.samples_ratio)} of its samples"
        if distilled.samples_ratio is not None
        else ""
    )
    side = "above" if gain >= 0 else "below"
    apart = points(abs(gain)).lstrip("+")
    said.append(f"Distillation ends {apart} points {side} reinforcement learning in pass@1{cost}.")
    if distilled.flops_ratio is not None:
        ratio = multiple(distilled.flops_ratio)
        said.append(
            f"With the teacher's passes counted, its floating-point operations are {ratio} of the other's."
        )
    return said


def _methods(methods: Sequence[Method]) -> Markup:
    k = max(method.k for method in methods)
    header = ["method", "pass@1", f"pass@{k}" if k else "pass@k", "samples", "FLOPs", "time"]
    return table(header, [_method(method) for method in methods])


def _method(method: Method) -> list[str | Markup]:
    samples = count(method.samples) if method.samples else DASH
    flops = scientific(method.cost_flops) if method.cost_flops else DASH
    time = DASH if method.seconds is None else duration(method.seconds)
    return [
        method.method,
        _estimate(method.pass_at_1, method.pass_at_1_low, method.pass_at_1_high),
        _estimate(method.pass_at_k, method.pass_at_k_low, method.pass_at_k_high),
        _cost(samples, method, method.samples_ratio),
        _cost(flops, method, method.flops_ratio),
        _cost(time, method, method.seconds_ratio),
    ]


def _cost(amount: str, method: Method, ratio: float | None) -> str | Markup:
    """An amount, and below it what multiple of reinforcement learning's it is."""
    if ratio is None or method.role != ON_POLICY:
        return amount
    return element("span", amount, element("span", f"{multiple(ratio)} of RL", class_="interval"))


def _estimate(score: float | None, low: float | None, high: float | None) -> str | Markup:
    if score is None:
        return DASH
    span = element("span", interval(low, high), class_="interval")
    return element("span", element("b", bare_percent(score)), span)


def _method_row(method: Method) -> Row:
    first = Mark(method.pass_at_1, method.pass_at_1_low, method.pass_at_1_high, THINKING, label="pass@1")
    return Row(method.method, (first, *pass_at_k(method)))


def _long_words(name: str, rows: Sequence[LongContext]) -> str:
    """One sentence on a measure: after the first stage and after the last, at the longest length."""
    bits = name == BITS_PER_BYTE
    longest = max(row.length_tokens for row in rows)
    # Recall's lengths are means over its texts, so no two rows need have the same.
    ends = [row for row in rows if row.length_tokens == longest] if bits else list(rows)
    first, last = ends[0], ends[-1]
    shown = significant if bits else percent
    what = "Bits per byte of" if bits else "Recall of a planted fact in"
    texts = plural(last.n, "held-out text")
    before = (
        f"{shown(first.score)} after {first.after_stage}, " if first.after_stage != last.after_stage else ""
    )
    after = f"{shown(last.score)} after {last.after_stage}"
    return f"{what} {texts} of {count(last.length_tokens)} tokens: {before}{after}."


def _long_rows(rows: Sequence[LongContext]) -> list[Row]:
    return [
        Row(
            f"after {row.after_stage}, {count(row.length_tokens)} tokens",
            (
                Mark(
                    row.score,
                    row.low,
                    row.high,
                    "accent" if row.after_stage == rows[-1].after_stage else "neutral",
                ),
            ),
        )
        for row in rows
    ]

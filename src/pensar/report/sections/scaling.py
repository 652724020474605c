"""The sweep of small runs: the best learning rate and batch of each, the laws through them, and what they predict."""

from collections.abc import Callable, Sequence

from pensar.report.contents import Report, Scaling
from pensar.report.html import Child, Markup, element
from pensar.report.laws import SAMPLES, Curve, Spot, law_chart, rate_chart
from pensar.report.numbers import DASH, MINUS, count, multiple, plural, short, significant
from pensar.report.sections.frame import caption, figure, fold, lead, section, table
from pensar.train.optimum import Optimum
from pensar.train.powerlaw import Interval, PowerLaw
from pensar.train.prediction import PARAMETERS, TOKENS, Cell, Hyperparameters, Prediction

PUBLISHED = {
    ("learning rate", PARAMETERS): f"{MINUS}0.713 (arXiv 2503.04715)",
    ("learning rate", TOKENS): "0.307 (arXiv 2503.04715)",
    ("batch", TOKENS): "0.571 (arXiv 2503.04715), 0.383 (arXiv 2505.13738)",
    ("loss", PARAMETERS): "0.34 (arXiv 2203.15556)",
    ("loss", TOKENS): "0.28 (arXiv 2203.15556)",
}
"""Exponents that others found on models from 10^7 parameters on, with AdamW."""
SYMBOLS = {PARAMETERS: "N", TOKENS: "D"}
OFF = 1.05
"""Predictions for more than this many times the sweep say how far beyond it they are."""


def scaling(report: Report) -> Markup | None:
    """Learning rate, batch and loss over size and tokens; None where the run has no sweep."""
    swept = report.scaling
    if swept is None:
        return None
    found = swept.prediction
    parts: list[Child] = [lead(*_words(found))]
    known = [cell for cell in found.cells if cell.optimum is not None]
    if known:
        parts += _charts(found, known)
    parts += [element("h3", "Exponents"), figure(_exponents(found))]
    parts += [element("h3", "Predicted values"), lead(*_prediction_words(found)), figure(_predictions(swept))]
    if found.notes:
        items = element("ul", [element("li", note) for note in found.notes], class_="plain note")
        parts.append(fold(f"{plural(len(found.notes), 'bound')} in place of an optimum", items))
    return section("scaling", "Scaling laws", *parts)


def _words(found: Prediction) -> list[str | None]:
    runs = [point for cell in found.cells for point in cell.points]
    sizes = sorted({cell.parameters for cell in found.cells})
    tokens = sorted({cell.tokens for cell in found.cells})
    rate, batch = found.rate, found.batch
    return [
        f"{plural(len(runs), 'run')} of {plural(len(sizes), 'size')}, N = {short(sizes[0])} to {short(sizes[-1])}",
        f"parameters without embeddings, on D = {short(tokens[0])} to {short(tokens[-1])} tokens.",
        "A quadratic in the logarithms of learning rate and batch, of one curvature, gives the best of both for each.",
        "The laws go through these.",
        f"Learning rate: {_formula('lr', rate)}."
        if rate
        else f"No law of the learning rate: {found.rate_why}.",
        f"Batch in tokens: {_formula('B', batch)}." if batch else f"No law of the batch: {found.batch_why}.",
        _loss_words(found),
    ]


def _loss_words(found: Prediction) -> str:
    if found.loss is None:
        return f"No law of the loss: {found.loss_why}."
    e, a, alpha, b, beta = (significant(value) for value in found.loss.coefficients)
    return f"Loss: L = {e} + {a} N^{MINUS}{alpha} + {b} D^{MINUS}{beta} nats a token of held-out text."


def _formula(name: str, law: PowerLaw) -> str:
    powers = " ".join(f"{SYMBOLS[v]}^{_signed(law.exponent(v).value)}" for v in law.variables)
    return f"{name} = {significant(law.factor.value)} {powers}, R² {law.r_squared:.2f}"


def _charts(found: Prediction, known: Sequence[Cell]) -> list[Child]:
    sizes = sorted({(cell.parameters, cell.hidden_size) for cell in known})
    panels = [
        element(
            "div",
            caption(f"loss over learning rate, {short(size)} parameters ({width} wide), by tokens"),
            rate_chart([cell for cell in known if cell.parameters == size]),
            class_="panel",
        )
        for size, width in sizes
    ]
    charts = [
        ("best learning rate over tokens, by size", _rates(found, known, TOKENS), "tokens", True),
        ("best learning rate over size, by tokens", _rates(found, known, PARAMETERS), "parameters", True),
        ("best batch over tokens, by size", _batches(found, known), "tokens", True),
        ("loss at the best over tokens, by size", _losses(found, known), "tokens", False),
    ]
    laws = [
        element(
            "div",
            caption(title),
            law_chart(curves, title, axis, short if "batch" in title else significant, logarithmic=log),
            class_="panel",
        )
        for title, curves, axis, log in charts
    ]
    said = (
        "Dots: runs of the batch of the grid next to the best one. Rings: the quadratic's lowest point.",
        (
            "Below: dots are these optima with 95% intervals, rings those that only bound one; lines are the laws, and "
            "surfaces their 95% intervals."
        ),
    )
    return [
        figure(element("div", panels, class_="panels even")),
        element("p", " ".join(said), class_="note"),
        figure(element("div", laws, class_="panels even")),
    ]


def _rates(found: Prediction, known: Sequence[Cell], axis: str) -> list[Curve]:
    """The best learning rate over one variable, a curve for each value of the other."""
    other = PARAMETERS if axis == TOKENS else TOKENS

    def law(at: dict[str, float]) -> Interval | None:
        return found.rate.predict(at, scattered=False) if found.rate else None

    return _curves(known, axis, other, law, lambda best: (best.rate, bool(best.rate_edge)))


def _batches(found: Prediction, known: Sequence[Cell]) -> list[Curve]:
    """The best batch over tokens; the law is one for all sizes, drawn with the first."""

    def law(at: dict[str, float]) -> Interval | None:
        return found.batch.predict(at, scattered=False) if found.batch else None

    curves = _curves(known, TOKENS, PARAMETERS, law, lambda best: (best.batch, bool(best.batch_edge)))
    return [curve if number == 0 else Curve(curve.label, curve.spots) for number, curve in enumerate(curves)]


def _losses(found: Prediction, known: Sequence[Cell]) -> list[Curve]:
    def law(at: dict[str, float]) -> Interval | None:
        return found.loss.predict(at[PARAMETERS], at[TOKENS]) if found.loss else None

    return _curves(
        known,
        TOKENS,
        PARAMETERS,
        law,
        lambda best: (Interval(best.loss), bool(best.rate_edge or best.batch_edge)),
    )


def _curves(
    known: Sequence[Cell],
    axis: str,
    other: str,
    law: Callable[[dict[str, float]], Interval | None],
    value: Callable[[Optimum], tuple[Interval, bool]],
) -> list[Curve]:
    places = [float(getattr(cell, axis)) for cell in known]
    low, high = min(places), max(places)
    grid = [low * (high / low) ** (step / SAMPLES) for step in range(SAMPLES + 1)]
    curves = []
    for fixed in sorted({float(getattr(cell, other)) for cell in known}):
        spots = []
        for cell in sorted(known, key=lambda cell: float(getattr(cell, axis))):
            if getattr(cell, other) == fixed and cell.optimum is not None:
                found, bound = value(cell.optimum)
                spots.append(Spot(float(getattr(cell, axis)), found.value, found.low, found.high, bound))
        drawn = [(x, law({axis: x, other: fixed})) for x in grid]
        line = tuple(Spot(x, at.value, at.low, at.high) for x, at in drawn if at is not None)
        curves.append(Curve(short(fixed), tuple(spots), line))
    return curves


def _exponents(found: Prediction) -> Markup:
    rows: list[list[str]] = []
    laws = (("learning rate", found.rate), ("batch", found.batch), ("batch, with size", found.batch_of_size))
    for name, law in laws:
        for variable in law.variables if law else ():
            assert law is not None
            rows.append(_exponent(name, variable, law.exponent(variable)))
    if found.loss:
        rows.append(_exponent("loss", PARAMETERS, found.loss.size_exponent, MINUS))
        rows.append(_exponent("loss", TOKENS, found.loss.tokens_exponent, MINUS))
        rows.append(["size for compute", "C", *_estimate(found.loss.allocation), "0.46 (arXiv 2203.15556)"])
    header = ["what", "of", "exponent", "95% interval", "published, of larger models with AdamW"]
    return (
        table(header, rows, text_columns=2) if rows else lead("No law was found, so there are no exponents.")
    )


def _exponent(name: str, variable: str, value: Interval, sign: str = "") -> list[str]:
    published = PUBLISHED.get((name, variable), DASH)
    shown = _estimate(value) if not sign else _estimate(_negative(value))
    return [name, SYMBOLS[variable], *shown, f"{sign}{published}" if published != DASH else DASH]


def _negative(value: Interval) -> Interval:
    ends = (None if end is None else -end for end in (value.high, value.low))
    return Interval(-value.value, *ends)


def _estimate(value: Interval) -> tuple[str, str]:
    return _signed(value.value), _span(value, _signed)


def _prediction_words(found: Prediction) -> list[str | None]:
    rate = "Muon's learning rate, and AdamW's beside it" if found.muon else "AdamW's learning rate"
    return [
        f"{rate}, the batch in tokens and the loss, for new sizes and tokens.",
        "Intervals are those of one more optimum at that place, the law's own uncertainty and the scatter around it.",
    ]


def _predictions(swept: Scaling) -> Markup:
    rows = [_predicted(target.stage, target.values) for target in swept.targets]
    rows += [_predicted("", values) for values in swept.ladder]
    header = ["for", "N", "D", "learning rate", "AdamW's", "batch, tokens", "loss", "beyond the fit"]
    return table(header, rows)


def _predicted(stage: str, values: Hyperparameters) -> list[str | Markup]:
    beyond = multiple(values.beyond) if values.beyond > OFF else "within"
    return [
        stage or DASH,
        short(values.parameters),
        short(values.tokens),
        _cell(values.rate, significant),
        significant(values.adamw_rate) if values.adamw_rate is not None else DASH,
        _cell(values.batch_tokens, count),
        _cell(values.loss, significant),
        beyond,
    ]


def _cell(value: Interval | None, shown: Callable[[float], str]) -> str | Markup:
    if value is None:
        return DASH
    return element(
        "span", element("b", shown(value.value)), element("span", _span(value, shown), class_="interval")
    )


def _span(value: Interval, shown: Callable[[float], str]) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"{shown(value.low)} to {shown(value.high)}"


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)

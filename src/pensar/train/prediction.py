"""What a sweep of small runs predicts for any size: the laws of learning rate, batch and loss, or why there is none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pensar.base.errors import ConfigError, DataError
from pensar.train.optimum import Optimum, Point
from pensar.train.powerlaw import Interval, LossLaw, NoFit, PowerLaw, fit_loss_law, fit_power_law

if TYPE_CHECKING:
    # Reports read predictions, and need no torch for it.
    from pensar.train.optimizer import OptimizerConfig

FILE = "prediction.json"
LADDER = (1, 4, 16)
"""How many times the largest size and number of tokens of a sweep its predictions are shown for."""
PARAMETERS, TOKENS = "parameters", "tokens"


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one size and number of tokens."""

    parameters: int
    """Without embeddings; of a mixture of experts those that one token meets."""
    tokens: int
    hidden_size: int
    points: list[Point]
    optimum: Optimum | None
    why: str = ""
    """Why there is no optimum."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The content of prediction.json."""

    context: int
    muon: bool
    """Whether the learning rate is Muon's; AdamW's if not."""
    adamw_ratio: float
    """AdamW's learning rate over that of the law, the same in all runs."""
    cells: list[Cell]
    rate: PowerLaw | None
    """lr*(N, D) = c N^a D^b (Step Law, arXiv 2503.04715)."""
    rate_why: str
    batch: PowerLaw | None
    """B*(D) = c D^b in tokens (arXiv 2505.13738; Step Law)."""
    batch_why: str
    batch_of_size: PowerLaw | None
    """B*(N, D): whether the best batch depends on the size at all."""
    loss: LossLaw | None
    loss_why: str
    notes: list[str]
    """Cells whose optimum lies beyond their grid, and those without one."""


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """What the laws say for one size and number of tokens."""

    parameters: int
    tokens: int
    rate: Interval | None
    """With the interval of one more optimum, as a sweep of this size would find it."""
    adamw_rate: float | None
    batch_tokens: Interval | None
    """Before it is rounded to whole rows."""
    loss: Interval | None
    beyond: float
    """By which factor size or tokens lie outside the sweep; 1 within it."""


def predict_from(cells: Sequence[Cell], context: int, optimizer: "OptimizerConfig") -> Prediction:
    """The laws through the cells' optima; one that only stands at the end of its grid is a bound and is left out."""
    known = [(cell, cell.optimum) for cell in cells if cell.optimum is not None]
    inside = [(cell, best) for cell, best in known if not best.rate_edge]
    settled = [(cell, best) for cell, best in known if not best.batch_edge]
    rate, rate_why = _law([cell for cell, _ in inside], [best.rate.value for _, best in inside])
    batches = [best.batch.value for _, best in settled]
    cells_of_batch = [cell for cell, _ in settled]
    batch, batch_why = _law(cells_of_batch, batches, (TOKENS,))
    both, _ = _law(cells_of_batch, batches, (PARAMETERS, TOKENS))
    loss, loss_why = None, ""
    try:
        loss = fit_loss_law(
            [cell.parameters for cell, _ in inside],
            [cell.tokens for cell, _ in inside],
            [best.loss for _, best in inside],
        )
    except NoFit as error:
        loss_why = str(error)
    return Prediction(
        context=context,
        muon=optimizer.muon,
        adamw_ratio=optimizer.adamw_lr / optimizer.lr if optimizer.muon else 1.0,
        cells=list(cells),
        rate=rate,
        rate_why=rate_why,
        batch=batch,
        batch_why=batch_why,
        batch_of_size=both,
        loss=loss,
        loss_why=loss_why,
        notes=[note for cell in cells for note in _notes(cell)],
    )


def read_prediction(folder: Path) -> Prediction:
    """What a sweep wrote; DataError when the folder holds no readable prediction."""
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {FILE}; it is what the stage `scaling` writes")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Prediction)
    except msgspec.DecodeError as error:
        raise DataError(f"{path} cannot be read ({error}); run the stage `scaling` again") from None


def hyperparameters(prediction: Prediction, parameters: int, tokens: int) -> Hyperparameters:
    """The laws' values; None for those that the sweep did not find."""
    at: Mapping[str, float] = {PARAMETERS: parameters, TOKENS: tokens}
    rate = prediction.rate.predict(at) if prediction.rate else None
    batch = prediction.batch.predict(at) if prediction.batch else None
    loss = prediction.loss.predict(parameters, tokens) if prediction.loss else None
    laws = [law for law in (prediction.rate, prediction.batch) if law]
    return Hyperparameters(
        parameters=parameters,
        tokens=tokens,
        rate=rate,
        adamw_rate=rate.value * prediction.adamw_ratio if rate else None,
        batch_tokens=batch,
        loss=loss,
        beyond=max((law.beyond(at) for law in laws), default=1.0),
    )


def ladder(prediction: Prediction) -> list[Hyperparameters]:
    """The laws' values at the end of the sweep, and some way beyond."""
    size = max(cell.parameters for cell in prediction.cells)
    tokens = max(cell.tokens for cell in prediction.cells)
    return [hyperparameters(prediction, size * times, tokens * times) for times in LADDER]


def predicted_rates(
    prediction: Prediction, optimizer: "OptimizerConfig", parameters: int, tokens: int
) -> "OptimizerConfig":
    """An optimiser with the learning rates of the law; ConfigError where there is no law for it."""
    found = hyperparameters(prediction, parameters, tokens)
    if found.rate is None or found.adamw_rate is None:
        raise ConfigError(f"the sweep did not find a law of the learning rate: {prediction.rate_why}")
    if optimizer.muon != prediction.muon:
        names = {True: "Muon", False: "AdamW alone"}
        raise ConfigError(
            f"the sweep was made with {names[prediction.muon]}, the stage trains with {names[optimizer.muon]}: "
            "set optimizer.muon alike in both, or give the stage its learning rates"
        )
    if not optimizer.muon:
        return msgspec.structs.replace(optimizer, adamw_lr=found.adamw_rate)
    return msgspec.structs.replace(optimizer, lr=found.rate.value, adamw_lr=found.adamw_rate)


def predicted_batch(prediction: Prediction, context: int, parameters: int, tokens: int) -> int:
    """The law's batch as whole rows of `context`; ConfigError where there is no law for it."""
    found = hyperparameters(prediction, parameters, tokens)
    if found.batch_tokens is None:
        raise ConfigError(f"the sweep did not find a law of the batch: {prediction.batch_why}")
    return max(1, round(found.batch_tokens.value / context)) * context


def _law(
    cells: Sequence[Cell], values: Sequence[float], names: tuple[str, ...] = ()
) -> tuple[PowerLaw | None, str]:
    """A law of `names`, or of what differs among the cells; and why there is none."""
    columns = {name: [float(getattr(cell, name)) for cell in cells] for name in names or (PARAMETERS, TOKENS)}
    if not names:
        columns = {name: column for name, column in columns.items() if len(set(column)) > 1}
    try:
        if not columns:
            raise NoFit(f"the optima of {len(cells)} cells lie within their grids: a law takes several")
        return fit_power_law(columns, values), ""
    except NoFit as error:
        return None, str(error)


def _notes(cell: Cell) -> list[str]:
    where = f"{cell.parameters:,} parameters, {cell.tokens:,} tokens"
    if cell.optimum is None:
        return [f"{where}: {cell.why}"]
    best, found = cell.optimum, []
    for name, edge, value in (
        ("learning rate", best.rate_edge, best.rate.value),
        ("batch", best.batch_edge, best.batch.value),
    ):
        if edge:
            sign = "at most" if edge == "low" else "at least"
            found.append(
                f"{where}: the loss falls up to the {edge} end of the grid, so that the {name} is {sign} {value:.4g}"
            )
    return found

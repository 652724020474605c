"""`pensar watch`: a run under way or done, in the terminal: its stages, its curves, its speed, the time left."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pensar.base.errors import ConfigError
from pensar.cli.braille import curve, sparkline
from pensar.cli.follow import Run
from pensar.cli.options import Flag, Json
from pensar.cli.screen import Screen
from pensar.report.numbers import DASH, count, duration, percent, plural, short, significant

PIPE_WIDTH = 100
CHARTED = ("loss", "reward", "divergence", "policy_loss")
"""The first of these that a stage has is drawn large."""
SMALL = ("divergence", "gradient_norm", "lr", "entropy", "length", "expert_overload", "expert_entropy")
OF_LAYERS = {"stream_rms": "size of stream", "attention_logit": "largest score"}
SHOWN_GROUPS = 6
CHART_HEIGHT = 8


def watch(path: Path, /, *, once: Flag = False, every: float = 1.0, json: Json = False) -> None:
    """Follow a run from its files: stages, loss, rates, balance of experts, loss by domain, time left.

    Without a terminal, or with nobody at work, one frame is printed.

    Parameters
    ----------
    path
        A run's folder, or that of one of its stages.
    once
        Print one frame and end.
    every
        Seconds between two looks.
    """
    if every <= 0:
        raise ConfigError(f"--every {every:g}: seconds between two looks are more than 0")
    run = Run(path)
    with Screen(json) as screen:
        state = run.look()
        screen.result(state)
        if json:
            return
        if once or not sys.stdout.isatty() or not state["under_way"]:
            Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(frame(state))
            return
        _follow(run, state, every)


def _follow(run: Run, state: dict[str, Any], every: float) -> None:
    """Until nobody is at work any more; the last frame stays."""
    with Live(frame(state), auto_refresh=False) as live:
        try:
            while state["under_way"]:
                time.sleep(every)
                state = run.look()
                live.update(frame(state), refresh=True)
        except KeyboardInterrupt:
            # Looking away is no failure, and the run goes on.
            return


def frame(state: dict[str, Any]) -> RenderableType:
    """One picture of a run."""
    parts: list[RenderableType] = [_heading(state)]
    training = state["training"]
    if training is None:
        parts.append(Text("no stage has trained yet"))
        return Group(*parts)
    parts += [_position(training), Text(), *_large(training), *_small(training)]
    parts += [*_layers(training["layers"]), *_groups(training["losses"])]
    return Group(*parts)


def _heading(state: dict[str, Any]) -> Text:
    done = sum(stage["status"] == "done" for stage in state["stages"])
    begun = [stage["stage"] for stage in state["stages"] if stage["status"] != "done"]
    words = Text(state["folder"], style="bold")
    words.append(f"  {plural(done, 'stage')} done", style="dim")
    if begun:
        words.append(f", {', '.join(begun)} {'under way' if state['under_way'] else 'begun'}", style="dim")
    if not state["under_way"]:
        words.append("; nobody at work", style="dim")
    return words


def _position(training: dict[str, Any]) -> Table:
    """Where the stage is and how fast it goes."""
    step, steps = training["step"], training["steps"]
    filled = round(24 * step / steps) if steps else 0
    words = Text(training["name"], style="bold cyan")
    words.append(f"  {'━' * filled}", style="cyan")
    words.append("━" * (24 - filled), style="dim")
    words.append(f"  {count(step)}/{count(steps)} steps, {short(training['tokens'])} tokens")
    if not training["finished"]:
        words.append(f", {duration(training['seconds_left'])} left")
    rates = []
    if "tokens_per_second" in training:
        rates.append(f"{short(training['tokens_per_second'])} tokens/s")
    if "mfu" in training:
        rates += [f"{short(training['flops_per_second'])}FLOP/s", f"MFU {percent(training['mfu'])}"]
    table = Table.grid()
    table.add_row(words)
    table.add_row(Text("  ".join(rates), style="green"))
    return table


def _large(training: dict[str, Any]) -> list[RenderableType]:
    """The value that the stage is about, over all its steps."""
    name = next((name for name in CHARTED if training["series"].get(name)), None)
    if name is None:
        return []
    values = training["series"][name]
    lines = curve(values, 64, CHART_HEIGHT)
    table = Table.grid(padding=(0, 1))
    for number, line in enumerate(lines):
        edge = {0: significant(max(values)), len(lines) - 1: significant(min(values))}.get(number, "")
        table.add_row(
            Text(edge.rjust(8), style="dim"), Text(line, style="cyan"), *_beside(number, name, values)
        )
    return [table]


def _beside(row: int, name: str, values: Sequence[float]) -> list[Text]:
    """What stands to the right of the chart."""
    tenth = values[-max(1, len(values) // 10) :]
    words = {
        0: Text(name, style="bold"),
        1: Text(f"now {significant(values[-1], 4)}"),
        2: Text(f"last tenth {significant(sum(tenth) / len(tenth), 4)}", style="dim"),
    }
    return [words.get(row, Text())]


def _small(training: dict[str, Any]) -> list[RenderableType]:
    """Other values, a line each."""
    series = training["series"]
    large = next((name for name in CHARTED if series.get(name)), None)
    table = Table.grid(padding=(0, 1))
    for name in SMALL:
        values = series.get(name)
        if values and name != large:
            bars = Text(sparkline(values, 48), style="cyan")
            table.add_row(Text(name.rjust(16), style="dim"), bars, Text(significant(values[-1])))
    if "dead_experts" in training["metrics"]:
        idle = plural(int(training["metrics"]["dead_experts"]), "expert")
        table.add_row(Text("idle".rjust(16), style="dim"), Text(f"{idle} without a token in the last step"))
    return [table] if table.row_count else []


def _layers(row: dict[str, Any]) -> list[RenderableType]:
    """What was last seen from the first layer to the last."""
    if not row:
        return []
    table = Table.grid(padding=(0, 1))
    lists = {f"gradient {kind}": values for kind, values in row["gradient_norm"].items()}
    lists |= {words: row[name] for name, words in OF_LAYERS.items() if name in row}
    for words, values in lists.items():
        if isinstance(values, list) and values and None not in values:
            ends = (
                f"{significant(values[0])} to {significant(values[-1])}, at most {significant(max(values))}"
            )
            table.add_row(Text(words.rjust(18), style="dim"), Text(sparkline(values, 48), style="cyan"), ends)
    title = Text(f"layer by layer, step {count(row['step'])}", style="bold")
    return [Text(), title, table]


def _groups(losses: dict[str, Any]) -> list[RenderableType]:
    """The loss of the largest groups, by every mark that tells several apart."""
    shown: list[RenderableType] = []
    for mark in ("domain", "language", "source", "kind"):
        groups = losses.get(mark, {})
        if len(groups) < 2 or (mark in ("source", "kind") and shown):
            continue
        largest = sorted(groups.items(), key=lambda item: (-item[1]["tokens"], item[0]))
        low = min(entry["loss"] for _, entry in largest)
        high = max(entry["loss"] for _, entry in largest)
        table = Table.grid(padding=(0, 1))
        for label, entry in largest[:SHOWN_GROUPS]:
            share = (entry["loss"] - low) / (high - low) if high > low else 0.0
            bar = Text("█" * (1 + round(share * 23)), style="cyan")
            table.add_row(Text(label[:16].rjust(16), style="dim"), Text(significant(entry["loss"])), bar)
        rest = len(largest) - SHOWN_GROUPS
        title = f"loss by {mark}, the last {plural(losses['steps'], 'step')}"
        more = f" {DASH} and {rest} more" if rest > 0 else ""
        shown += [Text(), Text(title + more, style="bold"), table]
    return shown

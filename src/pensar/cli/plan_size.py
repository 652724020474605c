"""`pensar plan SIZE`: how a cluster would train a model of that size, and what it would cost."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Group, Parameter

from pensar.base.config import complete
from pensar.base.errors import ConfigError
from pensar.cli import plan_check
from pensar.cli.options import Flag
from pensar.cli.screen import Screen
from pensar.report.numbers import count, duration, percent, plural, scientific, short, size

if TYPE_CHECKING:
    from pensar.model.config import ModelConfig
    from pensar.train.planner import Candidate, Cluster, Cost

SHOWN = 5
"""Layouts beside the best, each of another kind."""
PART_NAMES = {
    "weights": "weights, float32",
    "gathered": "gathered weights, bfloat16",
    "gradients": "gradients",
    "optimizer": "optimiser state, float32",
    "activations": "activations",
    "logits": "logits",
    "buffers": "buffers",
    "overhead": "driver and libraries",
}


@Parameter(name="*", group=Group("A size on a cluster", sort_key=10))
@dataclass(frozen=True)
class ClusterOptions:
    """The cluster and the training that a size is planned for."""

    gpus: int | None = None
    """How many GPUs."""
    gpu: str | None = None
    """Which: h100, h200, b200, a100-80g, mi300x, l40s or rtx4090."""
    tokens: float | None = None
    """Tokens to train on, such as 1e12."""
    context: int | None = None
    """Tokens of a row; by default 4096."""
    batch_tokens: int | None = None
    """Tokens of a step; by default 4194304."""
    mfu: float | None = None
    """Assumed share of the peak in computing; by default 0.4 dense, 0.28 mixture of experts."""
    muon: Flag = False
    """Muon in place of AdamW for the matrices of the blocks."""
    running_balance: Flag = False
    """Balance experts by the shares of the step so far: no counting pass (`loss.exact_balance=false`)."""
    pue: float | None = None
    """Power of the data centre over that of its servers; by default 1.2."""
    price: float | None = None
    """Dollars for an hour of one GPU; by default an assumption of the table."""
    simulate: Flag = False
    """Run a step of the best layout with pretended ranks and tensors, and show how far the formulas are off."""
    layout: str | None = None
    """Simulate this one in place of the best, such as `shard=1024,ep=64,recompute=full`."""

    def given(self) -> list[str]:
        """The options that say something."""
        names = [f"--{field.name.replace('_', '-')}" for field in fields(self)]
        return [
            name
            for name, field in zip(names, fields(self), strict=True)
            if getattr(self, field.name) not in (None, False)
        ]

    def cluster(self, name: str) -> "Cluster":
        """ConfigError for what is missing."""
        from pensar.train.accelerators import accelerator
        from pensar.train.planner import Cluster

        if self.gpus is None or self.gpu is None or self.tokens is None:
            needed = {"--gpus": self.gpus, "--gpu": self.gpu, "--tokens": self.tokens}
            missing = ", ".join(option for option, value in needed.items() if value is None)
            raise ConfigError(
                f"a plan for the size {name} lacks {missing}; "
                f"say for example: pensar plan {name} --gpus 64 --gpu h200 --tokens 1e12"
            )
        rest = {
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "mfu": self.mfu,
            "pue": self.pue,
            "dollars_per_hour": self.price,
        }
        return Cluster(
            gpus=self.gpus,
            accelerator=accelerator(self.gpu),
            tokens=self.tokens,
            muon=self.muon,
            exact_balance=not self.running_balance,
            **{name: value for name, value in rest.items() if value is not None},  # type: ignore[arg-type]
        )


def is_size(what: Path) -> bool:
    """Whether the argument can only be meant as a size: a bare name, neither a file nor called like one."""
    return (
        len(what.parts) == 1 and what.suffix not in (".yaml", ".yml", ".json", ".toml") and not what.is_file()
    )


def plan_size(name: str, options: ClusterOptions, json: bool) -> None:
    """Prints the plan; ConfigError for unknown names, and where nothing fits."""
    from pensar.model import sizes
    from pensar.train import planner

    model = sizes.size(name)
    cluster = options.cluster(name)
    if options.layout is not None and not options.simulate:
        raise ConfigError(f"--layout {options.layout} says what to simulate; give --simulate too")
    found = planner.plan(model, cluster)
    best, shown = found[0], _kinds(found)
    gpu, node = str(options.gpu), cluster.accelerator.gpus_per_node
    nodes = plural(-(-cluster.gpus // node), "node")
    assumed = _assumptions(model, cluster, gpu)
    with Screen(json) as screen:
        screen.line(f"{name} on {count(cluster.gpus)} {gpu} ({nodes}), {short(cluster.tokens)} tokens")
        for what, text in _summary(model, cluster, best, planner.cost(model, cluster, best)):
            screen.line(f"{what:<12}{text}")
        screen.line()
        _show_memory(screen, model, cluster, best)
        screen.line()
        exchanges = [(one.name, size(one.num_bytes), duration(one.seconds)) for one in best.traffic]
        screen.table(("exchanges of a GPU in a pass", "bytes", "time"), exchanges, (1, 2))
        if exchanges:
            screen.line()
        header = ("layout", "rows", "passes", "recompute", "memory", "step", "days")
        rows = [_layout_row(one, planner.cost(model, cluster, one)) for one in shown]
        screen.table(header, rows, (1, 2, 4, 5, 6))
        screen.line()
        for number, line in enumerate(assumed):
            screen.line(f"{'assumed' if number == 0 else '':<12}{line}")
        documents = [_document(one, planner.cost(model, cluster, one)) for one in shown]
        result = _result(name, gpu, model, cluster, documents, assumed)
        if options.simulate:
            screen.line()
            layout, step = plan_check.chosen(model, cluster, found, options.layout)
            result["simulation"] = plan_check.check(screen, model, cluster, layout, step)
        screen.result(result)


def _summary(
    model: "ModelConfig", cluster: "Cluster", best: "Candidate", spent: "Cost"
) -> list[tuple[str, str]]:
    from pensar.model.count import flops_per_token, parameters

    numbers = parameters(model)
    active = f", active {count(numbers.active)}" if model.num_experts else ""
    each = flops_per_token(model, cluster.context)
    peak = cluster.accelerator.bf16_flops / 1e12
    a_pass, passes = f"{plural(best.step.rows, 'row')} a pass", plural(_passes(best), "pass", "passes")
    times = {
        "computing": best.compute_seconds,
        "exchanges": best.exchange_seconds,
        "pipeline": best.bubble_seconds,
    }
    took = ", ".join(f"{what} {duration(seconds)}" for what, seconds in times.items() if seconds)
    rows = f"{plural(cluster.rows, 'row')} of {count(cluster.context)} tokens"
    return [
        ("parameters", f"{count(numbers.total)}, without embeddings {count(numbers.non_embedding)}{active}"),
        ("operations", f"{scientific(each)} a token, {scientific(spent.flops)} in all"),
        ("batch", f"{rows}, {plural(round(spent.steps), 'step')}"),
        (
            "layout",
            f"{_text(best)}; {a_pass}, {passes} a step, recompute {best.layout.recompute}",
        ),
        ("step", f"{duration(best.seconds)}: {took}"),
        (
            "speed",
            f"{count(spent.tokens_per_second)} tokens/s a GPU, MFU {percent(spent.mfu)} of {peak:.0f} TFLOP/s",
        ),
        ("time", f"{_days(spent.days)} days, {count(spent.gpu_hours)} GPU hours"),
        ("energy", f"{count(spent.kwh)} kWh"),
        ("cost", f"${count(spent.dollars)}"),
        ("runtime", f"--ranks {cluster.gpus} --set runtime.layout={str(best.layout) or 'shard=1'}"),
    ]


def _show_memory(screen: Screen, model: "ModelConfig", cluster: "Cluster", best: "Candidate") -> None:
    """The parts at each moment of a step, what there is, and what the forms of recomputation keep."""
    from pensar.train.footprint import kept_bytes, moments
    from pensar.train.planner import POLICIES

    found = moments(model, best.layout, best.step, best.memory.stage, cluster.overhead_bytes)
    rows = [
        (text, *(size(parts[part]) if parts[part] else "" for parts in found.values()))
        for part, text in PART_NAMES.items()
        if any(parts[part] for parts in found.values())
    ]
    rows.append(("together", *(size(sum(parts.values())) for parts in found.values())))
    screen.table(("memory of a GPU", *found), rows, range(1, 1 + len(found)))
    whole = cluster.accelerator.memory_bytes
    screen.line(f"at most {size(best.memory.total)}, {percent(best.memory.total / whole)} of {size(whole)}")
    kept = {policy: kept_bytes(model, best.layout, best.step, policy) for policy in POLICIES}
    screen.line(f"a layer keeps {', '.join(f'{size(each)} ({policy})' for policy, each in kept.items())}")


def _layout_row(one: "Candidate", spent: "Cost") -> tuple[str, ...]:
    return (
        _text(one),
        str(one.step.rows),
        str(_passes(one)),
        one.layout.recompute,
        size(one.memory.total),
        duration(one.seconds),
        _days(spent.days),
    )


def _text(one: "Candidate") -> str:
    """The kinds of ranks; what else a layout says has columns of its own."""
    parts = str(one.layout).split(",")
    kinds = [part for part in parts if not part.startswith(("recompute", "micro", "accumulate"))]
    return ",".join(kinds) or "one rank"


def _kinds(found: "Sequence[Candidate]") -> "list[Candidate]":
    """The best of each way of splitting, replicas aside, in the order of the plan."""
    first: dict[tuple[int, ...], Candidate] = {}
    for one in found:
        layout = one.layout
        first.setdefault((layout.cp, layout.tp, layout.ep, layout.pp), one)
    return list(first.values())[: 1 + SHOWN]


def _passes(one: "Candidate") -> int:
    return one.layout.micro_batches if one.layout.pp > 1 else one.step.accumulate


def _days(days: float) -> str:
    return f"{days:,.1f}" if days >= 1 else f"{days:.3f}"


def _assumptions(model: "ModelConfig", cluster: "Cluster", gpu: str) -> list[str]:
    from pensar.train.traffic import LINK_SHARE

    row = cluster.accelerator
    price = row.dollars_per_hour if cluster.dollars_per_hour is None else cluster.dollars_per_hour
    balance = []
    if model.num_experts:
        how = (
            "from a pass of their own where there are several"
            if cluster.exact_balance
            else "of the step so far"
        )
        balance = [f"experts evenly loaded, their shares {how} (--running-balance)"]
    optimizer = "Muon and AdamW" if cluster.muon else "AdamW"
    near, far = row.link_bytes_per_second / 1e9, row.network_bytes_per_second / 1e9
    return [
        f"MFU of computing alone {percent(cluster.assumed_mfu(model))} of dense bfloat16 (--mfu), no restarts",
        f"{percent(LINK_SHARE)} of the links of {gpu}: {near:g} GB/s in a node, {far:g} GB/s a GPU between nodes",
        f"{optimizer} (--muon), logits of {count(cluster.chunk_tokens)} tokens at once",
        f"{percent(cluster.margin)} of the memory left free",
        *balance,
        f"{row.watts:.0f} W a GPU, servers {cluster.server:g} times their GPUs, PUE {cluster.pue:g} (--pue)",
        f"${price:g} an hour of one GPU (--price)",
    ]


def _document(one: "Candidate", spent: "Cost") -> dict[str, Any]:
    return {
        "layout": complete(one.layout),
        "text": str(one.layout),
        "rows": one.step.rows,
        "passes": _passes(one),
        "memory_bytes": one.memory.parts | {"total": one.memory.total},
        "moment": one.memory.moment,
        "traffic": [exchange._asdict() for exchange in one.traffic],
        "step_seconds": {
            "compute": one.compute_seconds,
            "exchange": one.exchange_seconds,
            "bubble": one.bubble_seconds,
            "total": one.seconds,
        },
        "cost": spent._asdict(),
    }


def _result(
    name: str,
    gpu: str,
    model: "ModelConfig",
    cluster: "Cluster",
    plans: list[dict[str, Any]],
    assumed: list[str],
) -> dict[str, Any]:
    from pensar.model.count import parameters

    return {
        "size": name,
        "model": complete(model),
        "parameters": parameters(model)._asdict(),
        "gpu": gpu,
        "cluster": complete(cluster),
        "plan": plans[0],
        "others": plans[1:],
        "assumptions": assumed,
    }

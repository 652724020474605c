"""Losses and logits of ours and of transformers from the same weights on the same text, and what rounding alone does.

Experts are chosen by the largest probabilities, and rounding decides between two that are nearly tied. A token that
goes to another expert changes what is learned by far more than rounding, and further tokens follow: two runs of the
same mathematics part. So sparse models are compared three times: in float64, to which hardly a tie is near enough; in
float32 with both sides sending each token to the same experts; and in float32 as they are, beside the peer against
itself under changes of the size of rounding.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.pretrain_learning import text_tokens
from benchmarks.pretrain_steps import (
    DENSE,
    SPARSE,
    Step,
    line,
    our_step,
    peer_is_here,
    peer_name,
    peer_of,
    peer_step,
    rounded,
    started,
)
from pensar.model.attention import Packed
from pensar.model.config import ModelConfig, replace

PARITY = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=384,
    tied=True,
)
"""Heads and rows (256 tokens) as the attention in blocks takes them."""
PARITY_SPARSE = replace(
    PARITY, num_experts=8, experts_per_token=2, moe_intermediate_size=96, router_balance_weight=0.0
)
"""The peer's balance loss is another one than ours, so there is none."""
ROWS = 4
SEEDS = 5
"""Of weights and text."""
AIM = 1e-3
Within = Callable[[], AbstractContextManager[Any]]
Line = dict[str, Any]


def lines(quick: bool) -> Iterator[Line]:
    if not peer_is_here():
        return
    steps, seeds = (20, 2) if quick else (200, SEEDS)
    yield _dense(steps, compiling=not quick)
    yield _float64(steps)
    yield from _sparse(steps, range(seeds), compiling=not quick)
    for kind, config in {"dense": DENSE, "moe": SPARSE}.items():
        apart, largest = logits_apart(config)
        yield line(
            f"logit_parity_{kind}",
            apart,
            None,
            peer_name(),
            "largest difference of any logit, float32",
            target=1e-6,
            sign=-1,
            largest_logit=round(largest, 3),
        )


def losses(config: ModelConfig, steps: int, compiling: bool) -> tuple[list[float], list[float]]:
    """Ours and the peer's, step by step, from the same weights on the same text, AdamW at the same rate."""
    return our_losses(config, steps, compiling=compiling), peer_losses(config, steps)


def our_losses(
    config: ModelConfig, steps: int, seed: int = 0, *, compiling: bool = False, within: Within = nullcontext
) -> list[float]:
    with ExitStack() as stack:
        model, tokens = started(config, seed), text_tokens(ROWS, seed=seed)
        return _taken(our_step(model, tokens, stack, compiling=compiling, within=within), steps)


def peer_losses(
    config: ModelConfig,
    steps: int,
    seed: int = 0,
    *,
    experts: str = "eager",
    fused: bool = False,
    moved: bool = False,
    within: Within = nullcontext,
) -> list[float]:
    """`moved`: from weights each of which is a neighbouring number of float32."""
    model = started(config, seed)
    if moved:
        move(model, seed)
    peer = peer_of(model, **({"experts_implementation": experts} if config.num_experts else {}))
    step = peer_step(peer, text_tokens(ROWS, seed=seed), compiling=False, fused=fused, within=within)
    return _taken(step, steps)


def losses_in_float64(config: ModelConfig, steps: int) -> tuple[list[float], list[float]]:
    """Ours and the peer's with float64 throughout, from the same weights."""
    model, tokens = started(config), text_tokens(ROWS)
    peer = peer_of(model, **({"experts_implementation": "eager"} if config.num_experts else {}))
    with ExitStack() as stack:
        ours = our_step(widened(model), tokens, stack, compiling=False, within=Wide)
        theirs = peer_step(widened(peer), tokens, compiling=False, fused=False, within=Wide)
        return _taken(ours, steps), _taken(theirs, steps)


def apart(some: Iterable[float], others: Iterable[float]) -> float:
    """Largest difference of two lists of losses."""
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


def widened(model: Any) -> Any:
    """With parameters in float64; tables, as those of RoPE, stay as they are on both sides."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    return model


def move(model: nn.Module, seed: int) -> None:
    """Every weight to the next number of float32, up or down by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            up = torch.rand(weight.shape, generator=generator) < 0.5
            weight.copy_(torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)))


class Wide(TorchFunctionMode):
    """Float64 stays float64 where a model asks for float32: in its norms, its router and its softmax."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float:
                return args[0]
            args = tuple(value for value in args if value is not torch.float32)
            if kwargs.get("dtype") is torch.float32:
                del kwargs["dtype"]
            if function is Tensor.to and len(args) == 1 and not kwargs:
                return args[0]
        return function(*args, **kwargs)


class Choices:
    """The experts that one run chose, for others to send their tokens to."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []
        """[N, k] of each layer of each step, in order."""

    def kept(self) -> TorchFunctionMode:
        """Within it they are noted down."""
        return _TopK(self._note)

    def followed(self) -> "Followed":
        return Followed(self.chosen)

    def _note(self, largest_Nk: Tensor, chosen_Nk: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        self.chosen.append(chosen_Nk)
        return largest_Nk, chosen_Nk


class Followed:
    """A run that takes the experts that another chose; `within` of each of its steps."""

    def __init__(self, chosen: Sequence[Tensor]) -> None:
        self._chosen = iter(chosen)
        self.differing = 0
        """Choices, of a token in a layer, that this run would have made otherwise."""
        self.gap = 0.0
        """The largest difference between the probabilities of its own k experts and of the k taken."""

    def within(self) -> TorchFunctionMode:
        return _TopK(self._take)

    def end(self) -> None:
        assert next(self._chosen, None) is None, "choices are left over"

    def _take(self, largest_Nk: Tensor, own_Nk: Tensor, probabilities_NE: Tensor) -> tuple[Tensor, Tensor]:
        chosen_Nk = next(self._chosen)
        taken_Nk = probabilities_NE.gather(1, chosen_Nk)
        self.differing += int((own_Nk.sort().values != chosen_Nk.sort().values).any(-1).sum())
        self.gap = max(self.gap, float((largest_Nk.sum(-1) - taken_Nk.sum(-1)).detach().max()))
        return taken_Nk, chosen_Nk


class _TopK(TorchFunctionMode):
    """Hands values and indices of every top-k [N, E] to `then`, and returns what that returns."""

    def __init__(self, then: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._then = then

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        return self._then(*found, args[0]) if function in (torch.topk, Tensor.topk) else found


def logits_apart(config: ModelConfig) -> tuple[float, float]:
    """Largest difference of any logit in float32, and the largest logit."""
    model = started(config).eval()
    more = {"experts_implementation": "eager"} if config.num_experts else {}
    peer = peer_of(model, **more).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, (2, 300)))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.inference_mode():
        ours = model.logits(model(tokens, positions, Packed()))
        theirs = peer(input_ids=tokens).logits
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def _taken(step: Step, steps: int) -> list[float]:
    return [step() for _ in range(steps)]


def _dense(steps: int, compiling: bool) -> Line:
    ours, theirs = losses(PARITY, steps, compiling)
    return line(
        "loss_parity_dense",
        apart(ours, theirs),
        None,
        peer_name("as written, AdamW"),
        f"nats, largest difference of {steps} losses",
        target=AIM,
        sign=-1,
        first_loss=round(ours[0], 4),
        last_loss=round(ours[-1], 4),
    )


def _float64(steps: int) -> Line:
    ours, theirs = losses_in_float64(PARITY_SPARSE, steps)
    return line(
        "loss_parity_moe_float64",
        apart(ours, theirs),
        None,
        peer_name("experts one by one, AdamW, float64 throughout"),
        f"nats, largest difference of {steps} losses",
        target=1e-10,
        sign=-1,
        first_loss=round(ours[0], 4),
        last_loss=round(ours[-1], 4),
    )


def _sparse(steps: int, seeds: Iterable[int], compiling: bool) -> Iterator[Line]:
    """Ours with the peer's experts, then as it is; the peer's figures are those of itself, its weights moved."""
    config, choices = PARITY_SPARSE, [Choices() for _ in seeds]
    peers = [
        peer_losses(config, steps, seed, within=kept.kept) for seed, kept in zip(seeds, choices, strict=True)
    ]

    def over_seeds(run: Callable[[int], list[float]]) -> list[float]:
        return [apart(run(seed), theirs) for seed, theirs in zip(seeds, peers, strict=True)]

    def following(run: Callable[..., list[float]]) -> tuple[list[float], list[Followed]]:
        runs = [kept.followed() for kept in choices]
        found = over_seeds(lambda seed: run(config, steps, seed, within=runs[seed].within))
        for followed in runs:
            followed.end()
        return found, runs

    ours, runs = following(our_losses)
    theirs, their_runs = following(partial(peer_losses, moved=True))
    yield _over_seeds(
        "loss_parity_moe_same_experts",
        ours,
        theirs,
        steps,
        differing_choices=[run.differing for run in runs],
        peer_differing_choices=[run.differing for run in their_runs],
        largest_gap=rounded(max(run.gap for run in runs)),
    )
    ways: dict[str, dict[str, Any]] = {
        "moved": {"moved": True},
        "grouped_mm": {"experts": "grouped_mm"},
        "fused AdamW": {"fused": True},
    }
    floors = {
        name: over_seeds(lambda seed, more=more: peer_losses(config, steps, seed, **more))  # type: ignore[misc]
        for name, more in ways.items()
    }
    ours = over_seeds(lambda seed: our_losses(config, steps, seed, compiling=compiling))
    yield _over_seeds("loss_parity_moe", ours, floors["moved"], steps, peer_ways=_each(floors))


def _over_seeds(metric: str, ours: list[float], theirs: list[float], steps: int, **more: Any) -> Line:
    return line(
        metric,
        statistics.median(ours),
        statistics.median(theirs),
        peer_name("against itself from neighbouring weights"),
        f"nats, largest difference of {steps} losses, median of {len(ours)} seeds",
        target=AIM,
        sign=-1,
        seeds=_each({"ours": ours, "peer": theirs}),
        **more,
    )


def _each(found: dict[str, list[float]]) -> dict[str, list[float | None]]:
    return {name: [rounded(value) for value in values] for name, values in found.items()}

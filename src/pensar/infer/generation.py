"""How a model wants to be sampled: what its directory says in generation_config.json, and else Qwen3's advice."""

import json
from pathlib import Path
from typing import Any

import msgspec

from pensar.base.errors import ModelError
from pensar.model.weights import GENERATION


class Defaults(msgspec.Struct, frozen=True):
    """Sampling where the caller says nothing."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float = 0.0


# https://huggingface.co/Qwen/Qwen3-8B, "Best Practices".
THINKING_DEFAULTS = Defaults(0.6, 0.95, 20)
DIRECT_DEFAULTS = Defaults(0.7, 0.8, 20)
GREEDY = Defaults(0.0, 1.0, 0)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """A model's own defaults in either mode, and the tokens that end its replies beside the tokenizer's."""

    thinking: Defaults = THINKING_DEFAULTS
    direct: Defaults = DIRECT_DEFAULTS
    end_ids: tuple[int, ...] = ()

    def defaults(self, mode: bool | None) -> Defaults:
        """Sampling for a mode; a mode that is left open is sampled as thinking."""
        return self.direct if mode is False else self.thinking


def read_generation(folder: Path) -> Generation:
    """What a model directory says; the file speaks of thinking, or of both modes where it turns sampling off.

    Raises ModelError for a file that is no JSON object or has a value of the wrong type.
    """
    path = folder / GENERATION
    if not path.is_file():
        return Generation()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object")
    end = content.get("eos_token_id")
    try:
        end_ids = msgspec.convert(
            [] if end is None else end if isinstance(end, list) else [end], tuple[int, ...]
        )
        if content.get("do_sample") is False:
            return Generation(thinking=GREEDY, direct=GREEDY, end_ids=end_ids)
        return Generation(thinking=_thinking(content), end_ids=end_ids)
    except msgspec.ValidationError as error:
        raise ModelError(
            f"{path} has a value of the wrong type: {error}; correct it or leave it out"
        ) from error


def _thinking(content: dict[str, Any]) -> Defaults:
    known = msgspec.structs.asdict(THINKING_DEFAULTS)
    said = {name: content[name] for name in known if content.get(name) is not None}
    return msgspec.convert(known | said, Defaults)

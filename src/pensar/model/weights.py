"""Weights in and out: a model directory in Hugging Face's layout, written and opened without conversion."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pensar.base.errors import ModelError
from pensar.base.files import write_atomic
from pensar.model import tensorfile
from pensar.model.config import ModelConfig
from pensar.model.hf import from_hf, generation_defaults, to_hf
from pensar.model.qwen3 import Qwen3
from pensar.model.tensorfile import OpenFile

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPIED = 2**26
"""Bytes of a model up to which its weights are copied out of its files. There they begin at any eighth byte, where a
product of 8 rows takes a sixth longer than at whole cache lines; larger models wait for memory, not for the cache."""

_STACKED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def save_model(
    model: Qwen3,
    folder: Path,
    *,
    eos_id: int | None = None,
    bos_id: int | None = None,
    pad_id: int | None = None,
) -> None:
    """Writes model.safetensors, config.json and generation_config.json; equal models give equal bytes.

    The weights keep their type. The config is written last, so that a folder with one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensorfile.write(dict(disk_tensors(model)), folder / WEIGHTS)
    dtype = model.model.embed_tokens.weight.dtype
    generation = generation_defaults(eos_id=eos_id, bos_id=bos_id, pad_id=pad_id)
    config = to_hf(model.config, dtype=dtype, eos_id=eos_id, bos_id=bos_id, pad_id=pad_id)
    for name, content in ((GENERATION, generation), (CONFIG, config)):
        write_atomic(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Qwen3:
    """The model of a directory, in evaluation mode; `dtype` None keeps that of the file's embedding.

    The module is built without storage. On a CPU, weights that are asked for as the files hold them stay where they
    are: pages of the files, read when first used, shared by the processes that load them, and copied when written to.
    So replace files by renaming, as `save_model` does, never in place. Other weights, and those of a small model, are
    copied tensor by tensor, and memory peaks at the model and one tensor.
    Call `train()` on it to train. ModelError names the file or tensor and what is wrong with it.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Qwen3(config)
    with ExitStack() as stack:
        files = dict(_open_all(folder, stack))
        _check(model, files, folder)
        dtype = dtype or _dtype(files["model.embed_tokens.weight"], folder)
        mapping = torch.device(device).type == "cpu" and _num_bytes(model, dtype) > COPIED
        for name, parameter in list(model.named_parameters()):
            mapped = files[name].get_tensor(name) if mapping and name in files else None
            if mapped is not None and mapped.dtype == dtype:
                _set(model, name, mapped)
                continue
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            _fill(values, name, files)
            _set(model, name, values)
        if config.tied and "lm_head.weight" in files:
            _check_tied(model, files["lm_head.weight"], folder)
    return model.eval()


@contextmanager
def opened_weights(folder: Path) -> Iterator[Callable[[str, tuple[slice, ...]], Tensor]]:
    """The weights of a directory, to be read part by part: (parameter's name, a slice of each dimension) -> values.

    Only the bytes asked for are read. ModelError names the file or tensor and what is wrong with it.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Qwen3(read_config(folder))
    with ExitStack() as stack:
        files = dict(_open_all(folder, stack))
        _check(model, files, folder)
        width = model.config.moe_intermediate_size

        def read(name: str, window: tuple[slice, ...]) -> Tensor:
            if name in files:
                part: Tensor = files[name].get_slice(name)[window]
                return part
            experts = range(window[0].start, window[0].stop)
            return torch.stack([_expert_part(name, expert, window[1:], width, files) for expert in experts])

        yield read


def _expert_part(
    name: str, expert: int, window: tuple[slice, ...], width: int, files: Mapping[str, OpenFile]
) -> Tensor:
    """Rows and columns of one expert's share of a stacked parameter; gate and up projection lie one on the other."""
    prefix, kind = name.rsplit(".", 1)
    rows, columns = window
    if kind == "down_proj":
        disk = f"{prefix}.{expert}.down_proj.weight"
        return files[disk].get_slice(disk)[rows, columns]  # type: ignore[no-any-return]
    parts = []
    for first, projection in ((0, "gate_proj"), (width, "up_proj")):
        start, stop = max(rows.start - first, 0), min(rows.stop - first, width)
        if start < stop:
            disk = f"{prefix}.{expert}.{projection}.weight"
            parts.append(files[disk].get_slice(disk)[start:stop, columns])
    return torch.cat(parts)


def read_config(folder: Path) -> ModelConfig:
    """The shape that config.json states."""
    path = Path(folder) / CONFIG
    return from_hf(_read_json(path), str(path))


def check_tokenizer(config: ModelConfig, tokenizer_vocab_size: int) -> None:
    """ModelError when the tokenizer can produce ids without an embedding; unused rows are usual and fine."""
    if tokenizer_vocab_size > config.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer_vocab_size:,} tokens, the model {config.vocab_size:,} embeddings; "
            "use the tokenizer that the model was trained with"
        )


def disk_tensors(model: Qwen3) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its name on disk: stacked experts are split, a tied output projection is absent."""
    for name, parameter in model.named_parameters():
        stacked = _STACKED.fullmatch(name)
        if stacked is None:
            yield name, parameter
            continue
        for expert in range(model.config.num_experts):
            yield from _expert_views(name, parameter, expert)


def _expert_views(name: str, stacked: Tensor, expert: int) -> list[tuple[str, Tensor]]:
    """The disk names of one expert's share of a stacked parameter, each with its view."""
    match = _STACKED.fullmatch(name)
    assert match is not None
    prefix = f"{match[1]}.{expert}"
    if match[2] == "down_proj":
        return [(f"{prefix}.down_proj.weight", stacked[expert])]
    gate, up = stacked[expert].chunk(2)
    return [(f"{prefix}.gate_proj.weight", gate), (f"{prefix}.up_proj.weight", up)]


def _open_all(folder: Path, stack: ExitStack) -> Iterator[tuple[str, OpenFile]]:
    """(tensor name, open file that holds it) over the single file or all shards."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        if not (folder / WEIGHTS).exists():
            pickled = next(iter(sorted(folder.glob("pytorch_model*.bin"))), None)
            hint = f"; {pickled.name} is a pickle: convert it to safetensors" if pickled else ""
            raise ModelError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
        file = stack.enter_context(tensorfile.opened(folder / WEIGHTS))
        yield from dict.fromkeys(file.keys(), file).items()
        return
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index} has no weight_map; fetch the file again")
    for shard in sorted(set(weight_map.values())):
        file = stack.enter_context(tensorfile.opened(folder / shard))
        held = set(file.keys())
        for name in sorted(name for name, place in weight_map.items() if place == shard):
            if name not in held:
                raise ModelError(
                    f"{folder / shard} lacks {name}, which {INDEX} places there; fetch both again"
                )
            yield name, file


def _check(model: Qwen3, files: Mapping[str, OpenFile], folder: Path) -> None:
    """Every parameter is there once with its shape, and nothing else is."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        if name in files or not _STACKED.fullmatch(name):
            expected[name] = tuple(parameter.shape)
        else:
            for expert in range(model.config.num_experts):
                expected |= {part: tuple(view.shape) for part, view in _expert_views(name, parameter, expert)}
    missing = [name for name in expected if name not in files]
    surplus = [name for name in files if name not in expected]
    if model.config.tied and "lm_head.weight" in surplus:
        surplus.remove("lm_head.weight")
    if missing or surplus:
        raise ModelError(f"{folder} does not hold the model of its {CONFIG}" + _difference(missing, surplus))
    for name, shape in expected.items():
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise ModelError(
                f"{folder}: {name} has shape {list(found)}, {CONFIG} asks for {list(shape)}; "
                "the two files come from different models"
            )


def _difference(missing: list[str], surplus: list[str]) -> str:
    text = ""
    if missing:
        near = difflib.get_close_matches(missing[0], surplus, n=2)
        text += f"; {len(missing)} tensors are missing, first {missing[0]}"
        text += f" (nearest in the file: {', '.join(near)})" if near else ""
        if missing == ["lm_head.weight"]:
            text += " (a model without one sets tie_word_embeddings to true)"
    if surplus:
        text += f"; {len(surplus)} tensors are not part of it, first {surplus[0]}"
    return text


def _fill(values: Tensor, name: str, files: Mapping[str, OpenFile]) -> None:
    parts: Iterable[tuple[str, Tensor]] = [(name, values)]
    if name not in files:
        parts = (part for expert in range(len(values)) for part in _expert_views(name, values, expert))
    for part, view in parts:
        view.copy_(files[part].get_tensor(part))


def _num_bytes(model: Qwen3, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _set(model: nn.Module, name: str, values: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(values))


def _check_tied(model: Qwen3, file: OpenFile, folder: Path) -> None:
    embedding = model.model.embed_tokens.weight
    if not torch.equal(file.get_tensor("lm_head.weight").to(embedding), embedding):
        raise ModelError(
            f"{folder}: {CONFIG} ties lm_head.weight to the embedding and the file holds a different one; "
            "set tie_word_embeddings to false to use it"
        )


def _dtype(file: OpenFile, folder: Path) -> torch.dtype:
    """That of the embedding."""
    name = file.get_slice("model.embed_tokens.weight").get_dtype()
    if name not in tensorfile.DTYPES:
        raise ModelError(f"{folder} holds {name} weights; Pensar opens {', '.join(tensorfile.DTYPES)}")
    return tensorfile.DTYPES[name]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path} does not exist; a model directory has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not an object")
    return content

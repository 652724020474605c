"""Loading a checkpoint of the 0.6b shape against reading its bytes, in one file and in shards, from a warm cache.

Reading is `read` of every file into one buffer that has been written to before, so that it is nothing but the copy.
Loading ends when every page of every weight has been looked at. Whoever copies into memory of its own pays for that
memory too: reading into a new buffer is given beside.
"""

import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.pretrain_memory import in_fresh_process, touched
from benchmarks.pretrain_steps import interleaved, line, paired, timed
from pensar.model.config import ModelConfig, replace
from pensar.model.qwen3 import Qwen3
from pensar.model.sizes import SIZES
from pensar.model.weights import INDEX, WEIGHTS, load_model, save_model

SHARDS = 3


def load_lines(folder: Path, quick: bool) -> Iterator[dict[str, object]]:
    """A line for time and one for memory, for each layout of the files."""
    shape = SIZES["0.6b"]
    model = random_model(replace(shape, num_layers=4) if quick else shape)
    single, sharded = folder / "single", folder / "sharded"
    save_model(model, single)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    shard(single, sharded)
    for name, place in (("single", single), ("sharded", sharded)):
        buffer = torch.zeros(sum(file.stat().st_size for file in files_of(place)), dtype=torch.uint8)
        seconds = interleaved(
            {
                "load": timed(partial(_load, place)),
                "read": timed(partial(read, place, buffer)),
                "read into a new buffer": timed(partial(_read_anew, place, len(buffer))),
            },
            rounds=3 if quick else 9,
        )
        median = {kind: statistics.median(spent) for kind, spent in seconds.items()}
        yield line(
            f"load_vs_read_{name}",
            median["load"],
            median["read"],
            "read() into a buffer",
            f"CPU-seconds for {num_bytes / 2**20:,.0f} MiB",
            ratio=paired(seconds["load"], seconds["read"]),
            new_buffer=round(median["read into a new buffer"], 4),
        ) | {"target": round(1 / 1.2, 3), "reached": median["load"] <= 1.2 * median["read"]}
        peak = in_fresh_process(f"load_peak({str(place)!r})")
        yield line(
            f"load_memory_{name}",
            peak / num_bytes,
            None,
            "the weights themselves",
            "peak memory as a share of the weights",
            target=1.1,
            sign=-1,
        )


def random_model(config: ModelConfig) -> Qwen3:
    """bfloat16 weights; drawn once and repeated, which the bytes do not show."""
    with torch.device("meta"):
        model = Qwen3(config).bfloat16()
    model = model.to_empty(device="cpu")
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(drawn)):
                part = flat[start : start + len(drawn)]
                part.copy_(drawn[: len(part)])
    return model


def shard(single: Path, sharded: Path, num: int = SHARDS) -> None:
    """The same weights in so many files and their index."""
    sharded.mkdir()
    tensors = load_file(single / WEIGHTS)
    places: dict[str, str] = {}
    for number in range(num):
        name = f"model-{number + 1:05}-of-{num:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::num]}
        save_file(part, sharded / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (sharded / "config.json").write_bytes((single / "config.json").read_bytes())


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _load(folder: Path) -> int:
    return touched(load_model(folder))


def _read_anew(folder: Path, size: int) -> int:
    return read(folder, torch.empty(size, dtype=torch.uint8))


def read(folder: Path, buffer: torch.Tensor) -> int:
    """Bytes of all weight files, one after the other into the buffer."""
    view, at = buffer.numpy().data, 0
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(view[at:]):
                at += count
    return at

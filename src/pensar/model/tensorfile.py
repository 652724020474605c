"""Safetensors files: a writer that streams tensor by tensor, and a reader that says what is wrong.

Format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, byte range), then the bytes
(https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pensar.base.errors import ModelError
from pensar.base.files import atomic_path

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class OpenFile(Protocol):
    """The part of safetensors' reader that is used here."""

    def keys(self) -> list[str]:
        """Names of the tensors."""
        ...

    def metadata(self) -> dict[str, str] | None:
        """What the header says beside the tensors."""
        ...

    def get_slice(self, name: str) -> Any:
        """The tensor without its values: get_shape(), get_dtype()."""
        ...

    def get_tensor(self, name: str) -> Tensor:
        """The tensor."""
        ...


def write(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the tensors beside `path` and renames; equal tensors and `metadata` give equal bytes.

    Wider types come first, names in order within a type, as the reference writer does, so that every tensor
    is aligned. Raises RunError when the disk is full.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in order:
        begin, end = end, end + tensor.dtype.itemsize * tensor.numel()
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path, 8 + len(text) + end) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in order:
            values = tensor.detach().cpu().contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """The file opened for reading, tensor by tensor; ModelError when it is missing, cut short or damaged."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist; fetch the file again")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} {_what_is_wrong(path, error)}; fetch the file again") from error
    with file as handle:
        yield handle


def _what_is_wrong(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    if size < 8:
        return f"is cut short: {size} bytes, less than a safetensors header"
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "is a Git LFS pointer, not the weights themselves"
        length = int.from_bytes(start, "little")
        if length > size - 8:
            claim = f"its header should take {length:,} bytes, {size - 8:,} follow"
            return f"is cut short or no safetensors file: {claim}"
        try:
            header = json.loads(file.read(length))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"has a damaged header ({error})"
    if end != size - 8 - length:
        return f"should hold {8 + length + end:,} bytes by its header and holds {size:,}"
    return f"is not readable as safetensors ({error})"

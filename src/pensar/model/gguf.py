"""GGUF: a model directory as one file for llama.cpp and what reads its files (Ollama, LM Studio, OpenVINO GenAI).

Format (github.com/ggml-org/ggml, docs/gguf.md): the letters GGUF, version 3, counts of tensors and of keys, the keys
with their types, the list of tensors (name, dimensions from the last to the first, type, offset), then the tensors,
each at a multiple of 32 bytes, all in little-endian. Keys and names of tensors are those of llama.cpp's own converter.
"""

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pensar.base.errors import ConfigError, ModelError
from pensar.base.files import atomic_path
from pensar.model.config import ModelConfig
from pensar.model.ggml import KINDS, Kind, row_bytes
from pensar.model.hf import to_hf
from pensar.model.qwen3 import Qwen3
from pensar.model.weights import GENERATION, check_tokenizer, load_model
from pensar.text.tokenizer import CONFIG_FILE, SPLIT, TOKENIZER_FILE, Tokenizer

VERSION = 3
ALIGNMENT = 32
CHUNK = 2**24
"""Values converted at a time."""

PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
"""llama.cpp's names; within a layer they follow `blk.<number>.`."""
ALWAYS_FLOAT32 = ("norm.weight", "ffn_gate_inp.weight")

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's kinds of tokens."""

_TYPES = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}
_STRING, _ARRAY = 8, 9


class Value(NamedTuple):
    """A key's value; `of` is its type: u32, i32, f32, bool, string, or [i32] and [string] for lists of them."""

    of: str
    content: Any


class Part(NamedTuple):
    """A tensor of the file."""

    name: str
    values: Tensor
    kind: Kind


def export_gguf(folder: Path, out: Path, kind: str = "q8_0") -> Path:
    """Writes the model directory `folder` as the file `out` with its matrices in `kind`, a name of KINDS; returns it.

    Norms and routers stay float32; a matrix whose rows are not whole blocks becomes float16, as the converter does.
    ConfigError for an unknown kind; ModelError where a weight does not fit or the tokenizer is not Qwen's.
    """
    if kind not in KINDS:
        raise ConfigError(f"GGUF kind {kind!r} is not one of {', '.join(KINDS)}")
    folder, out = Path(folder), Path(out)
    model = load_model(folder)
    keys = _shape_keys(model.config) | {
        "general.file_type": Value("u32", KINDS[kind].file_type),
        "general.quantization_version": Value("u32", 2),
    }
    keys |= _sampling_keys(folder) | _tokenizer_keys(folder, model.config)
    write(keys, list(_parts(model, kind)), out)
    return out


def write(keys: Mapping[str, Value], parts: Sequence[Part], out: Path) -> None:
    """Writes keys and tensors beside `out` and renames; equal values give equal bytes."""
    header = [b"GGUF", struct.pack("<IQQ", VERSION, len(parts), len(keys))]
    header += [_string(name) + _tagged(value) for name, value in keys.items()]
    offset = 0
    for part in parts:
        dimensions = part.values.shape[::-1]
        header.append(_string(part.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        header.append(struct.pack("<IQ", part.kind.number, offset))
        offset += _padded(_num_bytes(part))
    start = b"".join(header)
    start += bytes(_padded(len(start)) - len(start))
    with atomic_path(out, len(start) + offset) as partial, partial.open("wb") as file:
        file.write(start)
        for part in parts:
            for stored in _stored(part):
                file.write(stored.numpy().data)
            size = _num_bytes(part)
            file.write(bytes(_padded(size) - size))


# ---------------------------------------------------------------- what is said of the model


def _shape_keys(config: ModelConfig) -> dict[str, Value]:
    name = "qwen3moe" if config.num_experts else "qwen3"
    width = to_hf(config)["intermediate_size"]
    keys = {
        "block_count": Value("u32", config.num_layers),
        "context_length": Value("u32", config.max_positions),
        "embedding_length": Value("u32", config.hidden_size),
        "feed_forward_length": Value("u32", width),
        "attention.head_count": Value("u32", config.num_heads),
        "attention.head_count_kv": Value("u32", config.num_kv_heads),
        "attention.key_length": Value("u32", config.head_dim),
        "attention.value_length": Value("u32", config.head_dim),
        "attention.layer_norm_rms_epsilon": Value("f32", config.rms_norm_eps),
        "rope.freq_base": Value("f32", config.rope_theta),
    }
    if config.num_experts:
        if not config.norm_topk_prob:
            raise ModelError(
                "norm_topk_prob is false; llama.cpp renormalises the weights of Qwen3's experts always, so the file "
                "would compute another model"
            )
        keys["expert_count"] = Value("u32", config.num_experts)
        keys["expert_used_count"] = Value("u32", config.experts_per_token)
        keys["expert_feed_forward_length"] = Value("u32", config.moe_intermediate_size)
    yarn = config.rope_scaling
    if yarn is not None:
        keys["rope.scaling.type"] = Value("string", "yarn")
        keys["rope.scaling.factor"] = Value("f32", yarn.factor)
        keys["rope.scaling.original_context_length"] = Value("u32", yarn.original_max_positions)
        if yarn.attention_factor is not None:
            keys["rope.scaling.yarn_attn_factor"] = Value("f32", yarn.attention_factor)
        keys["rope.scaling.yarn_beta_fast"] = Value("f32", yarn.beta_fast)
        keys["rope.scaling.yarn_beta_slow"] = Value("f32", yarn.beta_slow)
    general = {
        "general.architecture": Value("string", name),
        "general.type": Value("string", "model"),
    }
    return general | {f"{name}.{key}": value for key, value in keys.items()}


def _sampling_keys(folder: Path) -> dict[str, Value]:
    """How the model likes to be sampled."""
    path = folder / GENERATION
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {"top_k": ("top_k", "i32"), "top_p": ("top_p", "f32"), "temperature": ("temp", "f32")}
    return {
        f"general.sampling.{names[key][0]}": Value(names[key][1], content[key])
        for key in names
        if content.get(key) is not None
    }


def _tokenizer_keys(folder: Path, config: ModelConfig) -> dict[str, Value]:
    tokenizer = Tokenizer.load(folder)
    check_tokenizer(config, tokenizer.vocab_size)
    content = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    if SPLIT not in _patterns(content.get("pre_tokenizer") or {}):
        raise ModelError(
            f"{folder / TOKENIZER_FILE} does not cut texts as Qwen does before merging; llama.cpp would encode them "
            "otherwise than the model was trained with, so there is no GGUF file for it"
        )
    tokens, kinds = _tokens(content, config.vocab_size)
    named = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    keys = {
        "tokenizer.ggml.model": Value("string", "gpt2"),
        "tokenizer.ggml.pre": Value("string", "qwen2"),
        "tokenizer.ggml.tokens": Value("[string]", tokens),
        "tokenizer.ggml.token_type": Value("[i32]", kinds),
        "tokenizer.ggml.merges": Value("[string]", list(_merges(content["model"]["merges"]))),
        "tokenizer.ggml.eos_token_id": Value("u32", tokenizer.eos_id),
        "tokenizer.ggml.padding_token_id": Value("u32", tokenizer.pad_id),
        "tokenizer.ggml.add_bos_token": Value("bool", bool(named.get("add_bos_token"))),
    }
    if tokenizer.chat_template is not None:
        keys["tokenizer.chat_template"] = Value("string", tokenizer.chat_template)
    return keys


def _patterns(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    """The splitting expressions of a pre-tokenizer."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [step["pattern"].get("Regex", "") for step in steps if isinstance(step.get("pattern"), dict)]


def _tokens(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Every id's token and kind; rows of the embedding that no token has are named as padding."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for added in content["added_tokens"]:
        name, number = added["content"], added["id"]
        # The tags of tools and fill-in-the-middle are not special and yet must never be spelled by a text.
        control = added["special"] or (name.startswith("<|") and name.endswith("|>"))
        tokens[number], kinds[number] = name, CONTROL if control else USER_DEFINED
    return tokens, kinds


def _merges(merges: Iterable[Any]) -> Iterator[str]:
    for merge in merges:
        yield merge if isinstance(merge, str) else " ".join(merge)


# ---------------------------------------------------------------- tensors


def _parts(model: Qwen3, kind: str) -> Iterator[Part]:
    for name, values in _named(model):
        place, number = name.removesuffix(".weight"), ""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", place)
        if match:
            number, place = f"blk.{match[1]}.", match[2]
        target = f"{number}{PLACES[place]}.weight"
        chosen = KINDS[kind]
        if values.dim() == 1 or target.endswith(ALWAYS_FLOAT32):
            chosen = KINDS["f32"]
        elif values.shape[-1] % chosen.block:
            chosen = KINDS["f16"]
        yield Part(target, values.detach(), chosen)


def _named(model: Qwen3) -> Iterator[tuple[str, Tensor]]:
    """Parameters, the two matrices that lie on one another in our experts apart."""
    for name, values in model.named_parameters():
        if name.endswith(".experts.gate_up_proj"):
            gate, up = values.chunk(2, dim=1)
            yield name.replace("gate_up_proj", "gate_proj"), gate
            yield name.replace("gate_up_proj", "up_proj"), up
        else:
            yield name, values


def _stored(part: Part) -> Iterator[Tensor]:
    """The bytes of a tensor, some rows at a time."""
    columns = part.values.shape[-1]
    for block in part.values.reshape(-1, columns).split(max(1, CHUNK // columns)):
        values = block.cpu().float()
        if not bool(values.isfinite().all()):
            raise ModelError(f"{part.name} holds values that are not finite; the checkpoint is broken")
        stored = part.kind.stored(values)
        if part.kind.num_bytes != 4 and not bool(part.kind.values(stored).isfinite().all()):
            raise ModelError(
                f"{part.name} holds {float(values.abs().max()):g}, more than float16 can; write f32 or bf16"
            )
        yield stored


def _num_bytes(part: Part) -> int:
    columns = part.values.shape[-1]
    return part.values.numel() // columns * row_bytes(part.kind, columns)


# ---------------------------------------------------------------- bytes


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _tagged(value: Value) -> bytes:
    """A value after the number of its type."""
    if value.of.startswith("["):
        of = value.of.strip("[]")
        number = _STRING if of == "string" else _TYPES[of][0]
        items = b"".join(_bytes(of, item) for item in value.content)
        return struct.pack("<IIQ", _ARRAY, number, len(value.content)) + items
    number = _STRING if value.of == "string" else _TYPES[value.of][0]
    return struct.pack("<I", number) + _bytes(value.of, value.content)


def _bytes(of: str, content: Any) -> bytes:
    return _string(content) if of == "string" else struct.pack(_TYPES[of][1], content)

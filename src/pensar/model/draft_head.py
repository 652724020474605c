"""DraftHead: one block that guesses, from the model's last state and its next token, the state after that token.

With the model's own embedding and output projection this gives guesses of the tokens to come, one for each pass of the
block. EAGLE (arXiv 2401.15077) is the idea; names and order of the parts are those of DeepSeek-V3's multi-token
prediction (arXiv 2412.19437, section 2.2). The model stays as it is.
Shape legend: B batch, T tokens, D hidden.
"""

from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from pensar.base.errors import ModelError
from pensar.base.files import write_atomic
from pensar.model import tensorfile
from pensar.model.attention import Attend
from pensar.model.config import ModelConfig
from pensar.model.config import replace as with_values
from pensar.model.qwen3 import Block, Qwen3, RMSNorm, initial_values

WEIGHTS, CONFIG = "draft_head.safetensors", "draft_head.json"
WINDOW = 128
"""States that a guess looks back on, by default."""


class DraftBlock(Block):
    """A dense block whose input is made of two normalised vectors: a token's embedding and the state before it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, 0)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def joined(self, embedded_BTD: Tensor, hidden_BTD: Tensor) -> Tensor:
        """The block's input [B, T, D]."""
        joined_BTD: Tensor = self.eh_proj(torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), -1))
        return joined_BTD


class DraftBody(nn.Module):
    """The parts with weights, named as in a model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DraftBlock(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DraftHead(nn.Module):
    """`states = head(model, tokens, hidden, positions, attend)`, and `model.logits(states)` are the guesses' scores.

    Entry t joins the state that the model ended with at position t and the token at t + 1. What comes out stands for
    the state at t + 1, which scores the token at t + 2, and can itself be the `hidden` of the next entry.
    An entry attends to the `window` last ones of its reply, the one at the prompt's last token the first of them.
    """

    def __init__(self, config: ModelConfig, window: int = WINDOW) -> None:
        super().__init__()
        if window < 1:
            raise ModelError(f"a draft head's window is {window}; it must be at least 1")
        self.config, self.window = dense_block(config), window
        self.model = DraftBody(self.config)

    def forward(
        self, model: Qwen3, tokens_BT: Tensor, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        """States [B, T, D] after the head's norm, in the type of its weights."""
        block = self.model.layers[0]
        assert isinstance(block, DraftBlock)
        dtype = block.eh_proj.weight.dtype
        embedded_BTD = model.model.embed_tokens(tokens_BT).to(dtype)
        cos, sin = model.rope_tables(positions_BT)
        x_BTD = block.joined(embedded_BTD, hidden_BTD.to(dtype))
        out_BTD: Tensor = self.model.norm(block(x_BTD, cos.to(dtype), sin.to(dtype), attend))
        return out_BTD

    def save(self, folder: Path) -> None:
        """Writes draft_head.safetensors and draft_head.json; equal heads give equal bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        tensorfile.write(dict(self.named_parameters()), folder / WEIGHTS)
        content = {"window": self.window, "shape": _shape(self.config)}
        write_atomic(folder / CONFIG, msgspec.json.format(msgspec.json.encode(content)) + b"\n")

    @classmethod
    def load(cls, folder: Path, model: Qwen3) -> "DraftHead":
        """The head of a folder, where the model is and in its type; ModelError where it is of another shape."""
        path = folder / CONFIG
        if not path.is_file():
            raise ModelError(f"{path} does not exist; train a draft head, or give the folder of one")
        try:
            content = msgspec.json.decode(path.read_bytes(), type=_Content)
        except msgspec.DecodeError as error:
            raise ModelError(f"{path} does not describe a draft head: {error}") from error
        head = cls(model.config, content.window)
        wanted = _shape(head.config)
        odd = sorted(key for key in wanted if content.shape.get(key) != wanted[key])
        if odd:
            raise ModelError(
                f"{path} is of a model with {odd[0]} {content.shape.get(odd[0])}, this one has {wanted[odd[0]]}; a "
                "draft head belongs to the model that it was trained for"
            )
        with tensorfile.opened(folder / WEIGHTS) as file:
            there = set(file.keys())
            for name, parameter in head.named_parameters():
                if name not in there or list(file.get_slice(name).get_shape()) != list(parameter.shape):
                    raise ModelError(f"{folder / WEIGHTS} has no {name} of shape {list(parameter.shape)}")
                parameter.data.copy_(file.get_tensor(name))
        weight = model.model.embed_tokens.weight
        return head.to(weight.device, weight.dtype).eval()


def initialize_head(head: DraftHead, seed: int) -> None:
    """Like a model's block, and the state is handed on: what comes in as `hidden` is where training begins."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(initial_values(name, parameter.shape, head.config, seed))
            if name.endswith("eh_proj.weight"):
                parameter[:, len(parameter) :] += torch.eye(len(parameter))


def dense_block(config: ModelConfig) -> ModelConfig:
    """The shape of a draft head's block: the model's own, or as wide as the experts of a token together."""
    if not config.num_experts:
        return with_values(config, num_layers=1)
    width = config.experts_per_token * config.moe_intermediate_size
    return with_values(
        config,
        num_layers=1,
        num_experts=0,
        experts_per_token=0,
        moe_intermediate_size=0,
        intermediate_size=width,
    )


class _Content(msgspec.Struct, frozen=True):
    window: int
    shape: dict[str, int]


def _shape(config: ModelConfig) -> dict[str, int]:
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "vocab_size")
    return {name: getattr(config, name) for name in names}

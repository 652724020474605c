"""A runner whose next token depends on the last two alone, by a table: exact, so that equal texts have equal logits."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pensar.infer.adapters import Adapter
from pensar.infer.request import Ints
from pensar.infer.sampling import weigh
from pensar.infer.step import PAGE, StepBatch, StepOutput
from pensar.model.config import ModelConfig
from pensar.model.qwen3 import Qwen3


class MarkovRunner:
    """Keeps tokens in its pages, as a model keeps keys, and reads the last two of a text from there."""

    weigh = staticmethod(weigh)
    lazy_room = False

    def __init__(self, vocabulary: int, *, seed: int = 0, sharpness: float = 2.0, noise: float = 0.0) -> None:
        shape = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
        self.config = ModelConfig(vocab_size=vocabulary, intermediate_size=8, max_positions=4096, **shape)
        self.model = Qwen3(self.config).eval()
        self.device = torch.device("cpu")
        generator = torch.Generator().manual_seed(seed)
        self.table = sharpness * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator)
        self.table += noise * torch.randn(self.table.shape, generator=torch.Generator().manual_seed(seed + 1))
        self.pages = np.full((1, PAGE), -1)
        self.num_passes = self.num_computed = 0

    def reserve(self, num_pages: int) -> None:
        more = num_pages - len(self.pages)
        if more > 0:
            self.pages = np.concatenate((self.pages, np.full((more, PAGE), -1)))

    def run(self, batch: StepBatch) -> StepOutput:
        rows = np.repeat(np.arange(len(batch.lengths_R)), np.diff(batch.starts))
        at = batch.positions_N
        self.pages[batch.pages_RP[rows, at // PAGE], at % PAGE] = batch.tokens_N
        before = np.maximum(at - 1, 0)
        previous = np.where(at > 0, self.pages[batch.pages_RP[rows, before // PAGE], before % PAGE], 0)
        assert (previous >= 0).all(), "a position was read before it was written"
        self.num_passes += 1
        self.num_computed += len(at)
        wanted = batch.wanted_S
        logits = self.table[previous[wanted], batch.tokens_N[wanted]].clone()
        # What a state is does not matter here, but whose it is does.
        hidden = torch.zeros(len(wanted), self.config.hidden_size)
        hidden[:, 0] = torch.from_numpy(at[wanted])
        hidden[:, 1] = torch.from_numpy(batch.tokens_N[wanted])
        return StepOutput(logits, hidden)

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        self.pages[targets] = self.pages[sources]

    def wipe_pages(self, pages: Ints) -> None:
        self.pages[pages] = -1

    def load(self, weights: Mapping[str, Tensor] | Qwen3) -> None:
        raise NotImplementedError

    def set_adapter(self, number: int, adapter: Adapter | None) -> None:
        raise NotImplementedError

    def weight_bytes(self) -> int:
        return int(self.table.nbytes)

    def step_bytes(self, tokens: int, texts: int) -> int:
        return 8 * tokens

    def page_bytes(self) -> int:
        return PAGE * 8

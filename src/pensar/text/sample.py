"""Sample: a token sequence with one weight stream per loss term, the only training row there is.

Pre-training sets `ce` to one everywhere; supervised fine-tuning sets it on the assistant's tokens; reinforcement
learning sets `pg` to the advantage and keeps the behaviour log-probabilities; distillation sets `kl`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Every array has one entry per token; entry t concerns the prediction of `tokens[t]` from `tokens[:t]`.

    Entry 0 of each stream is therefore without effect: nothing predicts the first token.
    """

    tokens: Ints
    ce: Floats | None = None
    """Weight of the cross-entropy."""
    pg: Floats | None = None
    """Advantage of the policy gradient; zero where the token was not sampled by the policy."""
    kl: Floats | None = None
    """Weight of the divergence from the teacher."""
    behaviour: Floats | None = None
    """Log-probability that the sampling policy gave each token."""
    source: str = ""
    """What the sample came from: a document or task id, for lineage and for loss by domain."""

    def __len__(self) -> int:
        return len(self.tokens)

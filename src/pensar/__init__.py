"""Pensar: a language model's whole life, from raw documents to a served answer with a thinking budget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pensar.infer.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    """`pensar.LLM` loads torch only when it is asked for."""
    if name == "LLM":
        from pensar.infer.llm import LLM

        return LLM
    raise AttributeError(f"module 'pensar' has no attribute {name!r}")

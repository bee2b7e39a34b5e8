"""qnext: Qwen3-Next, complete. Train it, run it, serve it.

Public names are loaded on first use: ``import qnext`` costs nothing and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnext.config import ModelConfig
    from qnext.engine.request import SamplingParams, StructuredOutputs
    from qnext.llm import LLM
    from qnext.weights.checkpoint import load_model, save_model

__version__ = "0.1.0"

_HOMES = {
    "LLM": "qnext.llm",
    "ModelConfig": "qnext.config",
    "SamplingParams": "qnext.engine.request",
    "StructuredOutputs": "qnext.engine.request",
    "load_model": "qnext.weights.checkpoint",
    "save_model": "qnext.weights.checkpoint",
}

__all__ = ["LLM", "ModelConfig", "SamplingParams", "StructuredOutputs", "__version__",
           "load_model", "save_model"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qnext' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__

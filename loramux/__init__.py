"""loramux: one base model, thousands of LoRA adapters, one OpenAI-compatible server.

The public names. `LLM` is loaded lazily, so that the server process and plugins never import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramux.resolvers.base import Resolver, ResolverContext
from loramux.version import __version__

if TYPE_CHECKING:
    from loramux.llm import LLM, LoRARequest, RequestOutput, SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM",
    "LoRARequest",
    "RequestOutput",
    "Resolver",
    "ResolverContext",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_LAZY = {
    "LLM": "loramux.llm",
    "LoRARequest": "loramux.llm",
    "RequestOutput": "loramux.llm",
    "SamplingParams": "loramux.llm",
    "StructuredOutputsParams": "loramux.llm",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'loramux' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)

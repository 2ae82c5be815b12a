"""Train dense Hugging Face causal language models in plain PyTorch, with fused projections.

The public names are imported on first use, so that ``import nemo_automodel`` (and ``automodel --help``) stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_automodel._transformers import (
        NeMoAutoModelForCausalLM as NeMoAutoModelForCausalLM,
    )
    from nemo_automodel._transformers import (
        NeMoAutoModelForSequenceClassification as NeMoAutoModelForSequenceClassification,
    )

__version__ = "0.1.0"
__all__ = ["NeMoAutoModelForCausalLM", "NeMoAutoModelForSequenceClassification", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("nemo_automodel._transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

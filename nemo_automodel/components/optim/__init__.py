"""AdamW on fp32 master weights, and the learning-rate schedule."""

from nemo_automodel.components.optim.adamw import MasterAdamW, OptimConfig

__all__ = ["MasterAdamW", "OptimConfig"]

"""Several ranks that train one model."""

from nemo_automodel.components.distributed.fsdp import fully_shard_layers, join_ranks

__all__ = ["fully_shard_layers", "join_ranks"]

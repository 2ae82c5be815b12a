"""Several ranks that train one model."""

from nemo_automodel.components.distributed.fsdp import fully_shard_layers, join_ranks
from nemo_automodel.components.distributed.tensor import parallelize_tensors

__all__ = ["fully_shard_layers", "join_ranks", "parallelize_tensors"]

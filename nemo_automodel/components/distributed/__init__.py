"""Several ranks that train one model."""

from nemo_automodel.components.distributed.context import (
    NotShared,
    check_shares_sequences,
    parallelize_context,
)
from nemo_automodel.components.distributed.fsdp import fully_shard_layers, join_ranks
from nemo_automodel.components.distributed.mesh import ALONE, Mesh, MeshConfig, part_of
from nemo_automodel.components.distributed.parallelize import Options, parallelize
from nemo_automodel.components.distributed.pipeline import Pipeline, saved_name
from nemo_automodel.components.distributed.replicas import diverged
from nemo_automodel.components.distributed.tensor import parallelize_tensors

__all__ = [
    "ALONE",
    "Mesh",
    "MeshConfig",
    "NotShared",
    "Options",
    "Pipeline",
    "check_shares_sequences",
    "diverged",
    "fully_shard_layers",
    "join_ranks",
    "parallelize",
    "parallelize_context",
    "parallelize_tensors",
    "part_of",
    "saved_name",
]

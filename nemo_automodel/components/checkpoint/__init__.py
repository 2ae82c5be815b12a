"""Reading and writing safetensors checkpoints and training state. No pickle is read or written."""

from nemo_automodel.components.checkpoint.block_fp8 import open_checkpoint
from nemo_automodel.components.checkpoint.loading import load_parameters
from nemo_automodel.components.checkpoint.reading import CheckpointError, SafetensorsReader, TensorReader
from nemo_automodel.components.checkpoint.training_state import TrainingCheckpoints
from nemo_automodel.components.checkpoint.writing import publish_folder, write_shards

__all__ = [
    "CheckpointError",
    "SafetensorsReader",
    "TensorReader",
    "TrainingCheckpoints",
    "load_parameters",
    "open_checkpoint",
    "publish_folder",
    "write_shards",
]

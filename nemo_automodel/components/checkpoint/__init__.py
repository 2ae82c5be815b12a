"""Reading and writing safetensors checkpoints and training state. No pickle is read or written."""

from nemo_automodel.components.checkpoint.loading import load_parameters
from nemo_automodel.components.checkpoint.reading import CheckpointError, SafetensorsReader
from nemo_automodel.components.checkpoint.training_state import TrainingCheckpoints
from nemo_automodel.components.checkpoint.writing import publish_folder, write_shards

__all__ = [
    "CheckpointError",
    "SafetensorsReader",
    "TrainingCheckpoints",
    "load_parameters",
    "publish_folder",
    "write_shards",
]

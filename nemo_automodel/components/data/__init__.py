"""Rows of text or conversations as batches of token ids.

    load_rows -> Renderer (text, characters to learn) -> Encoder (token ids, labels) -> Examples -> BatchStream

`build_dataset` is all but the last step. transformers is never imported (tokenizers are passed in), and `datasets` only
where it loads: both cost seconds.
"""

from nemo_automodel.components.data.batches import Batch, collate, collate_packed, pack
from nemo_automodel.components.data.config import DataConfig
from nemo_automodel.components.data.dataset import Audit, build_dataset
from nemo_automodel.components.data.examples import IGNORED, Example, Examples, preview
from nemo_automodel.components.data.sources import load_rows
from nemo_automodel.components.data.stream import BatchStream, micro_batches

__all__ = [
    "IGNORED",
    "Audit",
    "Batch",
    "BatchStream",
    "DataConfig",
    "Example",
    "Examples",
    "build_dataset",
    "collate",
    "collate_packed",
    "load_rows",
    "micro_batches",
    "pack",
    "preview",
]

"""What the user may choose about the data."""

from dataclasses import dataclass, field
from typing import Literal, get_args

Overlong = Literal["drop", "truncate", "split", "error"]
Unsupervised = Literal["error", "drop"]
AssistantTurns = Literal["all", "last"]


@dataclass(kw_only=True)
class DataConfig:
    """Where the rows come from and how they become token ids.

    Raises:
        ValueError: a value is out of range; the message names the field.
    """

    train: str = field(
        metadata={
            "help": "Training rows: a .jsonl, .json, .parquet or .csv file, a folder of them or of save_to_disk, or a "
            "Hugging Face data set (name or name:config). Rows have messages, prompt and completion, or text."
        }
    )
    validation: str | None = field(
        default=None, metadata={"help": "Validation rows, given like train. Null: no validation."}
    )
    train_split: str | None = field(
        default=None,
        metadata={"help": "Split of train, slices allowed: train[:95%]. A plain file has one split, named train."},
    )
    validation_split: str | None = field(
        default=None, metadata={"help": "Split of validation, slices allowed: train[95%:]."}
    )
    limit: int | None = field(default=None, metadata={"help": "Read only the first so many rows of each source."})
    max_length: int = field(default=2048, metadata={"help": "Longest example in tokens; the row length if packing."})
    packing: bool = field(
        default=False,
        metadata={"help": "Fill rows of max_length tokens with whole documents that do not see each other."},
    )
    overlong: Overlong = field(
        default="drop",
        metadata={"help": "What becomes of a row longer than max_length. split (text rows only): several examples."},
    )
    unsupervised: Unsupervised = field(
        default="error", metadata={"help": "What becomes of a row that has no token to learn from."}
    )
    assistant_turns: AssistantTurns = field(
        default="all", metadata={"help": "Which assistant turns of a conversation are learned."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "A Jinja file to use in place of the tokenizer's own chat template."}
    )
    shuffle: bool = field(default=True, metadata={"help": "Train in a new random order each epoch."})

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train must name a file, a folder or a data set")
        if self.validation is None and self.validation_split is not None:
            raise ValueError("validation_split needs validation: the file, folder or data set that it is a split of")
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: one token to read and one to predict")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1, or null for all rows")
        for name, kind in (("overlong", Overlong), ("unsupervised", Unsupervised), ("assistant_turns", AssistantTurns)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}")

"""The config's limits, and what importing the component costs."""

import subprocess
import sys
from dataclasses import fields

import pytest

from nemo_automodel.components.data import DataConfig


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("train", {"train": ""}),
        ("validation_split", {"validation_split": "test"}),
        ("max_length", {"max_length": 1}),
        ("limit", {"limit": 0}),
        ("overlong", {"overlong": "keep"}),
        ("unsupervised", {"unsupervised": "keep"}),
        ("assistant_turns", {"assistant_turns": "first"}),
    ],
)
def test_bad_values_are_named(name, values):
    with pytest.raises(ValueError, match=rf"^{name} "):
        DataConfig(**{"train": "rows.jsonl", **values})


def test_all_fields_have_a_help_text():
    assert all(item.metadata["help"].endswith(".") and item.kw_only for item in fields(DataConfig))


def test_neither_transformers_nor_datasets_is_imported():
    code = "import sys, nemo_automodel.components.data; print({'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"

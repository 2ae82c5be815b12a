"""The long form of every family's own test: on ranks as well."""

from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from nemo_automodel.verify import assert_verified

FOLDER = Path(__file__).parents[1] / "components/models"
NAMED = [import_module(f"tests.components.models.{file.stem}") for file in sorted(FOLDER.glob("test_*.py"))]
FAMILIES = [module for module in NAMED if hasattr(module, "test_equals_transformers")]


@pytest.mark.slow
@pytest.mark.parametrize("module", FAMILIES, ids=lambda module: module.__name__.rpartition("_")[2])
def test_in_full(module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_full = partial(assert_verified, meshes=["tp=2", "fsdp=2"])
    monkeypatch.setattr(module, "assert_verified", in_full)
    module.test_equals_transformers(list(module.CONFIGS)[-1], tmp_path)

"""The long form of every family's own test, for its first config, on ranks as well.

With VERIFY_REPORTS=FOLDER all configs, and the reports are kept, for
``python -m nemo_automodel.onboard.families FOLDER/*.json``.
"""

import json
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import transformers

from nemo_automodel.verify import verify

FOLDER = Path(__file__).parents[1] / "components/models"
NAMED = [import_module(f"tests.components.models.{file.stem}") for file in sorted(FOLDER.glob("test_*.py"))]
FAMILIES = [module for module in NAMED if hasattr(module, "test_equals_transformers")]
ALL = "VERIFY_REPORTS" in os.environ
CASES = [(module, name) for module in FAMILIES for name in (list(module.CONFIGS) if ALL else list(module.CONFIGS)[:1])]
IDS = [f"{module.__name__.partition('.test_')[2]}-{name}" for module, name in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), CASES, ids=IDS)
def test_in_full(module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def in_full(architecture: str, config: Path) -> None:
        heads = json.loads((config / "config.json").read_text()).get("num_key_value_heads")
        meshes = ["fsdp=2"] if heads == 1 else ["tp=2", "fsdp=2"]  # one head of keys cannot be cut
        folder = os.environ.get("VERIFY_REPORTS")
        report = verify(architecture, config=config, meshes=meshes)
        if folder:
            kept = f"{transformers.__version__} {architecture} {name}.json".replace("/", "")
            (Path(folder) / kept).write_text(json.dumps(report.to_json()))
        assert report.passed, "\n".join(report.failures())

    monkeypatch.setattr(module, "assert_verified", in_full)
    module.test_equals_transformers(name, tmp_path)

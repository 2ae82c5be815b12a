"""`automodel backends` on this machine, and the page that is made of the same table."""

import json
from pathlib import Path

import pytest
import torch

from nemo_automodel.cli import main
from nemo_automodel.components.models.common.capabilities import TABLE, Package
from nemo_automodel.recipes.backends import FIELDS, PAGE, here, written

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_that_of_the_table() -> None:
    page = (ROOT / PAGE).read_text()
    assert written(page) == page, "run python -m nemo_automodel.recipes.backends"
    with pytest.raises(ValueError, match="has no lines <!-- table"):
        written("# a page without a place for them")


def test_the_command_says_what_runs_here_and_why_not_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: False)
    assert main(["backends", "--device", "cpu", "--json", str(tmp_path / "new" / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line for line in reversed(lines) if line.startswith("  ")}
    assert "runs" in said["sdpa"]
    assert "no softcap" in said["sdpa"]
    assert "no training on cpu" in said["flex"]
    assert "no kernel on cpu, only for bfloat16 and float16 on cuda" in said["varlen"]
    assert said["flash2"].endswith("pip install --no-build-isolation flash-attn")
    assert [line for line in lines if line and not line.startswith(" ")][1:] == [
        f"{title} (backend.{field})" for field, title in FIELDS.items()
    ]
    rows = json.loads((tmp_path / "new" / "table.json").read_text())
    assert rows == here(torch.device("cpu"))
    assert len(rows) == len(TABLE)


def test_what_is_installed_and_has_no_device_here_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: True)
    rows = {row["name"]: row for row in here(torch.device("cpu")) if row["field"] == "attn"}
    assert [name for name, row in rows.items() if row["runs"]] == ["sdpa", "flex", "eager"]
    assert rows["flash3"]["why_not"].startswith("no kernel on cpu")

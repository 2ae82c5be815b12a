"""The guides in docs/ run as they stand: blocks that name a file become it, commands and Python are run in order."""

import json
import re
import shlex
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from nemo_automodel._transformers import registry
from nemo_automodel.cli import main
from tests.recipes.conftest import checkpoint, rows  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent
LONG = ("bench", "cluster", "parallelism", "verify")  # they start processes of their own, for half a minute or more
GUIDES = [
    pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if file.stem in LONG else [])
    for file in sorted((ROOT / "docs").glob("*.md"))
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_block(language: str, text: str, names: dict[str, object]) -> None:
    first, body = text.split("\n", 1)
    if first.startswith("# file: "):
        Path(first.removeprefix("# file: ")).write_text(body)
    elif language == "text":
        return  # what a command printed
    elif language == "json":
        for line in text.splitlines():
            json.loads(line)
    elif language == "python":
        exec(compile(text, "guide", "exec"), names)
    else:
        assert language == "bash", f"a block of {language} is not run by this test"
        for line in text.replace("\\\n", " ").splitlines():
            command, *arguments = shlex.split(line, comments=True)
            assert command == "automodel"
            assert main(arguments) == 0, line


@pytest.mark.parametrize("guide", GUIDES)
def test_guide(guide: Path, checkpoint: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, "my-model")
    shutil.copy(rows, "orders.jsonl")
    blocks = BLOCK.findall(guide.read_text())
    assert blocks
    names: dict[str, object] = {"__name__": "guide"}
    # the guides register classes, and import them from folders that are gone afterwards
    monkeypatch.setattr(registry, "MODEL_ARCH_MAPPING", OrderedDict(registry.MODEL_ARCH_MAPPING))
    monkeypatch.setattr(registry, "_registered_classes", dict(registry._registered_classes))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "model", raising=False)
    for language, text in blocks:
        run_block(language, text, names)


def test_readme_shows_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"(?<!\w)automodel (\w+)", text))
    assert commands == {
        "quickstart",
        "train",
        "generate",
        "merge",
        "export",
        "convert",
        "verify",
        "new",
        "backends",
        "bench",
        "slurm",
        "plan",
    }
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link

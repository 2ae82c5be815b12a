"""Starts the tests that are marked ``interpreted``, in processes of their own: Triton decides when it is imported.

By hand: ``TRITON_INTERPRET=1 pytest -m interpreted tests/components/kernels``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_automodel.components.kernels.launch import triton

HERE = Path(__file__).parent
MODELS = HERE / "test_models.py"
GROUPS = {"kernels": [str(HERE), f"--ignore={MODELS}"], "models": [str(MODELS)]}


needs_triton = pytest.mark.skipif(triton is None, reason="needs triton")


@needs_triton
def test_interpreted() -> None:
    _run("kernels", "interpreted and not slow")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(("group", "which"), [("kernels", "interpreted and slow"), ("models", "interpreted")])
def test_interpreted_at_length(group: str, which: str) -> None:
    _run(group, which)


def _run(group: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", which]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *GROUPS[group]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout

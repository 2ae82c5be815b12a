"""The command line: help at once, one clear line for bad input, the subcommands end to end on a tiny model."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_automodel.cli import main
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)


def test_help_answers_in_under_a_second_and_loads_no_torch() -> None:
    code = "import sys; from nemo_automodel.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    seconds = []
    for _ in range(3):  # the least, since other tests run beside it
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1.0
    assert all(command in done.stdout for command in ("train", "quickstart", "generate", "convert", "verify"))


def test_train_help_lists_every_key_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for key in ("--output_dir", "--model.path", "--model.backend.rms_norm", "--data.packing", "--lora.targets"):
        line = next(line for line in text.splitlines() if line.strip().startswith(key))
        assert len(line.split(maxsplit=1)[1]) > 5, line


def test_nobody_warns_where_triton_is_not_installed() -> None:
    code = "import sys; sys.modules['triton'] = None; from nemo_automodel.cli import main; main(['train', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--lora.r" in done.stdout


def test_train_generate_and_print_config(
    overrides: Callable[..., list[str]],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = overrides(train__max_steps=2)
    assert main(["train", *words, "--print-config"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert main(["train", str(tmp_path / "config.yaml"), "--train.log_every", "2"]) == 0
    assert "plain Hugging Face format" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [2]
    assert main(["generate", str(tmp_path / "run/hf"), "--prompt", "what colour?", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "--optim.lrr", "1"], "did you mean optim.lr?"),
        (
            ["train", "--output_dir", "x", "--model.path", "nowhere/../x/y", "--data.train", "t.jsonl"],
            "not a checkpoint",
        ),
        (["generate", "./nowhere", "--prompt", "hi"], "nowhere is not a checkpoint folder"),
        (["convert", "nothing.gguf", "--out", "x"], "nothing.gguf does not exist"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_tracebacks_are_for_defects_and_for_who_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["convert", str(tmp_path / "no.gguf"), "--out", "x"]
    with monkeypatch.context() as patch:
        patch.setenv("AUTOMODEL_TRACEBACK", "1")
        with pytest.raises(ValueError, match="does not exist"):
            main(words)

    def defect(*arguments: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("nemo_automodel._transformers.tokenizer.convert_gguf", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(words)

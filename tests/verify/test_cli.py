"""``automodel verify``: what it exits with, what it prints and writes, and what it says of unusable targets."""

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import pytest
import torch.distributed as dist
from transformers import LlamaConfig

from nemo_automodel._transformers import registry
from nemo_automodel.cli import main
from nemo_automodel.verify import TargetError, find_target, run, target
from nemo_automodel.verify.check import Check
from nemo_automodel.verify.outcome import Outcome
from nemo_automodel.verify.ranks import run_ranks
from nemo_automodel.verify.subject import Subject

EXAMPLE = Path(__file__).parents[2] / "examples/hand_written_model.py"

UNUSABLE = {
    "padding": {"vocab_size": 50, "pad_token_id": 60},
    "groups": {"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 96},
    "width": {"num_attention_heads": 8, "hidden_size": 100},
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    LlamaConfig(num_key_value_heads=8, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_a_right_one_exits_0_and_writes_json_and_html(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, html_file = tmp_path / "new/report.json", tmp_path / "report.html"
    words = ["verify", "LlamaForCausalLM", "--quick", "--json", str(json_file), "--html", str(html_file)]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "LlamaForCausalLM against transformers.models.llama.modeling_llama.LlamaForCausalLM" in table
    assert "on a smaller config: vocab_size: 32000 -> 97" in table
    assert table.splitlines()[-1].startswith("verified: ")
    assert not any("torch.compile" in line for line in table.splitlines())

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is no JSON")

    report = json.loads(json_file.read_text(), parse_constant=refuse)
    assert report["passed"] is True
    shown = [line.strip() for line in table.splitlines()]
    for result in report["results"]:
        assert any(line.startswith(result["name"]) for line in shown)
        assert result["name"] in html_file.read_text()


def test_a_model_file_is_verified_without_generation(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(EXAMPLE), "--config", config, "--quick"]) == 0
    rows = {line[2:26].strip(): line[27:31] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["greedy tokens"] == "n/a "
    assert rows["layer by layer"] == "pass"


def test_a_wrong_one_exits_1_and_is_named_everywhere(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = "self.scaling = self.head_dim**-0.5", "self.scaling = self.head_dim**-0.25"
    text = EXAMPLE.read_text()
    assert right in text
    (tmp_path / "model.py").write_text(text.replace(right, wrong))
    files = [tmp_path / "report.json", tmp_path / "report.html"]
    words = ["verify", str(tmp_path / "model.py"), "--config", config, "--quick"]
    assert main([*words, "--json", str(files[0]), "--html", str(files[1])]) == 1
    table = capsys.readouterr().out
    below = table[table.index("FAIL modules, layer by layer") :]
    report = json.loads(files[0].read_text())
    detail = next(r["outcome"]["detail"] for r in report["results"] if r["name"] == "layer by layer")
    assert report["passed"] is False
    for said in (below, detail, files[1].read_text()):
        assert "model.layers.0.self_attn.o_proj (input)" in said
        assert "scale" in said
    assert table.splitlines()[-1].startswith("NOT verified: ")


def test_a_file_that_registers_itself_can_be_verified_again(config: str) -> None:
    before = dict(registry.MODEL_ARCH_MAPPING)
    for _ in range(2):
        assert find_target(EXAMPLE, config).model_class.__name__ == "HandWrittenForCausalLM"
    assert before == registry.MODEL_ARCH_MAPPING


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.py", "--config", "config.json"], "nothing.py does not exist"),
        (["nothing.json"], "nothing.json does not exist"),
        (["NothingForCausalLM"], "NothingForCausalLM is no folder, no file and no registered architecture"),
        (["nameless.py", "--config", "config.json"], "nameless.py has no ModelClass"),
        (["broken.py", "--config", "config.json"], "broken.py cannot be imported: SyntaxError"),
        (["nameless.py"], "has no ModelClass"),
        ([str(EXAMPLE)], "a model.py needs --config"),
        ([".", "--config", "config.json"], "has its own config"),
        (["LlamaForCausalLM", "--reference", "transformers.Nothing"], "--reference transformers.Nothing"),
        (["LlamaForCausalLM", "--reference", "no_such_package.Class"], "--reference no_such_package.Class"),
        (["unregistered.json"], "'GPT2LMHeadModel' is not registered"),
        (["padding.json"], "refuses the config: AssertionError: Padding_idx"),
        (["groups.json"], "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        (["width.json"], "cannot read it: StrictDataclassClassValidationError"),
        (["LlamaForCausalLM", "--device", "nowhere"], "'nowhere' is not usable here"),
        (["LlamaForCausalLM", "--mesh", "tp=5"], "tp=5"),
        (["LlamaForCausalLM", "--json", "config.json/report.json"], "config.json"),
    ],
)
def test_unusable_targets_are_one_line_and_status_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nameless.py").write_text("import torch\n")
    Path("broken.py").write_text("class Model(:\n")
    Path("unregistered.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    for name, fields in UNUSABLE.items():
        Path(f"{name}.json").write_text(json.dumps({"model_type": "llama", **fields}))
    assert main(["verify", *words]) == 2
    said, error = capsys.readouterr()
    assert said == ""
    assert message in error.splitlines()[0]
    assert len(error.splitlines()) == 2  # the second says how to see the traceback


def test_a_config_that_cannot_be_made_small_is_no_target(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: LlamaConfig) -> None:
        raise TypeError("no number")

    monkeypatch.setattr(target, "shrunk", fail)
    with pytest.raises(TargetError, match="cannot be made small for the checks: TypeError: no number"):
        find_target(config)


def _end(process: int) -> None:
    if dist.get_rank() == 0:
        os.kill(process, signal.SIGTERM)
    time.sleep(100)


def _ended_amid_ranks(subject: Subject) -> Outcome:
    (subject.scratch / "weights").touch()
    run_ranks(2, _end, os.getpid(), timeout=100)
    raise AssertionError("not ended")


def test_sigterm_leaves_no_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def uncaught(number: int, frame: FrameType | None) -> None:
        raise AssertionError("SIGTERM would have killed the process")

    monkeypatch.setattr(run, "all_checks", lambda *arguments: [Check("a group", "a check", _ended_amid_ranks)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = signal.signal(signal.SIGTERM, uncaught)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["verify", "LlamaForCausalLM"])
        assert signal.getsignal(signal.SIGTERM) is uncaught
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob("automodel-*"))

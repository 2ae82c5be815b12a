"""Commands for clusters that no test has: their words are what the parser takes, their configurations what it loads."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from nemo_automodel.config import load_config
from nemo_automodel.recipes.exits import ADVICE
from nemo_automodel.recipes.launch import LaunchOptions, split_flags
from nemo_automodel.recipes.train import TrainConfig

ROOT = Path(__file__).parents[2]
REQUIRED = ["--output_dir", "x", "--model.path", "x", "--data.train", "x"]


def parsed(words: list[str]) -> LaunchOptions:
    """Of the words of ``automodel train CONFIG.yaml ...``, all of which are understood."""
    assert words[:2] == ["automodel", "train"]
    options, rest = split_flags([re.sub(r"\$\w+", "2", word) for word in words[2:]])
    assert rest.pop(0).endswith(".yaml")
    load_config(TrainConfig, None, [*REQUIRED, *rest])
    assert options is not None
    return options


def test_kubernetes(tmp_path: Path) -> None:
    service, config_map, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())
    assert [one["kind"] for one in (service, config_map, job)] == ["Service", "ConfigMap", "Job"]
    (tmp_path / "train.yaml").write_text(config_map["data"]["train.yaml"])
    load_config(TrainConfig, tmp_path / "train.yaml", [])
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    options = parsed(pod["containers"][0]["command"])
    assert options.nnodes == spec["completions"] == spec["parallelism"]
    name, service_name = job["metadata"]["name"], service["metadata"]["name"]
    assert options.rdzv_endpoint == f"{name}-0.{service_name}:29500"
    assert pod["subdomain"] == service_name
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True}
    assert options.backend == "c10d"


def test_skypilot() -> None:
    task = yaml.safe_load((ROOT / "examples/skypilot.yaml").read_text())
    [command] = [line for line in task["run"].replace("\\\n", " ").splitlines() if "automodel" in line]
    options = parsed(shlex.split(command))
    assert options.nnodes == task["num_nodes"] == 2
    assert options.backend == "c10d"


GUIDE = (ROOT / "docs/cluster.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^automodel train .*--nnodes.*$", GUIDE, re.MULTILINE))
def test_commands_of_the_guide_for_several_machines(command: str) -> None:
    assert parsed(shlex.split(command.replace("gpu", "2"))).nnodes == 4


def test_the_guide_has_the_table_of_exit_codes() -> None:
    rows = {int(code): advice for code, advice in re.findall(r"^\| (\d+) \| [a-z ]+ \| (.*) \|$", GUIDE, re.MULTILINE)}
    assert rows == {int(code): advice for code, advice in ADVICE.items()}

"""The configuration loader: what it accepts, how it refuses, and that dumps read back."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nemo_automodel.config import ConfigError, arg, dump_config, format_help, load_config, required


@dataclass(kw_only=True)
class Optim:
    lr: float = arg(1e-3, "Peak learning rate.")
    betas: tuple[float, float] = arg((0.9, 0.95), "Decay of the moments.")
    warmup: int = arg(0, "Steps of warm-up.")

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError("lr must be at least 0")
        if self.warmup < 0:
            raise ValueError("no negative numbers")


@dataclass(kw_only=True)
class Peft:
    r: int = required("Rank.")
    targets: list[str] = arg(["q_proj"], "Modules to adapt.")


@dataclass(kw_only=True)
class Model:
    name: str = required("Hub id.")
    norm: Literal["te", "torch", "off"] = arg("torch", "RMSNorm.")


@dataclass(kw_only=True)
class Pair:
    inner: Optim = required("Inner.")
    other: Peft | None = required("Must be said, if only as null.")

    def __post_init__(self) -> None:
        raise ValueError("inner and other do not fit")


@dataclass(kw_only=True)
class Config:
    model: Model = required("Model.")
    optim: Optim = arg(Optim(lr=0.5), "Optimizer.")
    peft: Peft | None = arg(None, "Adapters.")
    stages: list[Peft] = arg([], "Stages.")
    compile: bool = arg(False, "Compile.")
    seed: int | None = arg(None, "Seed.")
    tag: str | None = arg(None, "Run name.")
    out: Path = arg(Path("out"), "Folder.")
    shards: tuple[int, ...] = arg((), "Shards.")
    env: dict[str, str] = arg({}, "Environment.")
    sizes: dict[str, list[int]] = arg({}, "Sizes.")
    level: Literal[1, "2", True] = arg(1, "A literal of mixed types.")


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(Config, path, overrides)


def reached(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


# An override, the key it sets and the value that key must then have.
ACCEPTED: list[tuple[str, str, Any]] = [
    ("--optim.lr=1e-4", "optim.lr", 1e-4),
    ("--optim.lr=3", "optim.lr", 3.0),
    ("--optim.lr=.inf", "optim.lr", float("inf")),
    ("--optim.warmup=1_000", "optim.warmup", 1000),
    ("--optim.betas=[0.8, 1]", "optim.betas", (0.8, 1.0)),
    ("--optim={warmup: 7}", "optim", Optim(lr=0.5, warmup=7)),
    ("--model.norm=off", "model.norm", "off"),
    ("--model.name=a=b", "model.name", "a=b"),
    ("--model.name=8", "model.name", "8"),
    ("--model.name=null", "model.name", "null"),
    ("--model.name=[a", "model.name", "[a"),
    ("--model.name={a: 1, a: 2}", "model.name", "{a: 1, a: 2}"),
    ("--model.name=", "model.name", ""),
    ("--peft.r=4", "peft", Peft(r=4)),
    ("--peft={r: 4}", "peft", Peft(r=4)),
    ("--peft=null", "peft", None),
    ("--stages=[{r: 1}, {r: 2, targets: []}]", "stages", [Peft(r=1), Peft(r=2, targets=[])]),
    ("--compile=true", "compile", True),
    ("--seed=3", "seed", 3),
    ("--seed=null", "seed", None),
    ("--tag=null", "tag", None),
    ("--tag=2024-01-01", "tag", "2024-01-01"),
    ("--tag=a\nb", "tag", "a\nb"),
    ("--out=7", "out", Path("7")),
    ("--shards=[1, 2, 3]", "shards", (1, 2, 3)),
    ("--env.A=1", "env.A", "1"),
    ("--sizes.a=[1]", "sizes.a", [1]),
    ("--level=1", "level", 1),
    ("--level=2", "level", "2"),
    ("--level=true", "level", True),
]


@pytest.mark.parametrize(("override", "name", "value"), ACCEPTED)
@pytest.mark.parametrize("joined", [True, False])
def test_override_sets_one_key_and_dumps_back(
    tmp_path: Path, override: str, name: str, value: Any, joined: bool
) -> None:
    config = load(tmp_path, "model: {name: m}", *([override] if joined else override.split("=", 1)))
    found = reached(config, name)
    assert (found, type(found)) == (value, type(value))
    assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    "text", ["1e-4", "null", "true", "12", "off", "", "~", "a: b", "a\n b\n", "1:30", "#x", "ü", "a\x85b"]
)
def test_dump_quotes_strings_so_that_they_stay_strings(tmp_path: Path, text: str) -> None:
    config = Config(model=Model(name=text), env={text: text}, peft=Peft(r=1, targets=[text, text]))
    assert load(tmp_path, dump_config(config)) == config


def test_dump_keeps_the_order_of_fields_and_short_lists() -> None:
    assert dump_config(Optim(lr=1e-5)) == "lr: 1.0e-05\nbetas: [0.9, 0.95]\nwarmup: 0\n"
    assert dump_config(Model(name="ü")) == "name: ü\nnorm: torch\n"
    assert dump_config(Peft(r=1)) == "r: 1\ntargets: [q_proj]\n"


def test_file_and_overrides_are_layered_over_default_instances(tmp_path: Path) -> None:
    text = "model: {name: m, norm: te}\noptim:\n  warmup: 5\npeft: null\nshards: &s [1]\nsizes: {a: *s}\n"
    config = load(tmp_path, text, "--model.norm", "torch", "--peft.r=1", "--peft.r", "2", "--seed", "-1")
    assert config == Config(
        model=Model(name="m", norm="torch"),
        optim=Optim(lr=0.5, warmup=5),
        peft=Peft(r=2),
        seed=-1,
        shards=(1,),
        sizes={"a": [1]},
    )
    assert load_config(Config, None, ["--model.name", "m"]) == Config(model=Model(name="m"))


def test_mutable_defaults_are_not_shared() -> None:
    first, second = Peft(r=1), Peft(r=1)
    first.targets.append("k_proj")
    assert second.targets == ["q_proj"]
    assert Config(model=Model(name="m")).optim is not Config(model=Model(name="m")).optim


# A file, overrides and the whole message, where FILE stands for the file's path.
REFUSED: list[tuple[str, list[str], str]] = [
    ("seed: '5'", [], 'seed: expected int | null, got "5" (FILE:1)'),
    ("seed: 5.0", [], "seed: expected int | null, got 5.0 (FILE:1)"),
    ("seed: true", [], "seed: expected int | null, got true (FILE:1)"),
    ("seed: 010", [], 'seed: expected int | null, got "010" (FILE:1)'),
    ("\ncompile: 1", [], "compile: expected true | false, got 1 (FILE:2)"),
    ("compile: yes", [], 'compile: expected true | false, got "yes" (FILE:1)'),
    ("tag: 8", [], "tag: expected str | null, got 8 (FILE:1)"),
    ("out: 8", [], "out: expected path, got 8 (FILE:1)"),
    ("optim:\n  lr: true", [], "optim.lr: expected float, got true (FILE:2)"),
    ("optim:\n  lr: '1e-4'", [], 'optim.lr: expected float, got "1e-4" (FILE:2)'),
    ("optim:", [], "optim: expected section, {} for its defaults, got null (FILE:1)"),
    ("level: 1.0", [], "level: expected 1 | 2 | true, got 1.0 (FILE:1)"),
    ("", ["--model.norm", "tee"], 'model.norm: expected te | torch | off, got "tee" (command line)'),
    ("", ["--optim.lr="], 'optim.lr: expected float, got "" (command line)'),
    ("", ["--optim.betas=[0.9]"], "optim.betas: expected [float, float], got [0.9] (command line)"),
    ("", ["--shards=[1, x]"], 'shards[1]: expected int, got "x" (command line)'),
    ("", ["--shards=[1"], 'shards: expected list of int, got "[1" (command line)'),
    ("", ["--sizes.a=1"], "sizes.a: expected list of int, got 1 (command line)"),
    (
        "",
        ["--sizes={a: [], a: []}"],
        'sizes: expected mapping of str to list of int, got "{a: [], a: []}" (command line)',
    ),
    ("sizes: [1]", [], "sizes: expected mapping of str to list of int, got [1] (FILE:1)"),
    ("stages:\n- targets: []", [], "stages[0].r: required, expected int (FILE:2)"),
    ("", ["--peft={}"], "peft.r: required, expected int (command line)"),
    ("", ["--lr", "3"], "lr: unknown key, got 3 (command line); did you mean optim.lr?"),
    ("", ["--optimm.warmup", "3"], "optimm.warmup: unknown key, got 3 (command line); did you mean optim.warmup?"),
    ("modle: {}", [], "modle: unknown key, got {} (FILE:1); did you mean model?"),
    ("optim: {zzzz: 1}", [], "optim.zzzz: unknown key, got 1 (FILE:1); expected one of: lr, betas, warmup"),
    ("", ["--optim.lr.x=3"], 'optim.lr: expected float, got {"x": 3} (command line)'),
    ("optim:\n  lr: 1\n  lr: 2", [], "optim.lr: expected once, got 1 (FILE:2) and 2 (FILE:3)"),
    ("env: {1: a}", [], "env.1: expected a string as the key, quote it, got 1 (FILE:1)"),
    ("optim: {lr: -1, warmup: 2}", [], "optim: lr must be at least 0, got optim.lr = -1 (FILE:1)"),
    (
        "optim: {warmup: -1}",
        ["--optim.lr=1"],
        "optim: no negative numbers, got optim.lr = 1 (command line), optim.warmup = -1 (FILE:1)",
    ),
    ("", ["--seed", "x" * 300], f'seed: expected int | null, got "{"x" * 199}... (command line)'),
    ("", ["--optim.lr"], "optim.lr: expected a value after --optim.lr (command line)"),
    ("", ["--optim.lr", "--seed=1"], "optim.lr: expected a value after --optim.lr (command line)"),
    ("", ["seed=1"], "seed=1: expected --key value or --key=value (command line)"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), REFUSED)
def test_refusal_names_key_value_expectation_and_place(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, "--model.name=m", *overrides)
    assert str(error.value) == message.replace("FILE", str(tmp_path / "run.yaml"))


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, "seed: x\nseed: y\noptim: {lr: -1}\nstages: [{r: a}, {r: b}]", "bare", "--lr=1")
    head, *lines = str(error.value).splitlines()
    assert isinstance(error.value, ValueError)
    assert head == "8 problems in the configuration:"
    assert lines[3] == f"  - model.name: required, expected str ({tmp_path / 'run.yaml'})"
    names = [line.removeprefix("  - ").partition(":")[0] for line in lines]
    assert names == ["seed", "bare", "lr", "model.name", "optim", "stages[0].r", "stages[1].r", "seed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "other: required, expected section, {} for its defaults | null (command line)"),
        (["--other=null"], "configuration: inner and other do not fit, got other = null (command line)"),
    ],
)
def test_required_sections(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Pair, None, overrides)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\nmodel: [", r"run\.yaml.*line 2"),
        (b"seed: 1\n--- \nseed: 2", r"run\.yaml.*line 2"),
        (b"seed: 1\ntag: !!python/name:os.system x", r"python/name:os\.system is not supported.*line 2"),
        (b"shards: &s [*s]", r"run\.yaml.*recursion"),
        (b"tag: \xff", r"run\.yaml.*utf-8"),
        (b"- 1", r"run\.yaml: expected keys at the top level, got \[1\]"),
        (None, r"run\.yaml: cannot read.*No such file"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(Config, path, [])
    assert re.search(message, str(error.value), re.DOTALL)


def test_help_lists_every_key_aligned_by_section() -> None:
    lines = format_help(Config, "automodel train", "Trains. " * 30).splitlines()
    assert lines[0] == "usage: automodel train [CONFIG.yaml] [--key value ...]"
    assert max(map(len, lines)) <= 100
    start = lines.index("optim: Optimizer.")
    assert lines[start : start + 4] == [
        "optim: Optimizer.",
        "  --optim.lr      Peak learning rate. (float; default: 0.5)",
        "  --optim.betas   Decay of the moments. ([float, float]; default: [0.9, 0.95])",
        "  --optim.warmup  Steps of warm-up. (int; default: 0)",
    ]
    assert lines[start + 4 : start + 7] == [
        "",
        "peft: Adapters. (off unless set)",
        f"{'  --peft.r':<18}Rank. (int; REQUIRED)",
    ]
    keys = [line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")]
    assert keys[:8] == ["stages", "compile", "seed", "tag", "out", "shards", "env", "sizes"]
    assert keys[8:12] == ["level", "model.name", "model.norm", "optim.lr"]
    assert keys[12:] == ["optim.betas", "optim.warmup", "peft.r", "peft.targets"]


def test_help_wraps_under_the_meaning() -> None:
    @dataclass(kw_only=True)
    class Wordy:
        key: int = field(default=1, metadata={"help": "Some: " + "half-word " * 20})

    first, *rest = format_help(Wordy, "p", "").splitlines()[3:]
    assert first.startswith("  --key  Some: half-word")
    assert [bool(re.match(" {9}half-word", line)) for line in rest] == [True, True]


def test_unsupported_annotation_is_a_type_error() -> None:
    @dataclass(kw_only=True)
    class Odd:
        value: int | str = 1
        table: dict[int, int] = arg({}, "Keys that are not strings.")

    with pytest.raises(TypeError, match=r"int \| str"):
        load_config(Odd, None, ["--value=1"])
    with pytest.raises(TypeError, match=r"dict\[int, int\]"):
        load_config(Odd, None, ["--table={}"])
    with pytest.raises(TypeError, match=r"int \| str"):
        format_help(Odd, "p", "")


def test_module_is_a_light_leaf() -> None:
    code = "import sys, nemo_automodel.config; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

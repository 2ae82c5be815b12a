"""The benchmark of several GPUs: what it lists and how it judges; and, on gloo ranks, that all of it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.multi_gpu_report import bound_of, different_losses, formula, last_words, markdown, problems
from benchmarks.multi_gpu_rows import SECTIONS, counts, meshes, rows_of
from nemo_automodel.components.data import micro_batches
from nemo_automodel.components.distributed.stages import takes_micro_batches
from nemo_automodel.config import load_config
from nemo_automodel.recipes.train import TrainConfig


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tiny", [False, True])
def test_every_row_is_a_training_that_so_many_ranks_can_share(ranks: int, tiny: bool) -> None:
    rows = rows_of(ranks, tiny, list(SECTIONS))
    assert len({row.key for row in rows}) == len(rows)
    assert {row.section for row in rows} == SECTIONS.keys()
    for row in rows:
        words = f"--output_dir run --model.path model --data.train rows {row.words}".split()
        config = load_config(TrainConfig, None, words)
        if row.does == "kill":
            continue
        loop, mesh = config.train, config.mesh
        data = mesh.sizes(row.ranks)["dp_shard"] * mesh.dp_replicate
        assert loop.batch_size % data == 0, row
        if mesh.pp > 1:
            count = micro_batches(loop.batch_size, loop.micro_batch_size or loop.batch_size, data)
            assert takes_micro_batches(mesh.pp_schedule, mesh.pp, count), row


def test_counts_and_pairs_of_axes() -> None:
    assert (counts(2), counts(6), counts(8)) == ([1, 2], [1, 2, 4, 6], [1, 2, 4, 8])
    assert not [name for name in meshes(2) if name.count("=") > 1]
    assert len([name for name in meshes(8) if name.count("=") > 1]) == 7


def test_bubbles_by_the_formula() -> None:
    assert formula("1F1B", 4, 8) == formula("GPipe", 4, 8) == 3 / 11
    assert formula("Interleaved1F1B", 4, 8) == 3 / 19
    assert formula("InterleavedZeroBubble", 4, 8) == 3 / 51
    assert formula("ZBVZeroBubble", 4, 8) == 0


def _equality(name: str, role: str, factor: float, **more: Any) -> dict[str, Any]:
    values = {
        "section": "equality",
        "does": "equality",
        "name": name,
        "ranks": 1,
        "skipped": "",
        "values": {"role": role},
    }
    return {**values, "loss": [factor * x for x in (4.0, 3.0, 2.0)], "grad_norm": [1.0, 1.0, 1.0], **more}


def _report(*rows: dict[str, Any]) -> dict[str, Any]:
    own = [("reference", 1.0), ("again", 1.0), ("other sums", 1.001), ("fp32", 1.002)]
    all_rows = [*(_equality(role, role, factor) for role, factor in own), *rows]
    return {"machine": "none", "ranks": 2, "steps": 3, "rows": {row["name"]: row for row in all_rows}}


def test_the_bound_is_twice_what_one_gpu_differs_from_itself() -> None:
    report = _report()
    assert bound_of(list(report["rows"].values()), "loss") == pytest.approx(0.004)
    assert bound_of(list(report["rows"].values())[:3], "loss") is None
    near, far = _equality("tp=2", "mesh", 1.0039, unequal=[]), _equality("pp=2", "mesh", 1.0041, unequal=["norm"])
    assert not problems(_report(near))
    found = problems(_report(far))
    assert [text[:30] for text in found] == ["not equal: the export by pp=2:", "not equal: loss of pp=2 is 4.1"]
    assert problems(_report(_equality("cp=2", "mesh", float("nan"))))
    assert "blind" in problems(_report(_equality("wrong", "wrong", 1.003)))[0]
    failed = _report({**_equality("cp=2", "mesh", 1.0), "error": "rank 1 ended with 1: no memory"})
    assert "rank 1 ended with 1: no memory" in problems(failed)[0]
    assert "cp=2 x1: failed: rank 1" in markdown(failed)
    assert "| pp=2 | 4.0164, 2.0082 | 4.1e-03 | 0.0e+00 | NO | no |" in markdown(_report(far))


def test_fast_and_wrong_is_no_figure() -> None:
    def row(name: str, ranks: int, words: str, *losses: float) -> dict[str, Any]:
        values = {"series": name, "rows": 2, "length": 8}
        own = {"section": "speed", "name": name, "ranks": ranks, "does": "speed", "model": "8b", "words": words}
        return {**own, "skipped": "", "values": values, "losses": losses}

    one, tp = row("one", 1, "--lora.r 16", 12.5, 12.4), row("tp", 2, "--lora.r 16 --mesh.tp 2", 12.501, 12.399)
    full, apart = row("full", 1, "", 12.5, 9.0), row("dp", 2, "--lora.r 16", 12.7, 12.6)  # other work, and other rows
    assert different_losses([one, tp, full, apart]) == []
    wrong = row("fast", 2, "--lora.r 16 --mesh.tp 2", 12.5, 12.3)
    assert different_losses([one, wrong]) == ["not equal: losses of fast are 8.1e-03 from those of one"]
    none = row("none", 1, "--lora.r 16", 12.5, float("nan"))
    assert different_losses([one, none]) == ["not equal: losses of none are nan from those of one"]
    assert different_losses([none, one])


def test_the_error_is_named_and_not_what_followed(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    log.write_text("[rank0]: RuntimeError: no memory\n[rank0]:[W1129 ProcessGroupNCCL.cpp:1575] Warning: destroy\n")
    assert last_words(log) == "[rank0]: RuntimeError: no memory"
    log.write_text("killed\n\n")
    assert last_words(log) == "killed"


@pytest.mark.slow
def test_a_trial_on_cpu_ranks(tmp_path: Path) -> None:
    wanted = "equality: (ref|hsdp)|load: .*tp=|accelerate|dp .repl|pp: (Inter.*1F|ZBV)|save: fsdp=2|kill|cp: full.*ring"
    command = [sys.executable, "benchmarks/multi_gpu.py", "--tiny", "--steps", "1", "--match", wanted]
    command += ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch")]
    done = subprocess.run([*command, "--limit", "240"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert {row["section"] for row in rows.values()} == SECTIONS.keys()
    assert rows["equality: hsdp=2 x2"]["unequal"] == []
    assert all(kill["bitwise"] for kill in rows["kill: fsdp=2 x1"]["kills"].values())
    before = (tmp_path / "out/results.json").read_text()
    late = subprocess.run([*command, "--only", "load", "--limit", "0.1"], capture_output=True, text=True)
    assert late.returncode == 0, "all was measured already"
    assert (tmp_path / "out/results.json").read_text() == before
    late = subprocess.run([*command, "--only", "load", "--limit", "0.1", "--again"], capture_output=True, text=True)
    assert late.returncode == 1
    assert "failed: load: tp=2: rank 0 was not done after 0 s" in late.stdout

"""Ranks that are not there have the shards that a closed formula says, at sizes from one to thousands."""

import json
import multiprocessing
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from nemo_automodel.cli import main
from nemo_automodel.components.models.llama.model import LlamaForCausalLM
from nemo_automodel.config import load_config
from nemo_automodel.recipes.plan import Plan, RankNeeds, _needs, in_processes, plan
from nemo_automodel.recipes.train import TrainConfig
from tests.distributed.ranks import PRELOAD

# hidden, MLP, layers, heads, KV heads and vocabulary, from the published config.json files
SHAPES = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
    "405B": (16384, 53248, 126, 128, 8, 128256),
    "tiny": (32, 40, 3, 4, 2, 61),
}


@pytest.fixture(autouse=True)
def _server_with_imports() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def config(folder: Path, shape: str, *words: str) -> TrainConfig:
    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    given = ["--model.path", str(folder), "--output_dir", str(folder / "run"), "--data.train", "none"]
    return load_config(TrainConfig, None, [*given, "--data.max_length", "4096", *words])


def part(rows: int, place: int, ranks: int) -> int:
    """Rows of one of ``ranks`` equal parts, of which the last ones may be short or empty."""
    each = -(-rows // ranks)
    return max(0, min(rows, (place + 1) * each) - min(rows, place * each))


def elements(shape: str, tp: int, fsdp: int, rank: int, layers: int | None = None, ends: int = 1) -> int:
    """Of one rank's shards, from the shape alone: tensor parallelism first, then rows over FSDP.

    Args:
        shape: its name.
        tp: ranks that cut rows or columns.
        fsdp: ranks that cut what is left by rows.
        rank: which one.
        layers: of its stage; None: all.
        ends: 1 with embeddings, head and last norm; 0 without; -1 with embeddings alone; -2 with head and norm.
    """
    hidden, inner, all_layers, heads, kv_heads, vocabulary = SHAPES[shape]
    at, place = rank % tp, rank // tp % fsdp
    width = hidden // heads
    by_rows = [((heads + 2 * kv_heads) * width, hidden), (2 * inner, hidden)]
    by_columns = [(hidden, hidden), (hidden, inner)]
    layer = sum(part(part(rows, at, tp), place, fsdp) * columns for rows, columns in by_rows)
    layer += sum(part(rows, place, fsdp) * columns // tp for rows, columns in by_columns)
    layer += 2 * part(hidden, place, fsdp)
    table, norm = part(part(vocabulary, at, tp), place, fsdp) * hidden, part(hidden, place, fsdp)
    outside = {1: 2 * table + norm, 0: 0, -1: table, -2: table + norm}[ends]
    return (all_layers if layers is None else layers) * layer + outside


def assert_formula(found: Plan, shape: str, tp: int, fsdp: int, gradient: int = 2, optimizer: int = 10) -> None:
    """Of bf16 parameters: bytes of the parameters, gradients and optimizer; 10 are two fp32 moments and low bits."""
    for needs in found.ranks:
        count = elements(shape, tp, fsdp, needs.rank)
        assert needs.parameters == 2 * count, f"rank {needs.rank}"
        assert (needs.gradients, needs.optimizer) == (gradient * count, optimizer * count), f"rank {needs.rank}"


def test_shards_are_those_of_the_formula(tmp_path: Path) -> None:
    """Of 8B on 24 ranks in groups of 6, which divide neither 4,096 nor the vocabulary's parts."""
    found = plan(config(tmp_path, "8B", "--mesh.tp", "4", "--train.batch_size", "6"), 24)
    assert [needs.rank for needs in found.ranks] == [0, 23]
    assert found.ranks[0].parameters > found.ranks[1].parameters
    assert_formula(found, "8B", tp=4, fsdp=6)
    assert found.ranks[0].elements == 8_030_261_248
    assert (found.work.rows, found.work.micro_batches, found.work.global_tokens) == (1, 1, 6 * 4096)


def assert_stages(found: Plan, shape: str, tp: int, fsdp: int) -> None:
    """Every stage has a whole number of layers, all of them together the model's, and shards as the formula says."""
    layer = elements(shape, 1, 1, 0, layers=1, ends=0)
    total = 0
    for needs in found.ranks:
        ends = {0: -1, found.mesh.pp - 1: -2}.get(needs.stage, 0)
        layers, rest = divmod(needs.elements - elements(shape, 1, 1, 0, layers=0, ends=ends), layer)
        assert rest == 0
        assert needs.parameters == 2 * elements(shape, tp, fsdp, needs.rank, layers, ends)
        assert needs.optimizer == 5 * needs.parameters
        assert needs.sent["pp"] > 0
        total += layers
    assert len(found.ranks) == 2 * found.mesh.pp  # the first and the last rank of each
    assert total == 2 * SHAPES[shape][2]


def test_stages_have_all_layers(tmp_path: Path) -> None:
    words = ("--mesh.pp", "3", "--mesh.tp", "2", "--train.batch_size", "9", "--train.micro_batch_size", "1")
    assert_stages(plan(config(tmp_path, "tiny", *words), 18), "tiny", tp=2, fsdp=3)


def test_the_optimizer_is_the_configured_one(tmp_path: Path) -> None:
    words = ("--optim.masters", "stochastic", "--optim.moments", "bfloat16", "--train.micro_batch_size", "1")
    found = plan(config(tmp_path, "tiny", *words, "--mesh.dp_replicate", "2"), 6)
    assert_formula(found, "tiny", tp=1, fsdp=3, gradient=4, optimizer=4)  # summed in fp32, over micro-batches
    assert found.ranks[0].sent["dp_replicate"] > 0


def test_adapters_alone_have_gradients_and_state(tmp_path: Path) -> None:
    (whole,) = plan(config(tmp_path, "tiny", "--lora.r", "4"), 1).ranks
    hidden, inner, layers, heads, kv_heads, _ = SHAPES["tiny"]
    kv = hidden // heads * kv_heads
    sides = [(hidden, hidden)] * 2 + [(hidden, kv)] * 2 + [(hidden, inner)] * 3
    adapters = layers * 4 * sum(sum(side) for side in sides)
    assert (whole.trained, whole.gradients, whole.optimizer) == (adapters, 2 * adapters, 10 * adapters)
    assert whole.parameters == 2 * (elements("tiny", 1, 1, 0) + adapters)
    assert (whole.sent, whole.gathered) == ({}, 0)


def test_all_ranks_together_have_the_model(tmp_path: Path) -> None:
    """The norms of the layers, and the last one, are whole on both tensor-parallel ranks."""
    some = config(tmp_path, "tiny", "--model.dtype", "float32", "--mesh.tp", "2", "--train.batch_size", "3")
    ranks = list(in_processes(_needs, [(some, rank, 6) for rank in range(6)]))
    norms = 7 * 32
    assert sum(needs.parameters for needs in ranks) == 4 * (elements("tiny", 1, 1, 0) + norms)
    assert sum(needs.optimizer for needs in ranks) == 8 * (elements("tiny", 1, 1, 0) + norms)
    assert len({needs.parameters for needs in ranks}) > 1


def misspelt(some: TrainConfig) -> RankNeeds:
    LlamaForCausalLM._tp_plan = {"lm_heed": "colwise_rep"}
    return _needs(some, 0, 4)


def test_a_misspelt_entry_of_the_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_heed: matches no module"):
        list(in_processes(misspelt, [(config(tmp_path, "tiny", "--mesh.tp", "2"),)]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "plan takes the number of ranks as --ranks N"),
        (["--ranks", "many"], "plan takes the number of ranks as --ranks N"),
        (["--ranks", "6", "--mesh.tp", "4"], "mesh: tp=4 takes a multiple of 4 ranks, and there are 6"),
        (["--ranks", "8", "--mesh.tp", "4"], "tp=4 does not divide the 2 KV heads; tp may be 2"),
    ],
)
def test_bad_input_is_one_message(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, "tiny")
    given = ["--model.path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--data.train", "none"]
    assert main(["plan", *given, *words]) == 2
    assert message in capsys.readouterr().err


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path, "tiny")
    given = ["--model.path", str(tmp_path), "--output_dir", str(tmp_path / "run"), "--data.train", "none"]
    assert main(["plan", *given, "--ranks", "16", "--mesh.tp", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("16 ranks (dp_shard=8 x tp=2): ")
    for words in ("GiB of memory", "GB sent in a step", "fsdp", "\n      15 ", "model PFLOP"):
        assert words in printed
    assert not (tmp_path / "run").exists()


LARGE: list[tuple[str, dict[str, int], int]] = [
    ("8B", {"tp": 1}, 4096),
    ("8B", {"tp": 8, "dp_replicate": 16}, 2048),
    ("70B", {"tp": 8}, 4096),
    ("405B", {"tp": 8, "dp_replicate": 4}, 4096),
    ("405B", {"tp": 1}, 4096),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "mesh", "ranks"), LARGE, ids=lambda value: str(value))
def test_thousands_of_ranks(shape: str, mesh: dict[str, int], ranks: int, tmp_path: Path) -> None:
    words = [word for axis, size in mesh.items() for word in (f"--mesh.{axis}", str(size))]
    some: dict[str, Any] = {"tp": mesh["tp"], "fsdp": ranks // mesh["tp"] // mesh.get("dp_replicate", 1)}
    assert_formula(plan(config(tmp_path, shape, *words), ranks), shape, **some)


@pytest.mark.slow
def test_thousands_of_ranks_in_stages(tmp_path: Path) -> None:
    words = ("--mesh.pp", "16", "--mesh.tp", "8", "--train.batch_size", "512", "--train.micro_batch_size", "1")
    assert_stages(plan(config(tmp_path, "405B", *words), 4096), "405B", tp=8, fsdp=32)

"""One step on ranks of this machine: right models pass, a wrong rule for shards is caught, ranks never stay behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, Olmo2Config, PreTrainedConfig, Qwen2Config, Qwen3Config

from nemo_automodel._transformers import registry
from nemo_automodel.components.layout import Fusion, Layout
from nemo_automodel.components.models.common.combined_projection import CombinedGateUpMLP
from nemo_automodel.components.models.common.decoder import DecoderForCausalLM
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.llama.model import LlamaForCausalLM
from nemo_automodel.components.models.llama.state_dict_adapter import LlamaStateDictAdapter
from nemo_automodel.verify import Target, find_target, verify
from nemo_automodel.verify.checks.meshes import ClassByName, Mesh, parse_mesh, same_step
from nemo_automodel.verify.outcome import NotApplicable, Outcome
from nemo_automodel.verify.ranks import RankError, run_ranks
from nemo_automodel.verify.subject import Subject

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 192, "vocab_size": 500}
LLAMA = LlamaConfig(**HEADS, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
QWEN2 = Qwen2Config(**HEADS, tie_word_embeddings=False)
QWEN2_UNGROUPED = Qwen2Config(**HEADS | {"num_key_value_heads": 12})
BY_HAND = Path(__file__).parents[2] / "examples" / "hand_written_model.py"


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("fsdp=2", {"shard": 2}),
        ("tp=2", {"tp": 2}),
        ("fsdp=3, tp=2", {"shard": 3, "tp": 2}),
        ("tp=2,hsdp=2x4", {"replicate": 2, "shard": 4, "tp": 2}),
        ("tp=2,cp=2,fsdp=2", {"shard": 2, "cp": 2, "tp": 2}),
    ],
)
def test_meshes_are_parsed(text: str, axes: dict[str, int]) -> None:
    mesh = parse_mesh(text, LLAMA)
    assert mesh.axes == axes
    assert mesh.text == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fsdp=2,pp=2", "stages are not checked here"),
        ("cp=8", "cp=8 but 4 KV heads: cp must divide them"),
        ("tp=2,cp=4", "cp=4 but 2 KV heads with tp=2"),
        ("tp=8", "tp=8 but 4 KV heads: tp must divide them"),
        ("dp=2", "'dp=2' is none of fsdp=2"),
        ("fsdp=two", "'fsdp=two' is none of"),
        ("hsdp=4", "'hsdp=4' is none of"),
        ("", "'' is none of"),
        ("fsdp=2,hsdp=2x2", "hsdp comes on top of another"),
        ("tp=2,tp=2", "tp comes on top of another"),
        ("fsdp=1", "two ranks at least"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mesh(text, LLAMA)


def test_an_mlp_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="tp=4 but 402 rows of the MLP"):
        parse_mesh("tp=4", LlamaConfig(**HEADS, intermediate_size=402))


def test_a_bad_mesh_is_refused_before_anything_runs() -> None:
    started: list[Any] = []
    with pytest.raises(ValueError, match="stages are not checked here"):
        verify(Target.of(LlamaForCausalLM, LLAMA), meshes=["tp=2", "pp=2"], on_start=started.append)
    assert not started


def outcome_of(model_class: Any, config: PreTrainedConfig, mesh: str) -> Outcome:
    target = Target.of(model_class, config, reference=config.architectures and config.architectures[0])
    with Subject(target) as subject:
        return same_step(subject, parse_mesh(mesh, target.tiny))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (LLAMA, "tp=2"),
        (QWEN2, "fsdp=2"),
        (QWEN2, "cp=2"),
        pytest.param(LLAMA, "fsdp=2,cp=2", marks=SLOW),
        pytest.param(QWEN2_UNGROUPED, "cp=2,tp=2", marks=SLOW),
        pytest.param(LLAMA, "hsdp=2x2,cp=2", marks=SLOW),
        pytest.param(QWEN2, "tp=2", marks=SLOW),
        pytest.param(LLAMA, "fsdp=3", marks=SLOW),
        pytest.param(LLAMA, "fsdp=2,tp=2", marks=SLOW),
        pytest.param(QWEN2, "hsdp=2x2,tp=2", marks=SLOW),
    ],
)
def test_right_models_pass(config: PreTrainedConfig, mesh: str) -> None:
    model_class = registry.resolve({"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.model_type])
    outcome = outcome_of(model_class, config, mesh)
    assert outcome.passed, outcome.detail
    kinds = ("logits", "gradient of model.embed_tokens.weight", "after a step", "loss", "saved")
    assert all(any(kind in each.name for each in outcome.differences) for kind in kinds)


@pytest.mark.slow
def test_a_model_by_hand_is_found_again_by_the_ranks(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    target = find_target(BY_HAND, tmp_path, "LlamaForCausalLM")
    with Subject(target) as subject:
        assert same_step(subject, Mesh("tp=2", tp=2)).passed


def test_a_model_by_hand_that_knows_nothing_of_parts_is_not_applicable(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    with (
        Subject(find_target(BY_HAND, tmp_path, "LlamaForCausalLM")) as subject,
        pytest.raises(NotApplicable, match=r"no context parallelism: .* does not declare .* 'context'"),
    ):
        same_step(subject, Mesh("cp=2", cp=2))


def test_a_module_that_an_implementation_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "lacking_model.py"
    file.write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        ClassByName("lacking_model", str(file), "LackingForCausalLM").find()


class NormedHeadsForCausalLM(DecoderForCausalLM):
    """Qwen3: a norm on each head of queries and keys."""

    config_class = Qwen3Config
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012

    @staticmethod
    def decoder_spec(config: Qwen3Config) -> DecoderSpec:
        types = tuple(config.layer_types or ())
        return DecoderSpec(norm_eps=config.rms_norm_eps, layer_types=types, qk_norm="head")


class NormedWidthForCausalLM(DecoderForCausalLM):
    """OLMo 2: a norm on all heads of queries together, and of keys."""

    config_class = Olmo2Config
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012

    @staticmethod
    def decoder_spec(config: Olmo2Config) -> DecoderSpec:
        after = NormSlots(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        )
        types = ("full_attention",) * config.num_hidden_layers
        return DecoderSpec(norm_eps=config.rms_norm_eps, layer_types=types, qk_norm="full", norms=after)


@pytest.mark.parametrize(
    ("model_class", "mesh"),
    [
        (NormedHeadsForCausalLM, "tp=2"),
        (NormedWidthForCausalLM, "tp=2"),
        pytest.param(NormedHeadsForCausalLM, "fsdp=2,tp=2", marks=SLOW),
        pytest.param(NormedWidthForCausalLM, "fsdp=2,tp=2", marks=SLOW),
    ],
)
def test_norms_of_heads_are_those_of_all_ranks_heads(model_class: Any, mesh: str) -> None:
    architecture = model_class.config_class.__name__.replace("Config", "ForCausalLM")
    config = model_class.config_class(**HEADS, architectures=[architecture])
    outcome = outcome_of(model_class, config, mesh)
    assert outcome.passed, outcome.detail


class HalvesMLP(CombinedGateUpMLP):
    """All rows of the gate, then all of up: right in one process, but a rank gets the gate alone."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


class HalvesAdapter(LlamaStateDictAdapter):
    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        rows = config.intermediate_size
        halves = Fusion(fused="gate_up_proj", parts=("gate_proj", "up_proj"), blocks=(rows, rows))
        self.layout = Layout((self.qkv, halves))


class HalvesForCausalLM(LlamaForCausalLM):
    adapter_class = HalvesAdapter

    @staticmethod
    def decoder_spec(config: LlamaConfig) -> Any:
        return replace(LlamaForCausalLM.decoder_spec(config), mlp=HalvesMLP)


class WholeHeadForCausalLM(LlamaForCausalLM):
    """Says that each rank's part of the heads is all of them."""

    _tp_plan = {"lm_head": "colwise_rep", "model.layers.*.self_attn.o_proj": "colwise_rep"}  # noqa: RUF012


def test_rows_in_halves_are_caught_by_tensor_parallelism() -> None:
    config = LlamaConfig(**HEADS, architectures=["LlamaForCausalLM"])
    outcome = outcome_of(HalvesForCausalLM, config, "tp=2")
    assert outcome.passed is False
    assert "differ" in outcome.detail


def test_what_a_rank_raises_reaches_the_report() -> None:
    with pytest.raises(RankError, match=r"rank [01]: RuntimeError: .*") as caught:
        outcome_of(WholeHeadForCausalLM, LlamaConfig(**HEADS, architectures=["LlamaForCausalLM"]), "tp=2")
    assert "self.o_proj(" in "".join(caught.value.__notes__), "not its traceback"


def _nothing() -> None:
    pass


def _rank_1_does_not_come(folder: Path, how: str) -> None:
    (folder / str(os.getpid())).touch()
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(1))
    elif how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


@pytest.mark.parametrize(
    ("how", "message"), [("sleeps", r"ranks \[0, 1\] were not done within 3 s"), ("dies", "rank [01].*(died|reset)")]
)
def test_ranks_that_wait_for_ever_are_stopped(how: str, message: str, tmp_path: Path) -> None:
    run_ranks(1, _nothing, timeout=60)  # the server's imports take longer than the ranks
    with pytest.raises(RankError, match=message):
        run_ranks(2, _rank_1_does_not_come, tmp_path, how, timeout=3)
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def _orphaned(folder: str) -> None:
    run_ranks(2, _rank_1_does_not_come, Path(folder), "sleeps", timeout=100)


@pytest.mark.slow
def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=_orphaned, args=(str(tmp_path),))
    parent.start()
    _until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.kill()
    parent.join()
    _until(lambda: not any(psutil.pid_exists(int(file.name)) for file in tmp_path.iterdir()))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)

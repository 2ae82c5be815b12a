"""Transformer Engine's modules in the library's models: names, parameters, arguments, refusals.

A stand-in takes the package's place, which needs a GPU; what the package computes, ``tests/gpu/test_te.py`` compares.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.distributed import parallelize_tensors
from nemo_automodel.components.models.common import (
    BackendConfig,
    cudnn,
    initialize_linear_module,
    initialize_rms_norm_module,
)
from nemo_automodel.components.models.common.te import engine
from nemo_automodel.components.models.common.te.attention import dot_product, layout_of
from nemo_automodel.components.models.common.te.float8 import TEFloat8, around_forward
from nemo_automodel.components.models.common.te.modules import TELinear, float8_state
from nemo_automodel.components.models.common.te.rope import Tokens
from nemo_automodel.components.models.common.tp_plan import tp_plan_of
from nemo_automodel.components.models.common.varlen import Documents
from nemo_automodel.components.models.llama import LlamaForCausalLM as OwnLlama
from nemo_automodel.components.peft import LoRAConfig, apply_lora
from nemo_automodel.components.peft import layout_of as layout_of_model
from nemo_automodel.components.placement import whole
from nemo_automodel.config import ConfigError, load_config
from nemo_automodel.recipes import checks
from nemo_automodel.recipes.checks import check_packing
from nemo_automodel.recipes.train import Run, TrainConfig
from tests.components.models import te_stand_in
from tests.conftest import assert_same_step, randomize, tiny, tokens, twins
from tests.distributed.ranks import run_ranks
from tests.recipes.conftest import checkpoint, overrides, rows  # noqa: F401  (fixtures)

MODULES = {"linear": "te", "rms_norm": "te"}
LENGTHS = [[5, 1, 7, 3], [16], [9, 7]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> None:
    te_stand_in.install(monkeypatch)


BAD = {
    "recipe": ("mxfp8", None),
    "format": ("e5m2", True),
    "amax_history": (0, -1),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_recipes_are_refused_by_name(name: str, value: Any) -> None:
    fields = {"recipe": "delayed", name: value}
    with pytest.raises(ValueError, match=rf"te_fp8\.{name}={value!r} (is not one of|must be at least 1)"):
        TEFloat8(**fields)


def test_what_only_one_recipe_reads_is_refused_with_others() -> None:
    with pytest.raises(ValueError, match=r"te_fp8\.amax_history=16: only recipe='delayed' reads it"):
        TEFloat8(recipe="block", amax_history=16)
    assert TEFloat8(recipe="delayed", amax_history=16).looks_back
    assert not TEFloat8().looks_back


def test_a_recipe_is_a_section_of_the_backend(te: None) -> None:
    backend = BackendConfig.of({"linear": "te", "te_fp8": {"recipe": "delayed", "keep": ["layers.0.*"]}})
    assert backend.te_fp8 == TEFloat8(recipe="delayed", keep=["layers.0.*"])
    with pytest.raises(ValueError, match=r"backend\.te_fp8\.recipes is not a field of TEFloat8: amax_history, format"):
        BackendConfig.of({"linear": "te", "te_fp8": {"recipes": "delayed"}})
    with pytest.raises(ValueError, match=r"backend\.linear='torch': set backend.linear='te', or leave te_fp8 out"):
        BackendConfig(te_fp8=TEFloat8())


MODELS: dict[str, tuple[Any, ...]] = {
    "Llama": (LlamaForCausalLM, LlamaConfig),
    "Qwen3, norms of heads": (Qwen3ForCausalLM, Qwen3Config),
    "Olmo2, norms of all heads": (Olmo2ForCausalLM, Olmo2Config),
    "Gemma, an offset of one": (GemmaForCausalLM, GemmaConfig),
    "Cohere2, layer norms without a bias": (Cohere2ForCausalLM, Cohere2Config),
    "Starcoder2, layer norms, an MLP without a gate": (Starcoder2ForCausalLM, Starcoder2Config, {"use_bias": True}),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_linears_and_norms_of_a_family(model: tuple[Any, ...], te: None) -> None:
    """The model is the one without them: its names, its parameters, and what it computes; no extra state."""
    kind, config_class, changes = (*model, {})[:3]
    config = tiny(config_class, attn="eager", **changes)
    plain = twins(kind, config)[1]
    hf, ours = twins(kind, config, backend=MODULES)
    assert list(ours.state_dict()) == list(plain.state_dict())
    inside = {type(module).__name__ for module in ours.model.modules()}
    assert not inside & {"Linear", "RMSNorm", "LayerNorm"}
    assert "TELinear" in inside
    assert inside & {"TERMSNorm", "TELayerNorm"}
    ids = tokens(2, 9)
    assert_same_step(hf, ours, input_ids=ids, labels=ids)


def test_modules_are_made_anywhere_and_computed_on_a_gpu_only() -> None:
    """Transformer Engine need not be there until it computes."""
    with torch.device("meta"):
        assert initialize_linear_module("te", 8, 6, bias=True).weight.is_meta
        assert initialize_rms_norm_module("te", 8).weight.is_meta
    linear = initialize_linear_module("te", 8, 6, dtype=torch.bfloat16)
    assert linear.weight.dtype == torch.bfloat16
    assert isinstance(linear, nn.Linear)
    assert not list(linear.children())
    assert initialize_rms_norm_module("te", 8).weight.tolist() == [1.0] * 8
    for module in (linear, initialize_rms_norm_module("te", 8), TELinear(8, 6, float8=TEFloat8())):
        with pytest.raises(ValueError, match="computes on CUDA only, and this model is on cpu"):
            module(torch.zeros(2, 8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_recipe_that_looks_back_wants_a_gpu() -> None:
    with pytest.raises(ValueError, match="computes on CUDA only, and there is none: choose"):
        around_forward(TEFloat8(recipe="delayed"), recomputes=False)


def test_copies_compute_with_engines_of_their_own(te: None) -> None:
    linear, x = TELinear(8, 6, bias=False), torch.randn(3, 8)
    expected = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert other._engine is not linear._engine
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.weight.zero_()
        assert not other(x).any()
        assert torch.equal(linear(x), expected)
    assert copy.copy(linear)._engine is linear._engine


def test_saved_and_loaded_through_meta(te: None, tmp_path: Path) -> None:
    model = randomize(OwnLlama(tiny(), MODULES))
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "extra" in key]
    ids = tokens(2, 7)
    for backend in (MODULES, {}):
        loaded = OwnLlama.from_pretrained(tmp_path, backend=backend)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        **{"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 8},
        **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_type_of_rope(rope: dict[str, Any], packed: bool, te: None) -> None:
    config = tiny(attn="eager", rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **rope})
    hf, ours = twins(LlamaForCausalLM, config, backend={"rope_fusion": True})
    ids = tokens(*POSITIONS.shape)
    positions = {"position_ids": POSITIONS} if packed else {}
    assert_same_step(hf, ours, input_ids=ids, labels=ids, use_cache=False, **positions)


TURNING = {
    "Glm, half of the channels": (GlmForCausalLM, GlmConfig, {"head_dim": 8, "pad_token_id": 0}),
    "Phi3, a share in its rope_parameters": (Phi3ForCausalLM, Phi3Config, {"pad_token_id": 0}),
    "Cohere2, some layers": (Cohere2ForCausalLM, Cohere2Config, {}),
    "Gemma": (GemmaForCausalLM, GemmaConfig, {"head_dim": 16}),
}


@pytest.mark.parametrize("model", TURNING.values(), ids=TURNING)
def test_rope_of_other_families(model: tuple[Any, ...], te: None) -> None:
    kind, config, changes = model
    hf, ours = twins(kind, tiny(config, attn="eager", **changes), backend={"rope_fusion": True})
    ids = tokens(2, 9)
    assert_same_step(hf, ours, input_ids=ids, labels=ids)


def test_tokens_of_rows_with_the_same_positions_and_with_others() -> None:
    angles = torch.randn(1, 5, 4)
    alike = Tokens.of(angles)
    assert alike.bounds is None
    assert torch.equal(alike.freqs[:, 0, 0], angles[0])
    other = torch.randn(2, 5, 4)
    freqs, bounds = Tokens.of(other)
    assert bounds is not None
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 10]
    assert torch.equal(freqs.view(2, 5, 4), other)


ATTENDING: dict[str, tuple[Any, ...]] = {
    "Llama, two query heads a key head": (LlamaForCausalLM, LlamaConfig, {}),
    "Granite, a scale of its own": (GraniteForCausalLM, GraniteConfig, {"attention_multiplier": 0.5}),
    "Cohere2, windows": (Cohere2ForCausalLM, Cohere2Config, {"sliding_window": 3, "head_dim": 8}),
}


@pytest.mark.parametrize("model", ATTENDING.values(), ids=ATTENDING)
@pytest.mark.parametrize("batch", ["packed", "padded"])
def test_attention(model: tuple[Any, ...], batch: str, te: None) -> None:
    kind, config, changes = model
    hf, ours = twins(kind, tiny(config, "eager", **changes))
    ours.set_attn_implementation("te")
    ids = tokens(*POSITIONS.shape)
    if batch == "packed":
        assert_same_step(hf, ours, input_ids=ids, labels=ids, position_ids=POSITIONS, use_cache=False)
        return
    real = (torch.arange(16) < torch.tensor([16, 9, 1])[:, None]).long()
    labels = ids.masked_fill(real == 0, -100)
    assert_same_step(hf, ours, real, input_ids=ids, labels=labels, attention_mask=real, use_cache=False)


def test_layers_of_one_kind_share_a_module_that_is_none_of_theirs(te: None) -> None:
    model = OwnLlama(tiny(), {"attn": "te"})
    ids = tokens(1, 5)
    model(ids, use_cache=False)
    model.train()(ids, use_cache=False)
    assert dot_product.cache_info().misses == 1
    assert dot_product.cache_info().hits == 3
    assert not [name for name in nn.Module.state_dict(model) if "extra" in name]


def test_attention_that_it_does_not_have(te: None) -> None:
    with pytest.raises(ValueError, match=r"'te' has no softcap on the scores, as this model needs \(50.0\): use"):
        NeMoAutoModelForCausalLM.from_config(tiny(Gemma2Config, head_dim=8), backend={"attn": "te"})
    model = NeMoAutoModelForCausalLM.from_config(tiny(), backend={"attn": "te"})
    ids = tokens(1, 4)
    left = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="'te' has no attention_mask with padding on the left"):
        model(ids, attention_mask=left, use_cache=False)
    with pytest.raises(ValueError, match=r"'te' has no cache of keys and values: use .*or give use_cache=False"):
        model(ids, past_key_values=DynamicCache(config=model.config))


def test_documents_as_arguments() -> None:
    """A document in each row is the plain case; others are told by their bounds."""
    plain = {"qkv_format": "bshd", "attn_mask_type": "causal"}
    assert layout_of(Documents.rows(3, 16, torch.device("cpu")), 3) == plain
    assert layout_of(Documents.of(torch.arange(16).expand(3, -1)), 3) == plain
    packed = layout_of(Documents.of(POSITIONS), 3)
    assert packed["qkv_format"] == "thd"
    assert packed["cu_seqlens_q"].tolist() == packed["cu_seqlens_kv"].tolist() == [0, 5, 6, 13, 16, 32, 41, 48]
    assert packed["max_seqlen_q"] == packed["max_seqlen_kv"] == 16


def test_products_in_float8(te: None) -> None:
    """Every layer's but those that are named, whatever the number of tokens; recipes as the package calls them."""
    te_fp8 = {"recipe": "block", "format": "hybrid", "keep": ["layers.0.*", "*.down_proj"]}
    config = tiny(attn="eager", intermediate_size=48)
    hf, ours = twins(LlamaForCausalLM, config, backend={"linear": "te", "te_fp8": te_fp8})
    ids = tokens(3, 7)
    assert_same_step(hf, ours, input_ids=ids, labels=ids)
    layers = {name: module for name, module in ours.model.named_modules() if isinstance(module, TELinear)}
    assert list(layers) == [
        f"layers.1.{name}" for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    ]
    for layer in layers.values():
        (recipe,) = layer._engine.made().seen
        assert (recipe.kind, recipe.fp8_format) == ("Float8BlockScaling", "HYBRID")
    assert not float8_state(ours)


def test_widths_and_patterns_that_do_not_fit(te: None) -> None:
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.down_proj has 40 channels.* multiples of 16: name it in te_fp8"
    ):
        OwnLlama(tiny(), {"linear": "te", "te_fp8": {}})
    with pytest.raises(ValueError, match=r"te_fp8.keep: 'layer.0.\*' matches no linear layer, such as 'layers.0.self"):
        OwnLlama(tiny(), {"linear": "te", "te_fp8": {"keep": ["layer.0.*"]}})


def test_a_recipe_that_looks_back_takes_in_once_a_pass(te: None) -> None:
    config = tiny(intermediate_size=48)
    model = OwnLlama(config, {"linear": "te", "te_fp8": {"recipe": "delayed", "amax_history": 4}}).train()
    ids = tokens(2, 8)
    model(ids, labels=ids).loss.backward()
    assert te_stand_in.Recipes.passes == 1
    with torch.no_grad():
        model(ids)
    state = float8_state(model)
    assert te_stand_in.Recipes.passes == 1
    assert len(state) == 2 * 4 * 4
    assert state["te_fp8.model.layers.1.mlp.down_proj.amax_history_fwd"].shape == (4, 3)
    assert all(state[name].any() for name in state if name.endswith("amax_history_fwd"))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="recipe='delayed' does not go with gradient checkpointing"):
        model(ids)
    model.eval()(ids)


def test_recomputed_layers_multiply_as_before(te: None) -> None:
    model = OwnLlama(tiny(intermediate_size=48), {"linear": "te", "te_fp8": {}}).train()
    model.gradient_checkpointing_enable()
    ids = tokens(2, 8)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for module in model.modules():
        if isinstance(module, TELinear):
            assert [recipe.kind for recipe in module._engine.made().seen] == ["Float8CurrentScaling"] * 2


def test_adapters_are_refused_by_name(te: None) -> None:
    model = OwnLlama(tiny(), {"linear": "te"})
    with pytest.raises(ValueError, match=r"qkv_proj takes no adapters: .*use backend.linear='torch' with lora"):
        apply_lora(model, LoRAConfig(), layout_of_model(model))


REFUSED = {
    "gradient checkpointing": ({"te_fp8.recipe": "delayed"}, {"model.gradient_checkpointing": "true"}),
    "mesh.pp=2": ({"te_fp8.recipe": "delayed"}, {"mesh.pp": 2}),
    "torchao's and backend.linear='te' is": ({}, {"model.float8": "rowwise"}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_trainings_that_cannot_be(words: str, te: None) -> None:
    backend, others = REFUSED[words]
    options = {"output_dir": "o", "model.path": "m", "data.train": "d", "model.backend.linear": "te", **others}
    options |= {f"model.backend.{name}": value for name, value in backend.items()}
    with pytest.raises(ConfigError, match=words):
        load_config(TrainConfig, None, [f"--{name}={value}" for name, value in options.items()])


def test_histories_come_back_with_a_training(te: None, overrides: Callable[..., list[str]]) -> None:  # noqa: F811
    def steps(name: str, begin: int, end: int) -> dict[str, Tensor]:
        options = {"model__backend__linear": "te", "model__backend__te_fp8__recipe": "delayed"}
        options["model__backend__te_fp8__keep"] = '["*.down_proj"]'
        run = Run(load_config(TrainConfig, None, overrides(name, **options, train__max_steps=2)), lambda line: None)
        assert run.done == begin
        for step in range(begin + 1, end + 1):
            run.step(step)
        list(run.rows(until=end))
        run.save(end)
        run.checkpoints.wait()
        return float8_state(run.model)

    first = {name: tensor.clone() for name, tensor in steps("a", 0, 1).items()}
    assert first
    assert any(tensor.any() for name, tensor in first.items() if "amax" in name)
    torch.testing.assert_close(steps("a", 1, 1), first, rtol=0, atol=0)


class Pickler(nn.Module):
    """A module that has a state beside its tensors, as those of Transformer Engine."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert torch.equal(state, self.get_extra_state()), "of another model"


@pytest.mark.parametrize("strict", [False, True])
def test_extra_states_are_neither_saved_nor_wanted(strict: bool, tmp_path: Path) -> None:
    plain = randomize(OwnLlama(tiny()))
    model = OwnLlama(tiny())
    model.model.layers[0].mlp.more = Pickler()
    name = "model.layers.0.mlp.more._extra_state"
    assert name in nn.Module.state_dict(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert "_metadata" in vars(model.state_dict())

    foreign = {name: torch.ones(5, dtype=torch.uint8), "model.layers.1._extra_state": torch.ones(5)}
    of_hf = plain.state_dict_adapter.to_hf(plain.state_dict())
    for state in (plain.state_dict(), of_hf, {**plain.state_dict(), **foreign}, {**of_hf, **foreign}):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        found = model.load_state_dict(state, strict=strict)
        assert not found.missing_keys
        assert not found.unexpected_keys
        assert all(map(torch.equal, model.parameters(), plain.parameters()))

    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if "extra" in key]
    save_file({**stored, **foreign}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = OwnLlama.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), plain.parameters()))


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Tells what is mapped into this process."""
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(engine, "package", engine.package.__wrapped__)

    def write(*files: Path) -> None:
        lines = [f"7f00-7f01 r-xp 00000000 fe:00 42    {file}" for file in (*files, Path("/usr/lib/libc.so.6"))]
        (tmp_path / "maps").write_text("\n".join([*lines, "7f02-7f03 rw-p 00000000 00:00 0 "]))

    return write


def test_all_of_the_cudnn_that_torch_has_is_loaded_first(
    mapped: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["libcudnn_graph.so.9", "libcudnn_ops.so.9", "libcudnn.so.9", "libcudnn_adv.so.9"]
    for name in names:
        (tmp_path / name).touch()
    mapped(tmp_path / "libcudnn.so.9")
    loaded: list[str] = []
    monkeypatch.setattr(cudnn.os, "environ", {})
    monkeypatch.setattr(cudnn.ctypes, "CDLL", lambda path, mode: loaded.append(Path(path).name))
    cudnn.load_the_rest()
    assert loaded == names  # each before those that need it
    assert cudnn.os.environ["CUDNN_HOME"] == str(tmp_path)
    mapped()
    cudnn.load_the_rest()
    assert loaded == names


def test_two_versions_of_cudnn_are_refused(te: None, mapped: Callable[..., None], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a", tmp_path / "b"
    mapped(ours / "libcudnn.so.9", ours / "libcudnn_graph.so.9")
    assert engine.package("pytorch").Linear is te_stand_in.Linear
    mapped(ours / "libcudnn.so.9", theirs / "libcudnn_graph.so.9")
    with pytest.raises(
        ImportError, match=f"with parts of two .* from {ours} and {theirs}, .* set to the folder of torch's"
    ):
        engine.package("pytorch")


def test_packing_is_proved_under_tensor_parallelism_too(te: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents share a scale, and each layer has a forward of its own, which stays."""

    def rounds(self: Any, inp: Tensor) -> Tensor:
        scale = inp.abs().max() / 7
        return F.linear((inp / scale).round() * scale, self.weight)

    monkeypatch.setattr(te_stand_in.Linear, "forward", rounds)
    backend = {"linear": "te", "te_fp8": {}}
    model = randomize(NeMoAutoModelForCausalLM.from_config(tiny(intermediate_size=48, head_dim=16), backend=backend))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallelize_tensors(model, tp_plan_of(model), init_device_mesh("cpu", (1,)), {"DecoderLayer"})
        ids = tokens(1, 8)
        before = model(ids, labels=ids, use_cache=False).loss
        check_packing(model, torch.device("cpu"))
        assert torch.equal(model(ids, labels=ids, use_cache=False).loss, before)
        monkeypatch.setattr(checks, "rounds_operands", lambda module: False)
        with pytest.raises(ValueError, match="packed documents see each other"):
            check_packing(model, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _cut(config: Any, folder: Path, ids: Tensor) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        te_stand_in.install(monkeypatch)
        model = NeMoAutoModelForCausalLM.from_pretrained(
            folder, config=config, backend={**MODULES, "rope_fusion": True}
        )
        parallelize_tensors(model, tp_plan_of(model), init_device_mesh("cpu", (2,)), {"DecoderLayer"})
        model(ids, labels=ids, use_cache=False).loss.backward()
        found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
        save_file(found, folder / f"found-{dist.get_rank()}")


@pytest.mark.ranks
@pytest.mark.parametrize("model", [(Qwen3ForCausalLM, Qwen3Config), (Olmo2ForCausalLM, Olmo2Config)])
def test_tensor_parallel_ranks(model: tuple[Any, Any], tmp_path: Path) -> None:
    """Sequence-parallel norms, norms of heads, and shards of the projections: the gradients of one process."""
    config = tiny(model[1], attn="eager", num_key_value_heads=2)
    ours = twins(model[0], config)[1]
    ids = tokens(2, 8)
    ours(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: parameter.grad for name, parameter in ours.named_parameters()}
    ours.save_pretrained(tmp_path)
    run_ranks(2, _cut, config, tmp_path, ids)
    for rank in range(2):
        torch.testing.assert_close(load_file(tmp_path / f"found-{rank}"), expected, rtol=1e-4, atol=1e-5)

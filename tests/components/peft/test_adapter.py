"""Adapters that peft trained on the separate projections, loaded into the fused ones, exported, and refused by name.

Logits agree within 1e-5 relative to their largest value: fp32 sums of at most 40 terms through two layers, taken in
another order (measured: 2e-6).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel.components.layout import Layout
from nemo_automodel.components.peft import (
    LoRAConfig,
    PeftAdapter,
    adapter_tensors,
    apply_lora,
    init_adapters,
    load_adapter_tensors,
    merge_lora,
    save_adapter,
)
from tests.conftest import assert_near, randomize, tiny, tokens, twins

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "v_proj", "gate_proj"]},
    "patterns": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*up_proj": 5},
        "alpha_pattern": {"v_proj": 7, r"^model.layers.0.self_attn.k_proj": 1},
    },
    "rslora": {"target_modules": ["k_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"k_proj": 4}},
    "dora": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"], "use_dora": True},
    "dora, patterns, all biases": {
        "target_modules": PROJECTIONS,
        "use_dora": True,
        "bias": "all",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"gate_proj": 2},
    },
    "biases of adapted layers": {"target_modules": ["k_proj", "down_proj"], "bias": "lora_only"},
    "head and norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "embedding saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "an MLP saved": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "expression": {"target_modules": r".*\.0\..*(q|up)_proj"},
    "head adapted": {"target_modules": ["lm_head", "q_proj"]},
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
}


def trained(folder: Path, options: dict[str, Any], family: str = "llama", seed: int = 1) -> tuple[Any, Any, Any]:
    """An adapter saved by peft after "training" (every trained tensor moved); the base twins; peft's model."""
    hf_class, config_class, changes = MODELS[family]
    hf, ours = twins(hf_class, tiny(config_class, **changes))
    if changes["tie_word_embeddings"]:
        ours.tie_weights()
    theirs = get_peft_model(base := twins(hf_class, hf.config)[0], LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(folder)
    assert base is theirs.base_model.model
    # what counts is what peft makes of the folder
    return hf, ours, PeftModel.from_pretrained(twins(hf_class, hf.config)[0], folder, is_trainable=True)


def adapted(ours: Any, folder: Path) -> Any:
    adapter = PeftAdapter.read(folder)
    adapter.prepare(ours)
    adapter.load(ours)
    return ours


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_logits_are_pefts_on_load_after_export_and_merged(case: str, family: str, tmp_path: Path) -> None:
    hf, ours, theirs = trained(tmp_path / "in", CASES[case], family)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        assert (expected - ours(ids).logits).abs().max() > 0.05, "an adapter that changes nothing proves nothing"
        model = adapted(ours, tmp_path / "in").eval()
        tied = MODELS[family][2]["tie_word_embeddings"] and not case.startswith(("head and", "embedding"))
        assert model.config.tie_word_embeddings is tied
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        assert_near(model(ids).logits, expected, what="loaded")
        model.save_adapter(tmp_path / "out")
        assert_near(PeftModel.from_pretrained(hf, tmp_path / "out").eval()(ids).logits, expected, what="exported")
        merge_lora(model)
        assert_near(model(ids).logits, expected, what="merged")
        assert not any("lora" in name for name, _ in model.named_modules())
        model.save_pretrained(tmp_path / "merged")
        assert_near(type(hf).from_pretrained(tmp_path / "merged")(ids).logits, expected, what="merged and reloaded")


@pytest.mark.parametrize("case", ["patterns", "rslora", "dora", "dora, patterns, all biases"])
def test_gradients_are_pefts(case: str, tmp_path: Path) -> None:
    _, ours, theirs = trained(tmp_path, CASES[case])
    ids = tokens(2, 9)
    model = adapted(ours, tmp_path).eval()
    model(input_ids=ids, labels=ids).loss.backward()
    theirs.eval()(input_ids=ids, labels=ids).loss.backward()
    found = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            found[name.replace(".default", "").replace("vector.weight", "vector")] = parameter.grad
    own = adapter_tensors(model)
    assert own.keys() == found.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0
        assert_near(own[name].grad, gradient, what=name)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["patterns", "dora", "dora, patterns, all biases", "head and norms saved"])
@torch.no_grad()
def test_in_bf16_the_error_is_of_the_size_of_pefts(case: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Against float64 with the same weights, root mean squares: ours over peft's was 0.6 to 1.6 in all `CASES`.

    Both round at a few dozen places, not at the same ones. peft's error is a fiftieth of the logits or less.
    """
    hf, ours, _ = trained(tmp_path, CASES[case])
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value.to(stored) for key, value in load_file(file).items()}, file, {"format": "pt"})
    theirs = PeftModel.from_pretrained(hf.bfloat16(), tmp_path).eval()
    model = adapted(ours.bfloat16(), tmp_path).eval()
    ids = tokens(4, 16)
    actual, expected = (m(ids).logits.double() for m in (model, theirs))
    truth = theirs.double()(ids).logits
    assert truth.norm() > 30 * (expected - truth).norm() > 0
    assert (actual - truth).norm() < 2 * (expected - truth).norm()


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_pefts(dora: bool) -> None:
    """One mask on a plain layer (a fused one draws one for all parts), through what DoRA adds to the base product."""
    base = randomize(nn.Sequential(nn.Linear(8, 5)))
    theirs = get_peft_model(
        randomize(nn.Sequential(nn.Linear(8, 5))),
        LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, use_dora=dora),
    )
    apply_lora(base, LoRAConfig(r=2, alpha=8, dropout=0.5, dora=dora), Layout(()))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter).abs())
    names = {n.replace(".default", "").replace("vector.weight", "vector"): p for n, p in theirs.named_parameters()}
    load_adapter_tensors(base, {name: p for name, p in names.items() if "lora_" in name})
    x = torch.randn(6, 8)
    torch.manual_seed(3)
    expected = theirs.train()(x)
    torch.manual_seed(3)
    assert_near(base.train()(x), expected)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    targets=st.sets(st.sampled_from(PROJECTIONS), min_size=1),
    ranks=st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 6), max_size=3),
    alphas=st.dictionaries(st.sampled_from(PROJECTIONS), st.integers(1, 9), max_size=3),
    dora=st.booleans(),
)
def test_any_subset_of_targets_and_ranks(targets: set, ranks: dict, alphas: dict, dora: bool, tmp_path: Path) -> None:
    options = {"target_modules": sorted(targets), "rank_pattern": ranks, "alpha_pattern": alphas, "use_dora": dora}
    _, ours, theirs = trained(tmp_path, options)
    ids = tokens(1, 6)
    assert_near(adapted(ours, tmp_path)(ids).logits, theirs.eval()(ids).logits)


def test_transformers_own_class_takes_the_same_adapter(tmp_path: Path) -> None:
    hf, _, theirs = trained(tmp_path / "in", CASES["dora, patterns, all biases"])
    ids = tokens(1, 6)
    model = adapted(hf, tmp_path / "in")
    assert_near(model(ids).logits, theirs.eval()(ids).logits)


def test_share_a_is_one_tensor_and_exports_as_equal_copies(tmp_path: Path) -> None:
    hf, ours = twins(LlamaForCausalLM, tiny())
    apply_lora(ours, LoRAConfig(r=2, alpha=3, targets=["q_proj", "v_proj", "o_proj"], share_a=True), layout(ours))
    with torch.no_grad():
        for parameter in adapter_tensors(ours).values():
            parameter.normal_(std=0.3)
    stored = {key: value for key, value in adapter_tensors(ours).items() if "layers.0.self_attn" in key}
    at = "base_model.model.model.layers.0.self_attn."
    assert stored[f"{at}q_proj.lora_A.weight"] is stored[f"{at}v_proj.lora_A.weight"]
    ours.save_adapter(tmp_path)
    ids = tokens(1, 6)
    assert_near(PeftModel.from_pretrained(hf, tmp_path)(ids).logits, ours(ids).logits)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"{at}v_proj.lora_A.weight"] += 1
    with pytest.raises(ValueError, match=r"v_proj.lora_A.weight: differs from .*q_proj.*share_a"):
        load_adapter_tensors(ours, tensors)


def layout(model: Any) -> Layout:
    return model.state_dict_adapter.layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_adapter_is_a_no_op_and_meta_models_start_alike(dtype: torch.dtype) -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    ours.to(dtype)
    ids, other = tokens(1, 5), type(ours)(tiny()).to(dtype)
    before = ours(ids).logits
    torch.manual_seed(4)
    apply_lora(ours, LoRAConfig(r=2, dora=True, targets=["q_proj", "down_proj"]), layout(ours))
    torch.testing.assert_close(ours(ids).logits, before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0)
    weights = {name: p for name, p in ours.state_dict().items() if "lora_" not in name}
    with torch.device("meta"):
        other = type(ours)(tiny()).to(dtype)
    apply_lora(other, LoRAConfig(r=2, dora=True, targets=["q_proj", "down_proj"]), layout(other))
    assert all(p.is_meta for p in adapter_tensors(other).values())
    with pytest.raises(ValueError, match="meta device"):
        init_adapters(other)
    other.to_empty(device="cpu")
    nn.Module.load_state_dict(other, weights, strict=False)
    torch.manual_seed(4)
    init_adapters(other)
    for key, value in adapter_tensors(ours).items():
        assert torch.equal(adapter_tensors(other)[key], value), key


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "bias of B": ({"lora_bias": True}, "lora_bias=True"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["mlp"]}, "target_parameters"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "quantized": ({"use_qalora": True}, "use_qalora"),
    "unknown": ({"use_newlora": {"a": 1}}, "use_newlora"),
    "residual base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'.*initial_model"),
    "bias option": ({"bias": "some"}, "bias='some'"),
    "rank": ({"r": 4}, r"q_proj.lora_A.weight: shape \[3, 32\].*rank 4"),
    "pattern": ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern: 'q_proj'"),
    "less than targets": ({"target_modules": ["q_proj", "k_proj"]}, "k_proj: .*targets it, but it has no adapter"),
    "more than targets": ({"target_modules": ["k_proj"]}, "q_proj: has an adapter, but .* does not target it"),
    "no magnitude": ({"use_dora": True}, "q_proj.lora_magnitude_vector: missing"),
    "module not there": ({"modules_to_save": ["lm_head"]}, "lm_head.weight: missing"),
    "bias not there": ({"bias": "lora_only"}, "q_proj.bias: missing"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    trained(folder, {"target_modules": ["q_proj"]})
    return folder


@pytest.mark.parametrize("case", EDITS)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(case: str, plain: Path, tmp_path: Path) -> None:
    edit, message = EDITS[case]
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    _refused(tmp_path, message)


def _refused(folder: Path, message: str) -> None:
    ours = twins(LlamaForCausalLM, tiny(**MODELS["llama"][2]))[1]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        adapted(ours, folder)
    assert not any("lora" in name for name, _ in ours.named_parameters()), "refused, but the model was changed"


AT = "base_model.model.model.layers.0.self_attn."
TENSORS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 61)}),
        "LoRA on an embedding",
    ),
    "bias of B": (lambda t: t.update({f"{AT}q_proj.lora_B.bias": torch.zeros(24)}), "q_proj.lora_B.bias: .*lora_bias"),
    "unknown": (lambda t: t.update({f"{AT}q_proj.lora_C.weight": torch.zeros(1)}), "lora_C.weight: not used"),
    "no prefix": (lambda t: t.update({"q_proj.lora_A.weight": torch.zeros(1)}), "start with base_model.model."),
    "half": (lambda t: t.pop(f"{AT}q_proj.lora_B.weight"), "q_proj.lora_B: missing"),
    "shape": (lambda t: t.update({f"{AT}q_proj.lora_B.weight": torch.zeros(3, 3)}), r"lora_B.weight: shape \[3, 3\]"),
    "layer": (
        lambda t: t.update({f"{AT}q_proj.lora_A.weight".replace("s.0", "s.7"): torch.zeros(3, 32)}),
        "layers.7.self_attn.q_proj: the model has no such",
    ),
    "fused": (
        lambda t: t.update({f"{AT}qkv_proj.lora_A.weight": torch.zeros(3, 32)}),
        "qkv_proj: an adapter trained on fused",
    ),
    "base weight": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(61, 32)}),
        "embed_tokens.weight: .*modules_to_save",
    ),
    "bias": (lambda t: t.update({f"{AT}q_proj.base_layer.bias": torch.zeros(24)}), "q_proj.base_layer.bias: .*'none'"),
    "magnitude": (
        lambda t: t.update({f"{AT}q_proj.lora_magnitude_vector": torch.zeros(24)}),
        "a DoRA magnitude, but .*use_dora false",
    ),
    "nothing": (lambda t: t.clear(), "q_proj: .*has no adapter"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_tensor_that_has_no_place_is_refused_by_name(case: str, plain: Path, tmp_path: Path) -> None:
    edit, message = TENSORS[case]
    tensors = load_file(plain / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    shutil.copy(plain / "adapter_config.json", tmp_path)
    _refused(tmp_path, message)


def test_files_that_are_missing_or_damaged_are_named(plain: Path, tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "nowhere: no such folder")
    _refused(tmp_path, "adapter_config.json does not exist")
    shutil.copy(plain / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    _refused(tmp_path, "adapter_model.safetensors does not exist; adapter_model.bin is a pickle")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1234567890")
    _refused(tmp_path, "adapter_model.safetensors is damaged")


def test_another_bases_head_adapters_twice_and_nothing_to_save_are_refused(tmp_path: Path) -> None:
    _, ours, _ = trained(tmp_path, CASES["head adapted"])
    with pytest.raises(ValueError, match=r"no adapters to save"):
        save_adapter(ours, tmp_path)
    with torch.no_grad():
        ours.lm_head.weight.add_(1)
    adapter = PeftAdapter.read(tmp_path)
    adapter.prepare(ours)
    with pytest.raises(ValueError, match=r"lm_head.base_layer.weight is not the model's own"):
        adapter.load(ours)
    with pytest.raises(ValueError, match="has an adapter already"):
        apply_lora(ours, LoRAConfig(), layout(ours))


def test_patterns_and_shared_a_of_a_training_are_checked() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    config = LoRAConfig(targets=["qkv_proj"], share_a=True, rank_pattern={"q_proj": 2})
    with pytest.raises(ValueError, match=r"share_a: .*'q_proj': 2"):
        apply_lora(ours, config, layout(ours))
    with pytest.raises(ValueError, match=r"alpha_pattern: 'up_proj' matches none"):
        apply_lora(ours, LoRAConfig(targets=["q_proj"], alpha_pattern={"up_proj": 2}), layout(ours))
    with pytest.raises(ValueError, match=r"rank_pattern.k_proj=0"):
        LoRAConfig(rank_pattern={"k_proj": 0})

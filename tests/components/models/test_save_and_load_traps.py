"""Ways to lose weights in silence, each of them loud or exact."""

import os
import stat
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
)

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel._transformers import registry
from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.peft import LoRAConfig, apply_lora
from tests.conftest import randomize, tiny, tokens, twins


def test_a_part_left_out_of_a_loose_load_is_reported_and_keeps_its_rows() -> None:
    hf, ours = twins(LlamaForCausalLM, tiny())
    before = ours.state_dict_adapter.to_hf(ours.state_dict())
    other = randomize(LlamaForCausalLM(tiny()), seed=5).state_dict()
    given = {name: value for name, value in other.items() if "k_proj" not in name}
    result = ours.load_state_dict(given, strict=False)
    assert sorted(result.missing_keys) == sorted(name for name in other if "k_proj" in name)
    after = ours.state_dict_adapter.to_hf(ours.state_dict())
    for name in hf.state_dict():
        assert torch.equal(after[name], before[name] if "k_proj" in name else other[name]), name


def test_a_loose_load_onto_meta_leaves_no_garbage() -> None:
    state = randomize(LlamaForCausalLM(tiny())).state_dict()
    with torch.device("meta"):
        model = registry.resolve("LlamaForCausalLM")(tiny())
    model.load_state_dict({n: v for n, v in state.items() if "up_proj" not in n}, strict=False, assign=True)
    fused = model.model.layers[0].mlp.gate_up_proj.weight
    assert not fused.is_meta
    assert torch.equal(fused[0::2], state["model.layers.0.mlp.gate_proj.weight"])
    assert fused[1::2].isnan().all()  # what was never given cannot pass for a weight


def test_a_model_with_adapters_is_not_saved_without_them(tmp_path: Path) -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    apply_lora(ours, LoRAConfig(r=2), ours.state_dict_adapter.layout)
    with pytest.raises(ValueError, match="fold them in first"):
        ours.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_saved_beside_an_adapter(tmp_path: Path) -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        ours.save_pretrained(tmp_path)


def test_the_backbone_alone_is_not_saved(tmp_path: Path) -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    with pytest.raises(TypeError, match="save the whole model"):
        ours.model.save_pretrained(tmp_path)


def test_a_tied_classifier_takes_its_own_hf_state_dict() -> None:
    config = tiny(tie_word_embeddings=True, num_labels=3, pad_token_id=0)
    hf, ours = twins(LlamaForSequenceClassification, config)
    ours.load_state_dict(hf.state_dict())
    ours.load_state_dict(ours.state_dict_adapter.to_hf(ours.state_dict()))
    torch.testing.assert_close(ours(tokens(2, 5)).logits, hf(tokens(2, 5)).logits)


def test_editing_hf_tensors_does_not_reach_the_model() -> None:
    _, ours = twins(LlamaForCausalLM, tiny(num_key_value_heads=1))
    before = ours.model.layers[0].self_attn.qkv_proj.weight.clone()
    for name, tensor in ours.state_dict_adapter.to_hf(ours.state_dict()).items():
        if "q_proj" in name:
            tensor.zero_()
    assert torch.equal(ours.model.layers[0].self_attn.qkv_proj.weight, before)


def test_others_may_read_what_is_saved(tmp_path: Path) -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    old = os.umask(0o022)
    try:
        ours.save_pretrained(tmp_path / "model")
    finally:
        os.umask(old)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)
    assert "model.safetensors" in modes


class TestTransformersOwnClass:
    """An architecture that is not registered keeps the same promises."""

    @pytest.fixture
    def mistral(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        others = OrderedDict(registry.MODEL_ARCH_MAPPING)  # a copy: an item that comes back would be the last
        del others["MistralForCausalLM"]
        monkeypatch.setattr(registry, "MODEL_ARCH_MAPPING", others)
        config = tiny(MistralConfig, sliding_window=None)
        randomize(MistralForCausalLM(config)).save_pretrained(tmp_path / "mistral")
        return tmp_path / "mistral"

    def test_a_missing_tensor_is_an_error(self, mistral: Path) -> None:
        state = load_file(mistral / "model.safetensors")
        del state["model.layers.0.mlp.up_proj.weight"]
        save_file(state, mistral / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight"):
            NeMoAutoModelForCausalLM.from_pretrained(mistral)

    def test_a_pickle_is_not_read(self, mistral: Path) -> None:
        torch.save(load_file(mistral / "model.safetensors"), mistral / "pytorch_model.bin")
        (mistral / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="safetensors"):
            NeMoAutoModelForCausalLM.from_pretrained(mistral)

    def test_a_kernel_that_it_would_ignore_is_refused(self, mistral: Path) -> None:
        with pytest.raises(ValueError, match=r"backend\.rms_norm='torch_fp32' has no effect"):
            NeMoAutoModelForCausalLM.from_pretrained(mistral, backend={"rms_norm": "torch_fp32"})

    def test_it_loads_equal(self, mistral: Path) -> None:
        ours, hf = (auto.from_pretrained(mistral) for auto in (NeMoAutoModelForCausalLM, AutoModelForCausalLM))
        assert torch.equal(ours(tokens(1, 6)).logits, hf(tokens(1, 6)).logits)

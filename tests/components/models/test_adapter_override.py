"""The adapter of docs/write-a-model.md: loads a checkpoint with other names, and saves it as it was."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM as HFLlamaForCausalLM

from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import assert_near, randomize, tiny, tokens

GUIDE = Path(__file__).parents[3] / "docs" / "write-a-model.md"
SINGLE = "model.safetensors"
THEIRS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


@pytest.fixture(scope="module")
def model_class() -> type[LlamaForCausalLM]:
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "class MyAdapter" in block)
    names: dict = {"__name__": "guide"}
    exec(compile(block, "guide", "exec"), names)
    return type("LlamaWithOtherNames", (LlamaForCausalLM,), {"adapter_class": names["MyAdapter"]})


def save_theirs(folder: Path, **changes: object) -> HFLlamaForCausalLM:
    """A Llama of transformers, in ``folder`` with the other names."""
    hf = randomize(HFLlamaForCausalLM(tiny(**changes))).eval()
    hf.save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    for name, other in THEIRS.items():
        tensors = {key.replace(name, other): value for key, value in tensors.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return hf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_there_and_back_bitwise(tmp_path, model_class, changes, dtype):
    hf = save_theirs(tmp_path / "theirs", **changes)
    if dtype == torch.bfloat16:
        before = {key: value.bfloat16() for key, value in load_file(tmp_path / "theirs" / SINGLE).items()}
        save_file(before, tmp_path / "theirs" / SINGLE, metadata={"format": "pt"})
    model = model_class.from_pretrained(tmp_path / "theirs", dtype=dtype)
    ids = tokens(2, 9)
    if dtype == torch.float32:
        assert_near(model(input_ids=ids).logits, hf(input_ids=ids).logits)
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / folder / SINGLE) for folder in ("theirs", "ours"))
    assert any("feed_forward.w3" in key for key in theirs)
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype == dtype
        assert torch.equal(ours[key], value), key


def test_a_tensor_that_is_missing_is_named(tmp_path, model_class):
    save_theirs(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    del tensors["model.layers.1.attention.wk.weight"]
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.weight"):
        model_class.from_pretrained(tmp_path)


def test_keys_are_excluded_by_their_own_names(tmp_path, model_class):
    save_theirs(tmp_path)
    model = model_class.from_pretrained(tmp_path)
    kept = model.state_dict_adapter.to_hf(model.state_dict(), exclude_key_regex=r".*attention\.")
    assert not any("attention." in key for key in kept)
    assert len(kept) == len(load_file(tmp_path / SINGLE)) - 2 * 4

"""`CombinedProjectionStateDictAdapter`: exact both ways, adapters of peft included."""

import re

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import given, settings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel._transformers import registry
from nemo_automodel.components.models.common import CombinedProjectionStateDictAdapter
from tests.conftest import assert_near, randomize, tiny, tokens, twins
from tests.distributed.ranks import run_ranks

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "model.layers.0.self_attn."

configs = st.builds(
    lambda kv_heads, group, tied, **changes: tiny(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        hidden_size=kv_heads * group * 2,
        num_hidden_layers=1,
        vocab_size=7,
        tie_word_embeddings=tied,
        **changes,
    ),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 5),
    head_dim=st.integers(1, 6).map(lambda half: 2 * half),
    intermediate_size=st.integers(1, 13),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tied=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(config=configs, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_there_and_back_is_bitwise_the_same(config, dtype):
    hf = randomize(LlamaForCausalLM(config)).to(dtype)
    original = {name: tensor.detach() for name, tensor in hf.state_dict().items()}
    if config.tie_word_embeddings:
        del original[HEAD]
    before = {name: tensor.clone() for name, tensor in original.items()}
    ours = registry.resolve("LlamaForCausalLM")(config).to(dtype)
    adapter = ours.state_dict_adapter

    own = adapter.from_hf(original)
    assert {k: (v.shape, v.dtype) for k, v in own.items()} == {
        k: (v.shape, v.dtype) for k, v in ours.state_dict().items()
    }
    back = adapter.to_hf(own)
    assert back.keys() == original.keys()
    for name, tensor in back.items():
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, before[name])
        assert torch.equal(original[name], before[name]), "the input is left alone"


def adapter_of(model_or_config):
    config = getattr(model_or_config, "config", model_or_config)
    return CombinedProjectionStateDictAdapter(config)


def test_rows_stand_where_the_spec_puts_them():
    adapter = adapter_of(tiny(num_key_value_heads=2, num_attention_heads=4, head_dim=1))
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    fused = [0, 1, 10, 20, 2, 3, 11, 21]
    assert adapter._interleave_qkv(q, k, v).tolist() == fused
    assert adapter._interleave_qkv(q[:, None], k[:, None], v[:, None]).tolist() == [[row] for row in fused]
    own = adapter.from_hf({"x.gate_proj.bias": q, "x.up_proj.bias": q + 10})
    assert own["x.gate_up_proj.bias"].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]


def test_tied_head_is_one_storage_both_ways():
    adapter = adapter_of(tiny(tie_word_embeddings=True))
    embedding = torch.randn(61, 32)
    own = adapter.from_hf({EMBEDDING: embedding})
    assert own[HEAD] is own[EMBEDDING]
    assert list(adapter.to_hf(own)) == [EMBEDDING]
    _, ours = twins(LlamaForCausalLM, tiny(tie_word_embeddings=True))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert HEAD not in ours.state_dict_adapter.to_hf(ours.state_dict())
    assert HEAD in adapter_of(tiny()).to_hf(dict.fromkeys((EMBEDDING, HEAD), embedding)), "the config ties nothing"


def test_a_head_that_is_there_although_tied_is_kept():
    adapter = adapter_of(tiny(tie_word_embeddings=True))
    state = {EMBEDDING: torch.randn(61, 32), HEAD: torch.randn(61, 32)}
    own = adapter.from_hf(state)
    assert torch.equal(own[HEAD], state[HEAD])
    assert adapter.to_hf(own).keys() == state.keys()


def test_exclude_key_regex():
    _, ours = twins(Qwen2ForCausalLM, tiny(Qwen2Config))
    everything = ours.state_dict_adapter.to_hf(ours.state_dict())
    kept = ours.state_dict_adapter.to_hf(ours.state_dict(), exclude_key_regex=r".*\.(q_proj\.bias|up_proj\..*)$")
    assert everything.keys() - kept.keys() == {k for k in everything if "q_proj.bias" in k or "up_proj" in k} != set()


HOLES = [
    ("k_proj.weight", "qkv_proj.weight"),
    ("v_proj.bias", "qkv_proj.bias"),
    ("up_proj.weight", "gate_up_proj.weight"),
]


@pytest.mark.parametrize(("absent", "own"), HOLES)
def test_a_missing_part_is_refused_by_name(absent, own):
    hf, ours = twins(Qwen2ForCausalLM, tiny(Qwen2Config))
    state = {k: v for k, v in hf.state_dict().items() if not (k.startswith("model.layers.1") and k.endswith(absent))}
    with pytest.raises(KeyError, match=rf"model\.layers\.1\..*{own} is made of .*missing: model\.layers\.1.*{absent}"):
        ours.state_dict_adapter.from_hf(state)


def test_head_counts_that_do_not_fit_are_refused():
    hf, _ = twins(LlamaForCausalLM, tiny())
    with pytest.raises(ValueError, match=r"qkv_proj takes rows in blocks of .*k_proj 16"):
        adapter_of(tiny(num_key_value_heads=4)).from_hf(hf.state_dict())
    with pytest.raises(ValueError, match="65 rows are not a whole number of groups"):
        adapter_of(tiny()).to_hf({PREFIX + "qkv_proj.weight": torch.randn(65, 32)})


FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [FUSED, ["qkv_proj"], ["gate_up_proj", "o_proj"]], ids=" ".join)
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft_give_the_same_logits_on_transformers_model(dora, targets):
    hf, ours = twins(Qwen2ForCausalLM, tiny(Qwen2Config))
    options = {"r": 3, "lora_alpha": 5, "use_dora": dora}
    adapted = randomize_adapter(peft.get_peft_model(ours, peft.LoraConfig(target_modules=targets, **options)))
    state = ours.state_dict_adapter.to_hf(peft.get_peft_model_state_dict(adapted))

    separate = [m for m in SEPARATE if m in targets or any(m in parts for parts in parts_of(targets))]
    reference = peft.get_peft_model(hf, peft.LoraConfig(target_modules=separate, **options))
    expected = peft.get_peft_model_state_dict(reference)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert sum("magnitude" in key for key in state) == (2 * len(separate) if dora else 0)
    loaded = peft.set_peft_model_state_dict(reference, state)
    assert not loaded.unexpected_keys

    ids = tokens(2, 9)
    with torch.no_grad():
        with adapted.disable_adapter():
            plain = adapted(ids).logits
        assert (plain - adapted(ids).logits).abs().max() > 0.1, "the adapter does something"
        assert_near(adapted(ids).logits, reference(ids).logits)
    back = ours.state_dict_adapter.from_hf(state)
    for key, tensor in peft.get_peft_model_state_dict(adapted).items():
        assert torch.equal(back[key], tensor)


def parts_of(targets):
    return [fusion.parts for fusion in adapter_of(tiny()).layout.fusions if fusion.fused in targets]


def randomize_adapter(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.normal_(0, 0.3)
    return model.eval()


def test_different_lora_a_per_part_is_refused():
    keys = [f"{PREFIX}{part}.lora_A.weight" for part in ("q_proj", "k_proj", "v_proj")]
    with pytest.raises(ValueError, match=re.escape(PREFIX) + r"qkv_proj\.lora_A.*different lora_A"):
        adapter_of(tiny()).from_hf({key: torch.randn(2, 32) for key in keys})


def check_sharded() -> None:
    """Three rows each of q, k, v over two ranks: neither they nor the fused nine divide, and a cut splits a group."""
    mesh = init_device_mesh("cpu", (2,))
    adapter = adapter_of(tiny(num_attention_heads=3, num_key_value_heads=3, hidden_size=12, head_dim=1))
    for shape in ((3,), (3, 5)):
        parts = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
        sharded = [distribute_tensor(part, mesh, [Shard(0)]) for part in parts]
        whole, original = adapter._gather_1d_bias(sharded[0])
        assert not isinstance(whole, DTensor)
        assert torch.equal(whole, parts[0])
        assert torch.equal(adapter._restore_1d_bias(whole, original).to_local(), original.to_local())

        state = dict(zip(("a.q_proj.x", "a.k_proj.x", "a.v_proj.x"), sharded, strict=True))
        fused = adapter.from_hf(state)["a.qkv_proj.x"]
        assert isinstance(fused, DTensor)
        assert fused.placements == (Shard(0),)
        assert torch.equal(fused.full_tensor(), adapter._interleave_qkv(*parts))
        for key, part in adapter.to_hf({"a.qkv_proj.x": fused}).items():
            assert part.placements == (Shard(0),)
            assert torch.equal(part.to_local(), state[key].to_local())
    plain = torch.ones(3)
    assert adapter._gather_1d_bias(plain)[0] is plain
    assert adapter._restore_1d_bias(plain, torch.zeros(3)) is plain


def test_dtensor_biases_that_do_not_divide_evenly():
    run_ranks(2, check_sharded)


def test_layers_load_huggingface_names_in_pieces():
    """transformers' Trainer reloads shard by shard, with ``strict=False``."""
    hf, ours = twins(Qwen2ForCausalLM, tiny(Qwen2Config))
    fresh = type(ours)(ours.config)
    for key, value in hf.state_dict().items():
        assert not fresh.load_state_dict({key: value}, strict=False).unexpected_keys
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), ours.state_dict().values(), strict=True))

"""Loading through the public classes: equal to transformers where the checkpoint fits, one clear error where not."""

import contextlib
import ctypes
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers import LlamaForCausalLM as HFLlamaForCausalLM
from transformers import Qwen2ForCausalLM as HFQwen2ForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

from nemo_automodel._transformers.auto_model import (
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForSequenceClassification,
)
from nemo_automodel.components.checkpoint import CheckpointError, loading
from nemo_automodel.components.models.common import CombinedProjectionStateDictAdapter
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import assert_near, randomize, tiny, tokens

LOADERS = [LlamaForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_pretrained]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ATTENTION = "model.layers.0.self_attn."
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def save_hf(folder: Path, config=None, dtype=torch.float32, **kwargs):
    """transformers' model with random weights, in ``folder``."""
    config = config or tiny()
    hf_class = HFQwen2ForCausalLM if isinstance(config, Qwen2Config) else HFLlamaForCausalLM
    hf = randomize(hf_class(config)).to(dtype).eval()
    hf.save_pretrained(folder, **kwargs)
    return hf


def edit(folder: Path, changes) -> None:
    """Add or replace tensors of the single file; None takes one away."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_weights(ours, hf) -> None:
    """Bitwise, under Hugging Face's names; nothing is left on meta, and RoPE's tables are those of transformers."""
    actual, expected = ours.state_dict_adapter.to_hf(ours.state_dict()), hf.state_dict()
    if HEAD not in actual:
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        actual[HEAD] = actual[EMBEDDING]
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    assert torch.equal(ours.model.rotary_emb.inv_freq, hf.model.rotary_emb.inv_freq)
    assert torch.equal(ours.model.rotary_emb.original_inv_freq, hf.model.rotary_emb.original_inv_freq)


CONFIGS = {
    "llama": tiny(),
    "tied": tiny(tie_word_embeddings=True),
    "MQA with biases": tiny(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "MHA, odd head_dim": tiny(num_key_value_heads=4, head_dim=6),
    "qwen2": tiny(Qwen2Config),
    "llama3 rope": tiny(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
}


@pytest.mark.parametrize("piece", [100, loading.PIECE])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_equal_transformers_whatever_the_pieces(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr(loading, "PIECE", piece)
    hf = save_hf(tmp_path, CONFIGS[name])
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path)
    assert not ours.training
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert_same_weights(ours, hf)
    ids = tokens(2, 9)
    assert_near(ours(input_ids=ids).logits, hf(input_ids=ids).logits)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [*DTYPES, None], ids=str)
def test_dtypes(tmp_path, stored, wanted):
    save_hf(tmp_path, dtype=stored)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted or "auto")
    ways = [{"dtype": "auto"}, {}] if wanted is None else [{"dtype": wanted}, {"torch_dtype": str(wanted)[6:]}]
    for kwargs in ways:
        ours = LlamaForCausalLM.from_pretrained(tmp_path, **kwargs)
        assert ours.dtype == hf.dtype == (wanted or stored)
        assert_same_weights(ours, hf)
        assert ours.model.rotary_emb.inv_freq.dtype == torch.float32


def test_dtype_of_a_config_without_one_is_that_of_the_weights(tmp_path):
    save_hf(tmp_path, dtype=torch.bfloat16)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.dtype = None
    assert LlamaForCausalLM.from_pretrained(tmp_path, config=config).dtype == torch.bfloat16


def test_device(tmp_path):
    hf = save_hf(tmp_path)
    for device in ("cpu", torch.device("cpu")):
        assert_same_weights(NeMoAutoModelForCausalLM.from_pretrained(tmp_path, device=device), hf)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_device_cuda(tmp_path, wanted):
    save_hf(tmp_path, dtype=torch.bfloat16)
    ours = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, device="cuda", dtype=wanted)
    assert {tensor.device.type for tensor in (*ours.parameters(), *ours.buffers())} == {"cuda"}
    assert_same_weights(ours.cpu(), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=wanted))


@pytest.mark.parametrize("load", LOADERS)
def test_sharded_there_and_back(tmp_path, load):
    hf = save_hf(tmp_path / "theirs", max_shard_size="5KB")
    ours = load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", max_shard_size="5KB")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 5
    assert_same_weights(load(tmp_path / "ours"), hf)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is HFLlamaForCausalLM
    assert_same_weights(ours, back)


def test_quantized_checkpoints_are_refused_by_their_config(tmp_path):
    save_hf(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in LOADERS:
        with pytest.raises(
            CheckpointError, match="quantization_config has quant_method 'gptq'; only 'fp8' in blocks is read"
        ):
            load(tmp_path)


def test_rope_tables_of_old_checkpoints_are_computed_not_loaded(tmp_path):
    hf = save_hf(tmp_path)
    edit(tmp_path, {f"{ATTENTION}rotary_emb.inv_freq": torch.zeros(4)})
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), hf)


Q, K, V, O = (f"{ATTENTION}{part}_proj.weight" for part in "qkvo")  # noqa: E741
# name: (tensors that change, config that changes, what the message has to say, line by line)
MISFITS = {
    "unexpected key": ({"model.extra.weight": torch.ones(2)}, {}, ["model.extra.weight: not used by this model"]),
    "bias nobody has": ({Q.replace("weight", "bias"): torch.ones(32)}, {}, [f"{ATTENTION}q_proj.bias: not used"]),
    "fused key": (
        {f"{ATTENTION}qkv_proj.weight": torch.ones(64, 32)},
        {},
        [f"{ATTENTION}qkv_proj.weight: not used by this model"],
    ),
    "fused key instead": (
        {f"{ATTENTION}qkv_proj.weight": torch.ones(64, 32), Q: None, K: None, V: None},
        {},
        [f"{ATTENTION}qkv_proj.weight: not used", f"{Q}: missing"],
    ),
    "missing norm": ({"model.norm.weight": None}, {}, ["model.norm.weight: missing"]),
    "missing head": ({HEAD: None}, {}, ["lm_head.weight: missing"]),
    "missing q": ({Q: None}, {}, [f"{Q}: missing"]),
    "missing k": ({K: None}, {}, [f"{K}: missing"]),
    "missing v": ({V: None}, {}, [f"{V}: missing"]),
    "q, k and v missing": ({Q: None, K: None, V: None}, {}, [f"{name}: missing" for name in (Q, K, V)]),
    "shape": ({O: torch.ones(32, 31)}, {}, [f"{O}: shape [32, 31] where the config asks for [32, 32]"]),
    "dimensions": ({O: torch.ones(32)}, {}, [f"{O}: shape [32] where"]),
    "shape that broadcasts": ({K: torch.ones(16, 1)}, {}, [f"{K}: shape [16, 1] where"]),
    "KV heads": ({}, {"num_key_value_heads": 1}, [f"{K}: shape [16, 32] where the config asks for [8, 32]"]),
    "head_dim": ({}, {"head_dim": 4}, [f"{Q}: shape [32, 32] where the config asks for [16, 32]"]),
    "vocabulary": ({}, {"vocab_size": 62}, [f"{EMBEDDING}: shape [61, 32] where the config asks for [62, 32]"]),
    "too few layers": ({}, {"num_hidden_layers": 1}, ["model.layers.1.mlp.down_proj.weight: not used by this model"]),
    "too many layers": ({}, {"num_hidden_layers": 3}, ["model.layers.2.mlp.down_proj.weight: missing"]),
    **{
        f"stored as {dtype}": ({O: torch.ones(32, 32).to(dtype)}, {}, [f"o_proj.weight: stored as {dtype}; quantized"])
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.bool)
    },
    "several": (
        {"model.x": torch.ones(1), Q: None, O: torch.ones(1), "model.norm.weight": torch.ones(32, dtype=torch.int8)},
        {},
        ["model.x: not used", f"{Q}: missing", f"{O}: shape [1] where", "model.norm.weight: stored as torch.int8"],
    ),
    "very many": ({f"model.x{i}": torch.ones(1) for i in range(20)}, {}, ["model.x0: not used", "and 12 more"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_named_all_at_once(tmp_path, name):
    tensors, changes, lines = MISFITS[name]
    save_hf(tmp_path)
    edit(tmp_path, tensors)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} does not fit the model:\n")) as caught:
            load(tmp_path, **changes)
        for line in lines:
            assert line in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2, "head_dim": 8},
            ValueError,
            "num_attention_heads=3 is not",
        ),
        ({"atn_implementation": "sdpa"}, TypeError, "'atn_implementation'"),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not a floating-point dtype"),
    ],
)
@pytest.mark.parametrize("load", LOADERS)
def test_options_that_make_no_sense(tmp_path, load, kwargs, error, message):
    save_hf(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path, **kwargs)


@contextlib.contextmanager
def warnings_of(name):
    """What the logger ``name`` and those below it warn of (transformers' does not propagate)."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    yield messages
    logging.getLogger(name).removeHandler(handler)


# name: (embedding and head in the file, one storage expected)
TIED = {
    "head missing": (1.0, None, True),
    "equal": (1.0, 1.0, True),
    "different": (1.0, 2.0, False),
    "embedding missing": (None, 2.0, True),
}


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("load", LOADERS)
def test_tied_heads_are_what_transformers_makes_of_them(tmp_path, name, load):
    embedding, head, one = TIED[name]
    save_hf(tmp_path / "a", tiny(tie_word_embeddings=True))
    original = load_file(tmp_path / "a" / "model.safetensors")[EMBEDDING]
    edit(
        tmp_path / "a",
        {
            EMBEDDING: None if embedding is None else original * embedding,
            HEAD: None if head is None else original * head,
        },
    )
    with warnings_of("transformers") as theirs:
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with warnings_of("transformers") as warned:
        ours = load(tmp_path / "a")
    assert [text for text in warned if "tie" in text] == [text for text in theirs if "tie" in text]
    assert any("will NOT tie" in text for text in warned) is not one
    assert (hf.lm_head.weight is hf.model.embed_tokens.weight) is one
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is one
    assert_same_weights(ours, hf)

    # and so it stays: one storage is written once, two are written both
    ours.save_pretrained(tmp_path / "b")
    assert (HEAD in load_file(tmp_path / "b" / "model.safetensors")) is not one
    again = load(tmp_path / "b")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is one
    assert_same_weights(again, hf)
    assert_same_weights(again, AutoModelForCausalLM.from_pretrained(tmp_path / "b"))


def test_a_head_untied_by_hand_is_written_and_kept_apart(tmp_path):
    save_hf(tmp_path, tiny(tie_word_embeddings=True))
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    model.save_pretrained(tmp_path)
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_both_tied_weights_missing(tmp_path):
    save_hf(tmp_path, tiny(tie_word_embeddings=True))
    edit(tmp_path, {EMBEDDING: None})
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: missing\n  {HEAD}: missing"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_classifier_from_a_causal_lm_gets_a_score_and_says_so(tmp_path):
    save_hf(tmp_path)
    with warnings_of("nemo_automodel") as messages:
        model = NeMoAutoModelForSequenceClassification.from_pretrained(
            tmp_path, architectures=["LlamaForSequenceClassification"], num_labels=3
        )
        assert any("score.weight is not in" in text for text in messages)
    assert model.score.weight.shape == (3, 32)
    assert model.score.weight.std() > 0


class Doubling(CombinedProjectionStateDictAdapter):
    """An adapter that overrides both ways, as one for a family with other names would."""

    def from_hf(self, state, **kwargs):
        return {name: value * 2 for name, value in super().from_hf(state).items()}

    def to_hf(self, state, **kwargs):
        return {name: value / 2 for name, value in super().to_hf(state).items()}


class DoublingForCausalLM(LlamaForCausalLM):
    adapter_class = Doubling


def test_an_adapter_with_its_own_from_hf(tmp_path):
    hf = save_hf(tmp_path)
    edit(tmp_path, {f"{ATTENTION}rotary_emb.inv_freq": torch.zeros(4)})
    ours = DoublingForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours.model.norm.weight, hf.model.norm.weight * 2)
    assert_same_weights(ours, hf)
    for name in ("unexpected key", "missing norm", "missing head", "missing q", "dimensions"):
        save_hf(tmp_path)
        edit(tmp_path, MISFITS[name][0])
        with pytest.raises(CheckpointError, match=rf"(?s)does not fit.*{MISFITS[name][2][0].split(':')[0]}"):
            DoublingForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_peaks_at_the_model_and_its_largest_tensor(tmp_path, dtype):
    config = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=32000, head_dim=64)
    save_hf(tmp_path, config, torch.bfloat16, max_shard_size="40MB")
    LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)  # what the first load of a process brings in stays out
    ctypes.CDLL(None).malloc_trim(0)  # memory that is freed but kept would hide what is taken from it
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert memory("VmHWM") - before <= weights + model.lm_head.weight.nbytes


def memory(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_load_state_dict_takes_huggingface_names(tmp_path):
    hf = save_hf(tmp_path, CONFIGS["MQA with biases"], max_shard_size="5KB")
    state = hf.state_dict()
    whole, shards = LlamaForCausalLM(hf.config), LlamaForCausalLM(hf.config)
    result = whole.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_weights(whole, hf)
    load_sharded_checkpoint(shards, tmp_path, strict=False)  # as transformers' Trainer does
    assert_same_weights(shards, hf)

    fused = whole.model.layers[0].self_attn.qkv_proj.weight
    before = fused.clone()
    for strict, error, change in [
        (True, KeyError, {Q: None}),
        (True, RuntimeError, {"model.norm.weight": None}),
        (True, RuntimeError, {"model.extra": torch.ones(1)}),
        (True, ValueError, {Q: torch.ones(31, 32)}),
        (False, ValueError, {Q: torch.ones(31, 32)}),
        (False, ValueError, {Q: torch.ones(32, 1)}),
        (False, RuntimeError, {"model.norm.weight": torch.ones(31)}),
    ]:
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(error):
            whole.load_state_dict(changed, strict=strict)
    assert torch.equal(fused, before)
    result = whole.load_state_dict({Q: state[Q] * 2, "x": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["x"]
    assert torch.equal(fused[:32], state[Q] * 2)
    assert torch.equal(fused[32:], before[32:])

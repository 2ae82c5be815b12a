"""The auto classes: which class they choose, the options they take and refuse, sequence classification."""

import copy
import json
import logging

import pytest
import torch
import transformers
from transformers import BloomConfig, LlamaConfig, OPTConfig, Qwen2Config, StableLmConfig, T5Config

from nemo_automodel import NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification
from nemo_automodel._transformers import registry
from nemo_automodel.components.checkpoint import CheckpointError
from nemo_automodel.components.models.llama import LlamaForCausalLM
from nemo_automodel.components.models.qwen2 import Qwen2ForCausalLM
from tests.conftest import assert_near, assert_same_gradients, randomize, tiny, tokens

OURS = "nemo_automodel.components.models"


@pytest.fixture
def checkpoint(tmp_path):
    randomize(transformers.LlamaForCausalLM(tiny(pad_token_id=0))).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
@pytest.mark.parametrize("auto", [NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification])
def test_registered_classes_are_built(auto, config_class, caplog):
    model = auto.from_config(tiny(config_class))
    assert type(model).__name__ == config_class.__name__.replace("Config", auto.__name__.removeprefix("NeMoAutoModel"))
    assert type(model).__module__.startswith(OURS)
    assert not caplog.records


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, torch.bfloat16),
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(checkpoint, name, value, expected):
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, **{name: value})
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.dtype == expected
    assert not model.training
    built = NeMoAutoModelForCausalLM.from_config(checkpoint, **{name: value})
    assert {parameter.dtype for parameter in built.parameters()} == {expected}
    assert built.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("value", ["float33", "int64", torch.int8, 32])
def test_dtypes_that_are_none(checkpoint, value):
    for build in (NeMoAutoModelForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_config):
        with pytest.raises(ValueError, match="is not a floating-point dtype"):
            build(checkpoint, dtype=value)


def test_dtype_of_the_tensors_where_the_config_says_nothing(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["dtype"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert NeMoAutoModelForCausalLM.from_pretrained(checkpoint).dtype == torch.bfloat16


def test_loading_equals_transformers_and_generates(checkpoint):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    hf = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    ours = NeMoAutoModelForCausalLM.from_pretrained(str(checkpoint), backend={"rms_norm": "torch_fp32"}, **options)
    assert_near(ours(tokens(2, 9)).logits, hf(tokens(2, 9)).logits)
    assert ours.config._attn_implementation == "eager"
    assert ours.backend.rms_norm == "torch_fp32"
    assert ours.name_or_path == str(checkpoint)
    assert ours.generation_config.to_dict() == hf.generation_config.to_dict()
    changed = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, rms_norm_eps=0.5)
    assert changed.model.norm.eps == changed.config.rms_norm_eps == 0.5


def test_what_is_refused(checkpoint):
    auto = NeMoAutoModelForCausalLM
    for build in (auto.from_pretrained, LlamaForCausalLM.from_pretrained, auto.from_config):
        with pytest.raises(TypeError, match="atn_implementation"):
            build(checkpoint, atn_implementation="sdpa")
    for load in (auto.from_pretrained, LlamaForCausalLM.from_pretrained):
        with pytest.raises(TypeError, match=r"unknown option 'device_map'.*say device="):
            load(checkpoint, config=tiny(), device_map="auto")
    with pytest.raises(TypeError, match="config must be a PreTrainedConfig"):
        auto.from_config({"model_type": "llama"})
    with pytest.raises(ValueError, match=r"backend\.atn"):
        auto.from_pretrained(checkpoint, backend={"atn": "sdpa"})
    with pytest.raises(ValueError, match="no_such_attention"):
        auto.from_pretrained(checkpoint, attn_implementation="no_such_attention")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        auto.from_pretrained(checkpoint, config=tiny(intermediate_size=41))
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        auto.from_pretrained(checkpoint / "nowhere")
    with pytest.raises(ValueError, match="model_type='t5' is not a model ForCausalLM"):
        auto.from_config(T5Config())
    with pytest.raises(TypeError, match="from_pretrained"):
        auto()


SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "stablelm": StableLmConfig(**SMALL, num_key_value_heads=2, intermediate_size=20),
    "opt": OPTConfig(**SMALL, ffn_dim=20, word_embed_proj_dim=16, max_position_embeddings=32),
    "without sdpa": BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_unregistered_architecture_is_transformers_own_and_logged_once(name, tmp_path, caplog):
    hf = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(OTHERS[name])).eval()
    hf.save_pretrained(tmp_path)
    builds = (
        lambda: NeMoAutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="bfloat16"),
        lambda: NeMoAutoModelForCausalLM.from_config(OTHERS[name], dtype="bfloat16"),
    )
    for build in builds:
        caplog.clear()
        with caplog.at_level(logging.INFO, "nemo_automodel"):
            model = build()
        assert type(model) is type(hf)
        assert model.dtype == torch.bfloat16
        (record,) = [record for record in caplog.records if record.name.startswith("nemo_automodel")]
        assert type(hf).__name__ in record.getMessage()
        assert "transformers' own class" in record.getMessage()
    loaded = NeMoAutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    assert_near(loaded(tokens(1, 6)).logits, hf(tokens(1, 6)).logits)
    with pytest.raises(TypeError, match="no_such_option"):
        NeMoAutoModelForCausalLM.from_pretrained(tmp_path, no_such_option=1)


def test_the_architecture_named_in_the_config_decides(checkpoint, monkeypatch):
    class Special(LlamaForCausalLM):
        pass

    monkeypatch.setattr(registry, "MODEL_ARCH_MAPPING", registry.MODEL_ARCH_MAPPING.copy())
    monkeypatch.setattr(registry, "_registered_classes", {})
    registry.register("SpecialForCausalLM", Special)
    assert type(NeMoAutoModelForCausalLM.from_config(tiny(architectures=["SpecialForCausalLM"]))) is Special
    assert type(NeMoAutoModelForCausalLM.from_config(tiny(architectures=["LlamaModel"]))) is LlamaForCausalLM
    assert type(NeMoAutoModelForCausalLM.from_config(tiny(Qwen2Config))) is Qwen2ForCausalLM


def test_remote_code_is_not_run_unasked(checkpoint):
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (checkpoint / "evil.py").write_text(f"open({str(checkpoint / 'ran')!r}, 'w')\n")
    for build in (NeMoAutoModelForCausalLM.from_pretrained, NeMoAutoModelForCausalLM.from_config):
        with pytest.raises(ValueError, match="trust_remote_code"):
            build(checkpoint)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize(("num_labels", "problem"), [(3, "single_label"), (1, "regression"), (4, "multi_label")])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
def test_sequence_classification_equals_transformers(config_class, num_labels, problem, tmp_path):
    config = tiny(config_class, num_labels=num_labels, pad_token_id=0)
    hf = randomize(transformers.AutoModelForSequenceClassification.from_config(config)).eval()
    hf.save_pretrained(tmp_path)
    ours = NeMoAutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = tokens(4, 11)
    for side in ("right", "left"):
        mask = torch.ones_like(ids)
        for row in range(4):
            mask[row, slice(11 - 2 * row, None) if side == "right" else slice(2 * row)] = 0
        labels = {
            "single_label": torch.tensor([0, 2, 1, 0]),
            "regression": torch.randn(4),
            "multi_label": torch.randint(0, 2, (4, num_labels)).float(),
        }[problem]
        outputs = [m(input_ids=ids * mask, attention_mask=mask, labels=labels) for m in (hf, ours)]
        for key in ("logits", "loss"):
            assert_near(outputs[1][key], outputs[0][key], what=key)
        for model, output in zip((hf, ours), outputs, strict=True):
            model.zero_grad()
            output.loss.backward()
        assert_same_gradients(ours, hf)
    ours.save_pretrained(tmp_path / "again")
    again = type(hf).from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), hf.state_dict().values(), strict=True))


def test_a_causal_lm_gets_a_score_and_says_so(checkpoint, caplog):
    with caplog.at_level(logging.WARNING, "nemo_automodel"):
        model = NeMoAutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=5, dtype="float32")
    (record,) = caplog.records
    assert "score.weight is not in" in record.getMessage()
    score = model.score.weight
    assert score.shape == (5, 32)
    assert 0.01 < score.std() < 0.03, "drawn as the config's initializer_range says, not what memory held"
    causal = NeMoAutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    hidden = [m.model(tokens(2, 7)).last_hidden_state for m in (model, causal)]
    assert torch.equal(*hidden)
    logits = model(tokens(2, 7)).logits
    assert_near(logits, hidden[0][:, -1] @ score.T)

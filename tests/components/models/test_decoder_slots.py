"""Other families fill the common decoder's slots in about ten lines, with no branch in it, and equal transformers."""

from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import ArceeConfig, GraniteConfig, MistralConfig, Olmo2Config, Qwen3Config

from nemo_automodel.components.models.common import CombinedProjectionStateDictAdapter
from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import DecoderForCausalLM
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from tests.conftest import assert_near, assert_same_step, randomize, tiny, tokens


class Family(DecoderForCausalLM):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    slots: ClassVar[Any] = staticmethod(lambda config: {})

    @classmethod
    def decoder_spec(cls, config):
        layers = ("full_attention",) * config.num_hidden_layers
        bias = getattr(config, "attention_bias", False)
        plain = {"norm_eps": config.rms_norm_eps, "layer_types": layers, "qkv_bias": bias, "o_bias": bias}
        return DecoderSpec(**plain | cls.slots(config))


class Qwen3ForCausalLM(Family):
    config_class = Qwen3Config

    @staticmethod
    def slots(config):
        window = {"layer_types": tuple(config.layer_types), "sliding_window": config.sliding_window}
        return {"qk_norm": "head", **window}


class MistralForCausalLM(Family):
    config_class = MistralConfig

    @staticmethod
    def slots(config):
        kind = "sliding_attention" if config.sliding_window else "full_attention"
        return {"layer_types": (kind,) * config.num_hidden_layers, "sliding_window": config.sliding_window}


class GraniteForCausalLM(Family):
    config_class = GraniteConfig

    @staticmethod
    def slots(config):
        return {
            "attention_scale": config.attention_multiplier,
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_multiplier": 1 / config.logits_scaling,
        }


class Olmo2ForCausalLM(Family):
    config_class = Olmo2Config

    @staticmethod
    def slots(config):
        after = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
        return {"qk_norm": "full", "norms": NormSlots(before_attention=None, before_mlp=None, **after)}


class ArceeStateDictAdapter(CombinedProjectionStateDictAdapter):
    fuses_gate_up = False


class ArceeForCausalLM(Family):
    config_class = ArceeConfig
    adapter_class = ArceeStateDictAdapter

    @staticmethod
    def slots(config):
        return {"mlp": PlainMLP}


MULTIPLIERS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
MULTIPLIERS |= {"logits_scaling": 5.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CASES = {
    "qwen3": (Qwen3ForCausalLM, {"head_dim": 10}),
    "qwen3 sliding, biases": (
        Qwen3ForCausalLM,
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
            "attention_bias": True,
            "head_dim": 8,
        },
    ),
    "mistral": (MistralForCausalLM, {"sliding_window": None}),
    "mistral sliding": (MistralForCausalLM, {"sliding_window": 4}),
    "granite": (GraniteForCausalLM, {"attention_bias": True, "mlp_bias": True, **MULTIPLIERS}),
    "granite, tied": (GraniteForCausalLM, {"tie_word_embeddings": True, **MULTIPLIERS}),
    "olmo2": (Olmo2ForCausalLM, {}),
    "olmo2, biases": (Olmo2ForCausalLM, {"attention_bias": True}),
    "arcee": (ArceeForCausalLM, {}),
    "arcee, biases": (ArceeForCausalLM, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 33}),
}


def build(name: str, attn: str = "sdpa"):
    own_class, changes = CASES[name]
    config = tiny(own_class.config_class, attn, **changes)
    hf = randomize(getattr(transformers, own_class.__name__)(config)).eval()
    ours = own_class(config).eval()
    ours.load_state_dict(hf.state_dict())
    return hf, ours


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_parity(name, attn):
    hf, ours = build(name, attn)
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    assert_same_step(hf, ours, input_ids=ids, labels=ids)
    labels = ids.masked_fill(mask == 0, -100)
    assert_same_step(hf, ours, mask, input_ids=ids, attention_mask=mask, labels=labels)


@pytest.mark.parametrize("name", CASES)
def test_generation_saving_and_loading(name, tmp_path):
    hf, ours = build(name)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(tokens(2, 6), **options), hf.generate(tokens(2, 6), **options))
    ours.save_pretrained(tmp_path)
    ids = tokens(1, 8)
    for model_class in (type(hf), type(ours)):
        assert_near(model_class.from_pretrained(tmp_path)(ids).logits, hf(ids).logits)


def test_specs_that_contradict_themselves():
    with pytest.raises(ValueError, match="layer_types contains 'chunked_attention'"):
        DecoderSpec(norm_eps=1e-6, layer_types=("chunked_attention",))
    with pytest.raises(ValueError, match="sliding_window=None"):
        DecoderSpec(norm_eps=1e-6, layer_types=("sliding_attention",))
    with pytest.raises(TypeError, match="decoder_spec"):
        DecoderForCausalLM(tiny())

"""Cohere (Command R and R+, Aya 23, Aya Expanse) on fused projections.

Attention and MLP read one layer norm side by side; a norm of its own for every query and key head where `use_qk_norm`
is set; RoPE of neighbouring channels in fp32; a factor on the logits.
"""

from transformers import CohereConfig

from nemo_automodel.components.models.cohere.state_dict_adapter import CohereStateDictAdapter
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots


class CoherePreTrainedModel(DecoderPreTrainedModel):
    """What every head shares."""

    config_class = CohereConfig
    adapter_class = CohereStateDictAdapter

    @staticmethod
    def decoder_spec(config: CohereConfig) -> DecoderSpec:
        # typed as optional, but nothing computes with None
        assert config.layer_norm_eps is not None
        assert config.logit_scale is not None
        return DecoderSpec(
            norm_eps=config.layer_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(kind="layer", fp32=True),
            norms=NormSlots(before_mlp="input_layernorm"),
            parallel=True,
            qk_norm="per_head" if config.use_qk_norm else None,
            rope=RopeSpec(fp32_rotation=True),
            logits_multiplier=config.logit_scale,
        )


class CohereForCausalLM(DecoderForCausalLM, CoherePreTrainedModel):
    """Cohere with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = CohereForCausalLM

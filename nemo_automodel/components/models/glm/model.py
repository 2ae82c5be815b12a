"""GLM (glm-4-9b) on fused projections.

RoPE of neighbouring channels, half of a head's by default; biases on query, key and value, none on the
attention's output.
"""

from transformers import GlmConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.glm.state_dict_adapter import GlmStateDictAdapter


class GlmPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = GlmConfig
    adapter_class = GlmStateDictAdapter

    @staticmethod
    def decoder_spec(config: GlmConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            rope=RopeSpec(share=rope_field(config, "partial_rotary_factor", 1.0)),
        )


class GlmForCausalLM(DecoderForCausalLM, GlmPreTrainedModel):
    """GLM with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class GlmForSequenceClassification(DecoderForSequenceClassification, GlmPreTrainedModel):
    """GLM with a score on the last token."""


ModelClass = GlmForCausalLM

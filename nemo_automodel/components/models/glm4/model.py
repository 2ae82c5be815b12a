"""GLM 4 (GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1) on fused projections.

RoPE of neighbouring channels, half of a head's by default; biases on query, key and value, none on the
attention's output; norms before and after both branches.
"""

from transformers import Glm4Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.glm4.state_dict_adapter import Glm4StateDictAdapter


class Glm4PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Glm4Config
    adapter_class = Glm4StateDictAdapter

    @staticmethod
    def decoder_spec(config: Glm4Config) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            norms=NormSlots(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
            rope=RopeSpec(share=rope_field(config, "partial_rotary_factor", 1.0)),
        )


class Glm4ForCausalLM(DecoderForCausalLM, Glm4PreTrainedModel):
    """GLM 4 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Glm4ForSequenceClassification(DecoderForSequenceClassification, Glm4PreTrainedModel):
    """GLM 4 with a score on the last token."""


ModelClass = Glm4ForCausalLM

"""OLMo 2 on fused projections: norms after the branches only, and of all queries and all keys at once."""

from transformers import Olmo2Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.olmo2.state_dict_adapter import Olmo2StateDictAdapter


class Olmo2PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Olmo2Config
    adapter_class = Olmo2StateDictAdapter

    @staticmethod
    def decoder_spec(config: Olmo2Config) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(fp32=True),
            norms=NormSlots(
                before_attention=None,
                after_attention="post_attention_layernorm",
                before_mlp=None,
                after_mlp="post_feedforward_layernorm",
            ),
            qk_norm="full",
            rope=RopeSpec(fp32_tables=True),
        )


class Olmo2ForCausalLM(DecoderForCausalLM, Olmo2PreTrainedModel):
    """Olmo2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Olmo2ForSequenceClassification(DecoderForSequenceClassification, Olmo2PreTrainedModel):
    """Olmo2 with a score on the last token."""


ModelClass = Olmo2ForCausalLM

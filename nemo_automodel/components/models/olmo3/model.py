"""OLMo 3 on fused projections: OLMo 2 with windows by `layer_types` and RoPE of its own for each layer type."""

from transformers import Olmo3Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.olmo3.state_dict_adapter import Olmo3StateDictAdapter


class Olmo3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Olmo3Config
    adapter_class = Olmo3StateDictAdapter

    @staticmethod
    def decoder_spec(config: Olmo3Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
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


class Olmo3ForCausalLM(DecoderForCausalLM, Olmo3PreTrainedModel):
    """Olmo3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Olmo3ForSequenceClassification(DecoderForSequenceClassification, Olmo3PreTrainedModel):
    """Olmo3 with a score on the last token."""


ModelClass = Olmo3ForCausalLM

"""Qwen3 on fused projections: sliding-window layers by `layer_types`; RMSNorm on every query and key head."""

from transformers import Qwen3Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter


class Qwen3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Qwen3Config
    adapter_class = Qwen3StateDictAdapter

    @staticmethod
    def decoder_spec(config: Qwen3Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            qk_norm="head",
        )


class Qwen3ForCausalLM(DecoderForCausalLM, Qwen3PreTrainedModel):
    """Qwen3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Qwen3ForSequenceClassification(DecoderForSequenceClassification, Qwen3PreTrainedModel):
    """Qwen3 with a score on the last token."""


ModelClass = Qwen3ForCausalLM

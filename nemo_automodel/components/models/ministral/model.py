"""Ministral (the 8B of 2024) on fused projections: sliding-window layers by `layer_types`, no biases."""

from transformers import MinistralConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.ministral.state_dict_adapter import MinistralStateDictAdapter


class MinistralPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = MinistralConfig
    adapter_class = MinistralStateDictAdapter

    @staticmethod
    def decoder_spec(config: MinistralConfig) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
        )


class MinistralForCausalLM(DecoderForCausalLM, MinistralPreTrainedModel):
    """Ministral with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class MinistralForSequenceClassification(DecoderForSequenceClassification, MinistralPreTrainedModel):
    """Ministral with a score on the last token."""


ModelClass = MinistralForCausalLM

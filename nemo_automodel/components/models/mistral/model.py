"""Mistral on fused projections.

A sliding window on every layer where `sliding_window` is set; no bias on query, key and value; no bias on the
attention's output.
"""

from transformers import MistralConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.mistral.state_dict_adapter import MistralStateDictAdapter


class MistralPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = MistralConfig
    adapter_class = MistralStateDictAdapter

    @staticmethod
    def decoder_spec(config: MistralConfig) -> DecoderSpec:
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=(kind,) * config.num_hidden_layers,
            sliding_window=config.sliding_window,
        )


class MistralForCausalLM(DecoderForCausalLM, MistralPreTrainedModel):
    """Mistral with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class MistralForSequenceClassification(DecoderForSequenceClassification, MistralPreTrainedModel):
    """Mistral with a score on the last token."""


ModelClass = MistralForCausalLM

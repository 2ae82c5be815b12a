"""Qwen2 (Qwen 1.5, 2, 2.5, QwQ, the R1 distillations): biases on query, key and value; sliding-window layers."""

from transformers import Qwen2Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.qwen2.state_dict_adapter import Qwen2StateDictAdapter


class Qwen2PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Qwen2Config
    adapter_class = Qwen2StateDictAdapter

    @staticmethod
    def decoder_spec(config: Qwen2Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            qkv_bias=True,
        )


class Qwen2ForCausalLM(DecoderForCausalLM, Qwen2PreTrainedModel):
    """Qwen2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Qwen2ForSequenceClassification(DecoderForSequenceClassification, Qwen2PreTrainedModel):
    """Qwen2 with a score on the last token."""


ModelClass = Qwen2ForCausalLM

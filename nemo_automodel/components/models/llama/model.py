"""Llama (and what is stored as Llama: SmolLM, Yi, TinyLlama, ...) on fused projections."""

from transformers import LlamaConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.llama.state_dict_adapter import LlamaStateDictAdapter


class LlamaPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = LlamaConfig
    adapter_class = LlamaStateDictAdapter

    @staticmethod
    def decoder_spec(config: LlamaConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
        )


class LlamaForCausalLM(DecoderForCausalLM, LlamaPreTrainedModel):
    """Llama with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class LlamaForSequenceClassification(DecoderForSequenceClassification, LlamaPreTrainedModel):
    """Llama with a score on the last token."""


ModelClass = LlamaForCausalLM

"""Gemma on fused projections: norms that multiply by one plus the weight, embeddings times the root of their width."""

from transformers import GemmaConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.gemma.state_dict_adapter import GemmaStateDictAdapter


class GemmaPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = GemmaConfig
    adapter_class = GemmaStateDictAdapter

    @staticmethod
    def decoder_spec(config: GemmaConfig) -> DecoderSpec:
        if config.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention=True: attention here is causal")
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(offset=1.0, fp32=True, initial=0.0),
            embedding_multiplier=config.hidden_size**0.5,
            embedding_multiplier_rounded=True,
        )


class GemmaForCausalLM(DecoderForCausalLM, GemmaPreTrainedModel):
    """Gemma with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class GemmaForSequenceClassification(DecoderForSequenceClassification, GemmaPreTrainedModel):
    """Gemma with a score on the last token."""


ModelClass = GemmaForCausalLM

"""Seed-OSS on fused projections.

Biases on query, key and value, and on the attention's output, each by its own field; dropout on what attention and MLP
add to the residual stream.
"""

from transformers import SeedOssConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.seed_oss.state_dict_adapter import SeedOssStateDictAdapter


class SeedOssPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = SeedOssConfig
    adapter_class = SeedOssStateDictAdapter

    @staticmethod
    def decoder_spec(config: SeedOssConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_out_bias,
            residual_dropout=config.residual_dropout,
        )


class SeedOssForCausalLM(DecoderForCausalLM, SeedOssPreTrainedModel):
    """Seed-OSS with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class SeedOssForSequenceClassification(DecoderForSequenceClassification, SeedOssPreTrainedModel):
    """Seed-OSS with a score on the last token."""


ModelClass = SeedOssForCausalLM

"""Granite 3 on fused projections: factors on embeddings, scores, branches and logits."""

from transformers import GraniteConfig

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.granite.state_dict_adapter import GraniteStateDictAdapter


class GranitePreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = GraniteConfig
    adapter_class = GraniteStateDictAdapter

    @staticmethod
    def decoder_spec(config: GraniteConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            attention_scale=config.attention_multiplier,
            embedding_multiplier=config.embedding_multiplier,
            residual_multiplier=config.residual_multiplier,
            logits_multiplier=1 / config.logits_scaling,
        )


class GraniteForCausalLM(DecoderForCausalLM, GranitePreTrainedModel):
    """Granite with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = GraniteForCausalLM

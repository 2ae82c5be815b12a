"""Arcee on fused projections: an MLP without a gate, `down_proj(relu2(up_proj(x)))`."""

from transformers import ArceeConfig

from nemo_automodel.components.models.arcee.state_dict_adapter import ArceeStateDictAdapter
from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.spec import DecoderSpec


class ArceePreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = ArceeConfig
    adapter_class = ArceeStateDictAdapter

    @staticmethod
    def decoder_spec(config: ArceeConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            mlp=PlainMLP,
        )


class ArceeForCausalLM(DecoderForCausalLM, ArceePreTrainedModel):
    """Arcee with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class ArceeForSequenceClassification(DecoderForSequenceClassification, ArceePreTrainedModel):
    """Arcee with a score on the last token."""


ModelClass = ArceeForCausalLM

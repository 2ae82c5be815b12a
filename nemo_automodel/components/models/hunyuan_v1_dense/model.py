"""Hunyuan (dense, version 1) on fused projections: RMSNorm on heads after RoPE, whose base `alpha` raises."""

from transformers import HunYuanDenseV1Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.hunyuan_v1_dense.rope_utils import ntk_alpha_inverse_frequencies
from nemo_automodel.components.models.hunyuan_v1_dense.state_dict_adapter import HunYuanDenseV1StateDictAdapter


class HunYuanDenseV1PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = HunYuanDenseV1Config
    adapter_class = HunYuanDenseV1StateDictAdapter

    @staticmethod
    def decoder_spec(config: HunYuanDenseV1Config) -> DecoderSpec:
        stretched = rope_field(config, "rope_type") == "dynamic" and rope_field(config, "alpha")
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            qk_norm="head",
            qk_norm_after_rope=True,
            rope=RopeSpec(frequencies=ntk_alpha_inverse_frequencies if stretched else None),
        )


class HunYuanDenseV1ForCausalLM(DecoderForCausalLM, HunYuanDenseV1PreTrainedModel):
    """Hunyuan with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class HunYuanDenseV1ForSequenceClassification(DecoderForSequenceClassification, HunYuanDenseV1PreTrainedModel):
    """Hunyuan with a score on the last token."""


ModelClass = HunYuanDenseV1ForCausalLM

"""Nemotron (Nemotron-4, Minitron) on fused projections.

Layer norms with a bias, whose stored weight is the difference from one; RoPE on a part of each head; an MLP without a
gate.
"""

from transformers import NemotronConfig

from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.nemotron.state_dict_adapter import NemotronStateDictAdapter


class NemotronPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = NemotronConfig
    adapter_class = NemotronStateDictAdapter

    @staticmethod
    def decoder_spec(config: NemotronConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(kind="layer", bias=True, offset=1.0),
            rope=RopeSpec(share=rope_field(config, "partial_rotary_factor")),
            mlp=PlainMLP,
        )


class NemotronForCausalLM(DecoderForCausalLM, NemotronPreTrainedModel):
    """Nemotron with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class NemotronForSequenceClassification(DecoderForSequenceClassification, NemotronPreTrainedModel):
    """Nemotron with a score on the last token."""


ModelClass = NemotronForCausalLM

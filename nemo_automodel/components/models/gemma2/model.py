"""Gemma 2 on fused projections: Gemma with norms around both branches, windows by `layer_types` and softcaps."""

from functools import partial

from transformers import Gemma2Config

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.gemma2.state_dict_adapter import Gemma2StateDictAdapter


class Gemma2PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Gemma2Config
    adapter_class = Gemma2StateDictAdapter
    _supports_sdpa = False  # it has no softcap

    @staticmethod
    def decoder_spec(config: Gemma2Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        if config.use_bidirectional_attention:
            raise ValueError("use_bidirectional_attention=True: attention here is causal")
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(offset=1.0, fp32=True, initial=0.0),
            norms=NormSlots(
                after_attention="post_attention_layernorm",
                before_mlp="pre_feedforward_layernorm",
                after_mlp="post_feedforward_layernorm",
            ),
            attention_softcap=config.attn_logit_softcapping,
            attention_scale=config.query_pre_attn_scalar**-0.5,
            mlp=partial(CombinedGateUpMLP, activation=config.hidden_activation),
            embedding_multiplier=config.hidden_size**0.5,
            embedding_multiplier_rounded=True,
            logits_softcap=config.final_logit_softcapping,
        )


class Gemma2ForCausalLM(DecoderForCausalLM, Gemma2PreTrainedModel):
    """Gemma2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Gemma2ForSequenceClassification(DecoderForSequenceClassification, Gemma2PreTrainedModel):
    """Gemma2 with a score on the last token."""


ModelClass = Gemma2ForCausalLM

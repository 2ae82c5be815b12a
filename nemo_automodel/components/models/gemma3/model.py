"""Gemma 3 (text) on fused projections: Gemma 2 with norms of query and key heads, and RoPE for each layer type."""

from functools import partial

from transformers import Gemma3TextConfig

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.gemma3.state_dict_adapter import Gemma3StateDictAdapter


class Gemma3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Gemma3TextConfig
    adapter_class = Gemma3StateDictAdapter

    @staticmethod
    def decoder_spec(config: Gemma3TextConfig) -> DecoderSpec:
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
            qk_norm="head",
            attention_scale=config.query_pre_attn_scalar**-0.5,
            mlp=partial(CombinedGateUpMLP, activation=config.hidden_activation),
            embedding_multiplier=config.hidden_size**0.5,
            embedding_multiplier_rounded=True,
            logits_softcap=config.final_logit_softcapping,
        )


class Gemma3ForCausalLM(DecoderForCausalLM, Gemma3PreTrainedModel):
    """Gemma3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Gemma3TextForSequenceClassification(DecoderForSequenceClassification, Gemma3PreTrainedModel):
    """Gemma3 with a score on the last token."""


ModelClass = Gemma3ForCausalLM

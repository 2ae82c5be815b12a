"""Apertus on fused projections: RMSNorm on every query and key head; an MLP without a gate, and xIELU, which learns."""

from transformers import ApertusConfig

from nemo_automodel.components.models.apertus.state_dict_adapter import ApertusStateDictAdapter
from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import DecoderForCausalLM, DecoderPreTrainedModel
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots

NORMS = NormSlots(before_attention="attention_layernorm", before_mlp="feedforward_layernorm")


class ApertusPreTrainedModel(DecoderPreTrainedModel):
    """What its heads share."""

    config_class = ApertusConfig
    adapter_class = ApertusStateDictAdapter

    @staticmethod
    def decoder_spec(config: ApertusConfig) -> DecoderSpec:
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norms=NORMS,
            qk_norm="head",
            mlp=PlainMLP,
        )


class ApertusForCausalLM(DecoderForCausalLM, ApertusPreTrainedModel):
    """Apertus with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = ApertusForCausalLM

"""Cohere 2 (Command R7B, Command A) on fused projections.

Attention and MLP read one layer norm side by side; sliding-window layers by `layer_types`, of which alone queries and
keys turn, neighbouring channels together and in fp32; a factor on the logits.
"""

from transformers import Cohere2Config

from nemo_automodel.components.models.cohere2.state_dict_adapter import Cohere2StateDictAdapter
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots


class Cohere2PreTrainedModel(DecoderPreTrainedModel):
    """What every head shares."""

    config_class = Cohere2Config
    adapter_class = Cohere2StateDictAdapter

    @staticmethod
    def decoder_spec(config: Cohere2Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        return DecoderSpec(
            norm_eps=config.layer_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(kind="layer", fp32=True),
            norms=NormSlots(before_mlp="input_layernorm"),
            parallel=True,
            rope=RopeSpec(layers=tuple(kind == "sliding_attention" for kind in config.layer_types), fp32_rotation=True),
            logits_multiplier=config.logit_scale,
        )


class Cohere2ForCausalLM(DecoderForCausalLM, Cohere2PreTrainedModel):
    """Cohere 2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = Cohere2ForCausalLM

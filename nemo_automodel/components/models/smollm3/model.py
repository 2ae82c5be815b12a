"""SmolLM3 on fused projections: every fourth layer has no RoPE, by `no_rope_layers`; windows by `layer_types`."""

from transformers import SmolLM3Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.smollm3.state_dict_adapter import SmolLM3StateDictAdapter


class SmolLM3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = SmolLM3Config
    adapter_class = SmolLM3StateDictAdapter

    @staticmethod
    def decoder_spec(config: SmolLM3Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills both in
        assert config.no_rope_layers is not None
        turns = tuple(bool(turned) for turned in config.no_rope_layers[: config.num_hidden_layers])
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            rope=RopeSpec(layers=turns),
        )


class SmolLM3ForCausalLM(DecoderForCausalLM, SmolLM3PreTrainedModel):
    """SmolLM3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class SmolLM3ForSequenceClassification(DecoderForSequenceClassification, SmolLM3PreTrainedModel):
    """SmolLM3 with a score on the last token."""


ModelClass = SmolLM3ForCausalLM

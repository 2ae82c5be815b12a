"""EXAONE 4 on fused projections.

Norms come after attention and MLP, and on every query and key head. Where `sliding_window` is set, only the sliding
layers turn queries and keys; the full ones have no position embedding.
"""

from transformers import Exaone4Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec, NormSlots
from nemo_automodel.components.models.exaone4.state_dict_adapter import Exaone4StateDictAdapter

NORMS = NormSlots(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


class Exaone4PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Exaone4Config
    adapter_class = Exaone4StateDictAdapter

    @staticmethod
    def decoder_spec(config: Exaone4Config) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        turns = tuple(config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types)
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            sliding_window=config.sliding_window,
            norms=NORMS,
            qk_norm="head",
            rope=RopeSpec(layers=turns),
        )


class Exaone4ForCausalLM(DecoderForCausalLM, Exaone4PreTrainedModel):
    """EXAONE 4 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Exaone4ForSequenceClassification(DecoderForSequenceClassification, Exaone4PreTrainedModel):
    """EXAONE 4 with a score on the last token."""


ModelClass = Exaone4ForCausalLM

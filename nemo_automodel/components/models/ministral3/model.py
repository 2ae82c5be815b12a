"""Ministral 3 on fused projections: YaRN, queries that grow with their positions; a window on all layers if set."""

from transformers import Ministral3Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.ministral3.state_dict_adapter import Ministral3StateDictAdapter


class Ministral3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Ministral3Config
    adapter_class = Ministral3StateDictAdapter

    @staticmethod
    def decoder_spec(config: Ministral3Config) -> DecoderSpec:
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=(kind,) * config.num_hidden_layers,
            sliding_window=config.sliding_window,
            rope=RopeSpec(query_growth=query_growth_of(config)),
        )


class Ministral3ForCausalLM(DecoderForCausalLM, Ministral3PreTrainedModel):
    """Ministral 3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Ministral3ForSequenceClassification(DecoderForSequenceClassification, Ministral3PreTrainedModel):
    """Ministral 3 with a score on the last token."""


def query_growth_of(config: Ministral3Config) -> tuple[float, int]:
    """How much queries grow, and every how many positions.

    Raises:
        ValueError: ``rope_parameters`` do not say.
    """
    fields = ("llama_4_scaling_beta", "original_max_position_embeddings")
    beta, length = (rope_field(config, field) for field in fields)
    if beta is None or not length:
        raise ValueError(f"rope_parameters has {fields[0]}={beta}, {fields[1]}={length}: Ministral 3 needs both")
    return beta, length


ModelClass = Ministral3ForCausalLM

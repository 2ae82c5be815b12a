"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini on fused projections.

A sliding window on every layer where `sliding_window` is set; RoPE of some channels of a head only where
`partial_rotary_factor` says so; longrope; dropout of both branches.
"""

from typing import Any

from transformers import Cache, Phi3Config

from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.phi3.state_dict_adapter import Phi3StateDictAdapter


class Phi3PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Phi3Config
    adapter_class = Phi3StateDictAdapter

    @staticmethod
    def decoder_spec(config: Phi3Config) -> DecoderSpec:
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=(kind,) * config.num_hidden_layers,
            sliding_window=config.sliding_window,
            rope=RopeSpec(share=rope_field(config, "partial_rotary_factor")),
            residual_dropout=config.resid_pdrop,
        )


class Phi3ForCausalLM(DecoderForCausalLM, Phi3PreTrainedModel):
    """Phi-3 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def prepare_inputs_for_generation(
        self, input_ids: Any, past_key_values: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As usual, but past its original length longrope turns by other frequencies: cached keys are made again."""
        length = self.config.original_max_position_embeddings
        if past_key_values is not None and past_key_values.get_seq_length() <= length < input_ids.shape[1]:
            past_key_values, kwargs["next_sequence_length"] = None, None
        return super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)


class Phi3ForSequenceClassification(DecoderForSequenceClassification, Phi3PreTrainedModel):
    """Phi-3 with a score on the last token."""


ModelClass = Phi3ForCausalLM

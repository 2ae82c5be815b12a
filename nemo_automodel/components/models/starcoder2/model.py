"""StarCoder2 on fused projections.

Layer norms; an MLP without a gate; `use_bias` for every projection; a sliding window on every layer where
`sliding_window` is set; dropout of embeddings and branches.
"""

from functools import partial

from transformers import Starcoder2Config

from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.starcoder2.state_dict_adapter import Starcoder2StateDictAdapter


class Starcoder2PreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = Starcoder2Config
    adapter_class = Starcoder2StateDictAdapter

    @staticmethod
    def decoder_spec(config: Starcoder2Config) -> DecoderSpec:
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        return DecoderSpec(
            norm_eps=config.norm_epsilon,
            layer_types=(kind,) * config.num_hidden_layers,
            sliding_window=config.sliding_window,
            qkv_bias=config.use_bias,
            o_bias=config.use_bias,
            norm=NormSpec(kind="layer", bias=True),
            mlp=partial(PlainMLP, bias=config.use_bias),
            embedding_dropout=config.embedding_dropout,
            residual_dropout=config.residual_dropout,
        )


class Starcoder2ForCausalLM(DecoderForCausalLM, Starcoder2PreTrainedModel):
    """StarCoder2 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


class Starcoder2ForSequenceClassification(DecoderForSequenceClassification, Starcoder2PreTrainedModel):
    """StarCoder2 with a score on the last token."""


ModelClass = Starcoder2ForCausalLM

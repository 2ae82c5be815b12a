"""ERNIE 4.5 (dense: ERNIE-4.5-0.3B) on fused projections.

RoPE of neighbouring channels in fp32; `use_bias` for every projection; attention weights are never dropped.
"""

from functools import partial

from transformers import Ernie4_5Config

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.ernie4_5.state_dict_adapter import Ernie4_5StateDictAdapter


class Ernie4_5PreTrainedModel(DecoderPreTrainedModel):
    """What every head shares."""

    config_class = Ernie4_5Config
    adapter_class = Ernie4_5StateDictAdapter

    @staticmethod
    def decoder_spec(config: Ernie4_5Config) -> DecoderSpec:
        bias = bool(config.use_bias)
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=bias,
            o_bias=bias,
            attention_dropout=0.0,
            rope=RopeSpec(fp32_tables=True),
            mlp=partial(CombinedGateUpMLP, bias=bias),
        )


class Ernie4_5ForCausalLM(DecoderForCausalLM, Ernie4_5PreTrainedModel):
    """ERNIE 4.5 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = Ernie4_5ForCausalLM

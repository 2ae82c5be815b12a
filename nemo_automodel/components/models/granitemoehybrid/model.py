"""Granite 4, where it is dense (micro, 1B, 350M): the factors of Granite 3, RoPE by `position_embedding_type`.

transformers' class has state-space layers and experts as well, which are refused here.
"""

from functools import partial

from transformers import GraniteMoeHybridConfig

from nemo_automodel.components.models.common.combined_projection.combined_mlp import CombinedGateUpMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.rope import RopeSpec
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.granitemoehybrid.state_dict_adapter import GraniteMoeHybridStateDictAdapter

ONLY_DENSE = "only dense models, of attention layers, are implemented; transformers' own class runs the others"


class GraniteMoeHybridPreTrainedModel(DecoderPreTrainedModel):
    """What every head shares."""

    config_class = GraniteMoeHybridConfig
    adapter_class = GraniteMoeHybridStateDictAdapter

    @staticmethod
    def decoder_spec(config: GraniteMoeHybridConfig) -> DecoderSpec:
        assert config.layer_types is not None  # the config fills it in
        # typed as optional, but nothing computes with None
        assert config.embedding_multiplier is not None
        assert config.residual_multiplier is not None
        assert config.logits_scaling is not None
        if config.num_local_experts:
            raise ValueError(f"num_local_experts={config.num_local_experts}: {ONLY_DENSE}")
        if others := sorted(set(config.layer_types) - {"full_attention"}):
            raise ValueError(f"layer_types contains {others[0]!r}: {ONLY_DENSE}")
        if config.output_router_logits:
            raise ValueError("output_router_logits=True: a dense model has no router; set it to False")
        return DecoderSpec(
            norm_eps=config.rms_norm_eps,
            layer_types=tuple(config.layer_types),
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            attention_scale=config.attention_multiplier,
            rope=RopeSpec(layers=(config.position_embedding_type == "rope",) * config.num_hidden_layers),
            mlp=partial(CombinedGateUpMLP, intermediate_size=config.shared_intermediate_size),
            embedding_multiplier=config.embedding_multiplier,
            residual_multiplier=config.residual_multiplier,
            logits_multiplier=1 / config.logits_scaling,
        )


class GraniteMoeHybridForCausalLM(DecoderForCausalLM, GraniteMoeHybridPreTrainedModel):
    """Granite 4 with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012


ModelClass = GraniteMoeHybridForCausalLM

"""GPT-NeoX (GPT-NeoX-20B, Pythia) on fused projections.

Layer norms; attention and MLP side by side where `use_parallel_residual` says so; an MLP without a gate; RoPE of some
channels of a head; dropout of embeddings and branches.
"""

from functools import partial

from transformers import GPTNeoXConfig

from nemo_automodel.components.models.common.combined_projection.combined_mlp import PlainMLP
from nemo_automodel.components.models.common.decoder import (
    DecoderForCausalLM,
    DecoderForSequenceClassification,
    DecoderPreTrainedModel,
)
from nemo_automodel.components.models.common.norm import NormSpec
from nemo_automodel.components.models.common.rope import RopeSpec, rope_field
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.gpt_neox.state_dict_adapter import GPTNeoXStateDictAdapter

CAUSAL_MASKS = [r"\.attention\.(masked_)?bias$"]  # which the checkpoints of Pythia hold


class GPTNeoXPreTrainedModel(DecoderPreTrainedModel):
    """What both heads share."""

    config_class = GPTNeoXConfig
    adapter_class = GPTNeoXStateDictAdapter

    @staticmethod
    def decoder_spec(config: GPTNeoXConfig) -> DecoderSpec:
        heads = config.num_attention_heads
        for field, implied in (("num_key_value_heads", heads), ("head_dim", config.hidden_size // heads)):
            if (value := getattr(config, field, None)) not in (None, implied):
                raise ValueError(f"{field}={value}: GPT-NeoX has {implied} and reads no such field; leave it out")
        return DecoderSpec(
            norm_eps=config.layer_norm_eps,
            layer_types=("full_attention",) * config.num_hidden_layers,
            qkv_bias=config.attention_bias,
            o_bias=config.attention_bias,
            norm=NormSpec(kind="layer", bias=True),
            parallel=config.use_parallel_residual,
            rope=RopeSpec(share=rope_field(config, "partial_rotary_factor", 1.0)),
            mlp=partial(PlainMLP, bias=True),
            embedding_padding=False,
            embedding_dropout=config.hidden_dropout,
            residual_dropout=config.hidden_dropout,
        )


class GPTNeoXForCausalLM(DecoderForCausalLM, GPTNeoXPreTrainedModel):
    """GPT-NeoX with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_rep"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = CAUSAL_MASKS


class GPTNeoXForSequenceClassification(DecoderForSequenceClassification, GPTNeoXPreTrainedModel):
    """GPT-NeoX with a score on the last token."""

    _keys_to_ignore_on_load_unexpected = [r"^embed_out\.weight$", *CAUSAL_MASKS]  # noqa: RUF012


ModelClass = GPTNeoXForCausalLM

"""The dense decoder, written once: layer, backbone, causal-LM and sequence-classification heads.

A family (``components/models/<name>/model.py``) gives a config class and a `DecoderSpec`; everything else is here.
Shapes: B batch, S sequence, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import XIELUActivation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from nemo_automodel.components.elsewhere import Elsewhere
from nemo_automodel.components.kernels.launch import runs_on, untouched
from nemo_automodel.components.kernels.linear import Linear
from nemo_automodel.components.kernels.linear_cross_entropy import linear_cross_entropy
from nemo_automodel.components.kernels.tied import embed_tied
from nemo_automodel.components.models.common.attention import DecoderAttention
from nemo_automodel.components.models.common.backend import BackendConfig, initialize_norm_module
from nemo_automodel.components.models.common.combined_projection.state_dict_adapter import (
    CombinedProjectionStateDictAdapter,
)
from nemo_automodel.components.models.common.context import SharedSequence
from nemo_automodel.components.models.common.flex import FLEX, block_masks
from nemo_automodel.components.models.common.graphs import Graphs
from nemo_automodel.components.models.common.hf_checkpointing_mixin import HFCheckpointingMixin
from nemo_automodel.components.models.common.norm import LayerNorm, RMSNorm
from nemo_automodel.components.models.common.rope import RotaryEmbedding, RotaryEmbeddings, rotary_embedding
from nemo_automodel.components.models.common.spec import DecoderSpec
from nemo_automodel.components.models.common.te import attention as _te_attention  # noqa: F401  (registers itself)
from nemo_automodel.components.models.common.te.float8 import around_forward
from nemo_automodel.components.models.common.te.modules import use_te_linears
from nemo_automodel.components.models.common.tp_plan import layers_plan_of
from nemo_automodel.components.models.common.varlen import FOR_A_MASK, Documents, documents_of_batch, takes_bounds

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
"""Layer type -> the function of transformers that makes its attention mask (and finds packed documents)."""


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a factor that is rounded to their dtype."""

    def __init__(self, *args: Any, factor: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(self.factor, dtype=self.weight.dtype)


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each between its norms, added to the residual stream one after the other or together.

    Attributes:
        residual_draws: within what the dropout of both branches draws, where ranks have parts of the stream.
    """

    residual_draws: Callable[[], AbstractContextManager[None]] | None = None

    def __init__(self, config: PreTrainedConfig, spec: DecoderSpec, layer_idx: int, backend: BackendConfig):
        super().__init__()
        self.self_attn = DecoderAttention(config, spec, layer_idx, backend)
        self.mlp = spec.mlp(config)
        self.norms = spec.norms
        self.parallel = spec.parallel
        self.residual_multiplier = spec.residual_multiplier
        self.residual_dropout = spec.residual_dropout
        for name in self.norms.names():
            norm = initialize_norm_module(backend.rms_norm, spec.norm, config.hidden_size, eps=spec.norm_eps)
            self.add_module(name, norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``[B, S, hidden] -> [B, S, hidden]``."""
        hidden_states, normed = self._normed_stream(self.norms.before_attention, self.self_attn.qkv_proj, hidden_states)
        attended, _ = self.self_attn(
            hidden_states=normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        attended = self._branch(self.norms.after_attention, attended)
        if self.parallel:
            if self.norms.before_mlp != self.norms.before_attention:
                normed = self._norm(self.norms.before_mlp, hidden_states)
            return hidden_states + (attended + self._branch(self.norms.after_mlp, self.mlp(normed)))
        hidden_states, normed = self._normed_stream(
            self.norms.before_mlp, getattr(self.mlp, "gate_up_proj", None), hidden_states, attended
        )
        fed_forward = self.mlp(normed)
        return hidden_states + self._branch(self.norms.after_mlp, fed_forward)

    def _normed_stream(
        self, name: str | None, reader: nn.Module | None, stream: Tensor, branch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with ``branch`` added to it, and what the next branch, by its ``reader``, reads."""
        norm = None if name is None else self._modules[name]
        if isinstance(norm, RMSNorm) and untouched(norm, RMSNorm) and norm.fuses(stream):
            return norm.with_residual(stream, branch, reader)
        stream = stream if branch is None else stream + branch
        return stream, self._norm(name, stream)

    def _norm(self, name: str | None, hidden_states: Tensor) -> Tensor:
        return hidden_states if name is None else self._modules[name](hidden_states)

    def _branch(self, norm: str | None, output: Tensor) -> Tensor:
        """What attention or MLP gives, as it is added to the residual stream."""
        output = self._norm(norm, output)
        if self.training and self.residual_dropout > 0:
            with nullcontext() if self.residual_draws is None else self.residual_draws():
                output = F.dropout(output, self.residual_dropout)
        return output if self.residual_multiplier == 1.0 else output * self.residual_multiplier


class DecoderPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about every dense family.

    A family sets ``config_class``, `decoder_spec` and, where its checkpoints need another one, ``adapter_class``.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    adapter_class: ClassVar[type[CombinedProjectionStateDictAdapter]] = CombinedProjectionStateDictAdapter
    _no_split_modules: ClassVar[Any] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[Any] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[Any] = {"hidden_states": DecoderLayer, "attentions": DecoderAttention}

    @staticmethod
    def decoder_spec(config: PreTrainedConfig) -> DecoderSpec:
        """The family's differences, read from its config."""
        raise TypeError("a family of the common decoder defines decoder_spec(config)")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm | LayerNorm):
            init.constant_(module.weight, module.initial)
        elif isinstance(module, XIELUActivation):  # which transformers fills from checkpoints only
            for name, value in XIELUActivation(dtype=module.alpha_p.dtype).state_dict().items():
                init.copy_(getattr(module, name), value)


class DecoderModel(DecoderPreTrainedModel):
    """Embeddings, layers, final norm and RoPE.

    Attributes:
        context: of ranks that share sequences; positions and masks are then whole, all else is of this rank's part.
        graphs: which compute instead where they can.
    """

    context: SharedSequence | None = None
    graphs: Graphs | None = None

    def __init__(self, config: PreTrainedConfig, spec: DecoderSpec, backend: BackendConfig):
        super().__init__(config)
        self.spec = spec
        self.embedding_dropout = spec.embedding_dropout
        embedding: Callable[..., nn.Embedding] = nn.Embedding
        if spec.embedding_multiplier_rounded:
            embedding = partial(ScaledEmbedding, factor=spec.embedding_multiplier)
        padding = config.pad_token_id if spec.embedding_padding else None
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(
            DecoderLayer(config, spec, layer_idx, backend) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = initialize_norm_module(backend.rms_norm, spec.norm, config.hidden_size, eps=spec.norm_eps)
        self.rotary_emb = rotary_embedding(config, spec.rope)
        if backend.linear == "te":
            use_te_linears(self, backend.te_fp8)
        self.te_fp8 = backend.te_fp8
        self.gradient_checkpointing = False
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = backend.kernels == "auto"  # type: ignore[assignment]
            if isinstance(module, RotaryEmbedding):
                module.fused = backend.rope_fusion
        self.post_init()

    def init_parallel_plans(self) -> None:
        # transformers would copy the config's plan, which names the separate projections that do not exist here
        super().init_parallel_plans()
        self._tp_plan = layers_plan_of(self)
        self._pp_plan = {  # some configs name other modules here as well
            "embed_tokens": (["input_ids"], ["inputs_embeds"]),
            "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
            "norm": (["hidden_states"], ["hidden_states"]),
        }

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the backbone alone would be saved under names that nothing else reads."""
        raise TypeError("save the whole model (model.save_pretrained), not its backbone")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, within what its precision needs to see of a whole pass."""
        with around_forward(self.te_fp8, recomputes=self.training and self.gradient_checkpointing):
            return super().__call__(*args, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states ``[B, S, hidden]`` after the final norm.

        Args:
            input_ids: ``[B, S]``; exactly one of this and ``inputs_embeds``.
            attention_mask: ``[B, S]``, 0 at padding; or masks ready made, 4-D or one per layer type.
            position_ids: ``[B, S]``; positions that start again inside a row mark packed documents, which then do
                not see each other (give no ``attention_mask`` in that case).
            past_key_values: cache to read and extend.
            inputs_embeds: ``[B, S, hidden]``.
            use_cache: whether to make a cache where none was given.
            **kwargs: for the attention implementation, and ``output_hidden_states`` and the like.

        Raises:
            ValueError: both or none of ``input_ids`` and ``inputs_embeds``; packed documents with a mask; what varlen
                attention does not have.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.graphs is not None and attention_mask is None and past_key_values is None and not use_cache:
            hidden_states = self.graphs.run(inputs_embeds, position_ids, kwargs)
            if hidden_states is not None:
                return BaseModelOutputWithPast(last_hidden_state=hidden_states)
        if position_ids is not None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            _refuse_packed_with_mask(position_ids, attention_mask)
        if self.context is not None and (use_cache or past_key_values is not None):
            raise ValueError("ranks that share sequences (mesh.cp) have no cache: give use_cache=False")
        spanned = inputs_embeds if self.context is None else self.context.whole_shape(inputs_embeds)
        cached, packed = past_key_values, position_ids
        documents = documents_of_batch(self, spanned, attention_mask, packed, cached is not None, kwargs)
        looked_for = packed
        if documents is not None and self.config._attn_implementation not in FOR_A_MASK:
            kwargs, documents = kwargs | documents.as_inputs(), None  # the packages' functions take them beside it
            looked_for = None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(spanned.shape[1], device=spanned.device).unsqueeze(0) + seen

        # transformers looks for packed documents only where it is given no cache; one made just now is empty. Positions
        # made just now have none, and looking would make the host wait for the device
        masks = self._masks(spanned, attention_mask if documents is None else documents, cached, looked_for)
        # of a later pipeline stage, what it is given are hidden states already
        first = not isinstance(self.embed_tokens, Elsewhere)
        hidden_states = self._first_hidden_states(inputs_embeds) if first else inputs_embeds
        position_embeddings = self._position_embeddings(hidden_states, position_ids)
        known = packed is None or kwargs.get("cu_seq_lens_q") is not None
        positions = None if known and self._only_looks_for_documents() else position_ids
        for layer, layer_type in zip(self.layers, self.spec.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_ids=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings[layer_type],
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def masks_of_rows(self, inputs_embeds: Tensor) -> dict[str, Any]:
        """The masks, to be given as ``attention_mask``, of rows that are one document each."""
        return self._masks(inputs_embeds, None, None, None)

    def _only_looks_for_documents(self) -> bool:
        """Whether layers use positions for nothing else: FlashAttention looks, and waits, in each of them."""
        implementation = self.config._attn_implementation
        flash = takes_bounds(implementation) and implementation not in FOR_A_MASK
        return flash and self.spec.rope.query_growth is None and self.context is None

    def _first_hidden_states(self, inputs_embeds: Tensor) -> Tensor:
        factor = self.spec.embedding_multiplier
        if factor != 1.0 and not self.spec.embedding_multiplier_rounded:
            inputs_embeds = inputs_embeds * factor
        return F.dropout(inputs_embeds, self.embedding_dropout, self.training)

    def _position_embeddings(self, hidden_states: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """cos and sin for each layer type; None where no layer turns its queries and keys."""
        types = sorted(set(self.spec.layer_types))
        if isinstance(self.rotary_emb, RotaryEmbeddings):
            return {layer_type: self.rotary_emb[layer_type](hidden_states, position_ids) for layer_type in types}
        tables = None if self.rotary_emb is None else self.rotary_emb(hidden_states, position_ids)
        return dict.fromkeys(types, tables)

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | Documents | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> dict[str, Any]:
        """The mask of each layer type, in the form that the attention implementation in use takes."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if isinstance(attention_mask, Documents):
            return dict.fromkeys(self.spec.layer_types, attention_mask)
        if self.config._attn_implementation == FLEX and getattr(self.config, "is_causal", True):
            windows = {"full_attention": None, "sliding_attention": self.spec.sliding_window}
            types = self.spec.layer_types
            layers = {layer_type: (types.index(layer_type), windows[layer_type]) for layer_type in types}
            made = block_masks(layers, inputs_embeds, attention_mask, past_key_values, position_ids)
            if made is not None:
                return made
        return {
            layer_type: MASKS[layer_type](
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type in sorted(set(self.spec.layer_types))
        }


def _refuse_packed_with_mask(position_ids: Tensor, attention_mask: Tensor) -> None:
    """transformers looks for packed documents only where there is no mask; with one they would see each other."""
    if torch.compiler.is_compiling() or position_ids.shape[-1] != attention_mask.shape[-1]:
        return
    attended = attention_mask.bool()
    if ((position_ids.diff(dim=-1) != 1) & attended[:, 1:] & attended[:, :-1]).any():
        raise ValueError(
            "position_ids start again inside a row (packed documents), but there is an attention_mask, with which the "
            "documents would see each other: leave attention_mask out, and give padding positions of its own"
        )


class DecoderForCausalLM(HFCheckpointingMixin, DecoderPreTrainedModel, GenerationMixin):
    """The backbone with a language-model head.

    Args:
        config: the family's config.
        backend: a `BackendConfig`, its fields as a dict, or None for the defaults.

    Attributes:
        takes_targets: that `forward` has ``targets``.
    """

    takes_targets = True

    def __init__(self, config: PreTrainedConfig, backend: BackendConfig | dict[str, Any] | None = None):
        backend = BackendConfig.of(backend).apply_to(config)
        super().__init__(config)
        self.backend = backend
        self.model = DecoderModel(config, self.decoder_spec(config), self.backend)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.state_dict_adapter = self.adapter_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, S, V]`` and, given labels, the next-token loss.

        Given ``targets`` instead, the sum of the cross entropies and no logits, which are then never held whole.

        Args:
            input_ids: as for the backbone.
            attention_mask: as for the backbone.
            position_ids: as for the backbone.
            past_key_values: as for the backbone.
            inputs_embeds: as for the backbone.
            labels: ``[B, S]``, -100 where nothing is to be predicted; shifted inside.
            use_cache: as for the backbone.
            logits_to_keep: compute logits for the last so many positions only (0: all), or for the positions in a
                1-D index tensor.
            targets: ``[B, positions kept]``, what each is to predict, -100 where nothing.
            **kwargs: for the backbone and, such as ``num_items_in_batch``, for the loss.

        Raises:
            ValueError: labels of a part of a sequence, the last of which lacks what it is to predict.
        """
        if labels is not None and self.model.context is not None:
            raise ValueError("ranks that share sequences (mesh.cp) take targets, shifted before the cut, not labels")
        of_head: Tensor | None = None
        if targets is not None and input_ids is not None and inputs_embeds is None and self._embeds_tied():
            inputs_embeds, of_head = embed_tied(input_ids, self.lm_head.weight, self.model.embed_tokens.padding_idx)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids if of_head is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        assert outputs.last_hidden_state is not None
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden_states = hidden_states.index_select(1, logits_to_keep)  # whose gradient needs no sorting
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        if targets is not None:
            summed = self._cross_entropy(hidden_states.flatten(0, 1), targets.flatten(), of_head)
            return CausalLMOutputWithPast(loss=summed)
        logits = self._logits(hidden_states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _embeds_tied(self) -> bool:
        """Whether embeddings and the loss of the head, which share a trained weight, make its gradient in one piece."""
        embed, head = self.model.embed_tokens, self.lm_head
        return (
            self._loss_in_kernels()
            and untouched(embed, nn.Embedding)
            and embed.weight is head.weight
            and embed.weight.requires_grad
            and runs_on(embed.weight)
            and embed.max_norm is None
            and not (embed.sparse or embed.scale_grad_by_freq)
            and not torch.is_autocast_enabled(embed.weight.device.type)
            and not torch.compiler.is_compiling()
        )

    def _loss_in_kernels(self) -> bool:
        head = self.lm_head
        return self.backend.kernels == "auto" and untouched(head, nn.Linear, Linear) and head.bias is None

    def _cross_entropy(self, hidden_states: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """``weight``: the head's, where not by its own name."""
        head, spec = self.lm_head, self.model.spec
        if isinstance(head.weight, DTensor) and type(head) in (nn.Linear, Linear) and head.bias is None:
            return self._cross_entropy_in_parts(hidden_states, head.weight, targets)
        if self._loss_in_kernels():
            weight = head.weight if weight is None else weight
            return linear_cross_entropy(hidden_states, weight, targets, spec.logits_multiplier, spec.logits_softcap)
        return F.cross_entropy(self._logits(hidden_states).float(), targets, reduction="sum")

    def _cross_entropy_in_parts(self, hidden_states: Tensor, weight: DTensor, targets: Tensor) -> Tensor:
        """Of tensor-parallel ranks, none of which ever holds the logits of more than its part of the vocabulary."""
        spec, mesh = self.model.spec, weight.device_mesh
        spread = DTensor.from_local(hidden_states, mesh, [Replicate()], run_check=False)
        return linear_cross_entropy(
            spread.to_local(grad_placements=[Partial()]),
            weight.to_local(),
            targets,
            spec.logits_multiplier,
            spec.logits_softcap,
            group=mesh.get_group(),
            vocabulary=weight.shape[0],
        )

    def _logits(self, hidden_states: Tensor) -> Tensor:
        if isinstance(self.lm_head, Elsewhere):  # not the last pipeline stage
            return hidden_states
        logits = self.lm_head(hidden_states)
        if self.model.spec.logits_multiplier != 1.0:
            logits = logits * self.model.spec.logits_multiplier
        if (cap := self.model.spec.logits_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits


class DecoderForSequenceClassification(HFCheckpointingMixin, GenericForSequenceClassification, DecoderPreTrainedModel):
    """The backbone with a linear score on the last token that is not padding (a classifier, or a reranker).

    Args:
        config: the family's config, with ``num_labels``.
        backend: a `BackendConfig`, its fields as a dict, or None for the defaults.
    """

    _keys_to_ignore_on_load_missing: ClassVar[Any] = [r"^score\.weight$"]
    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = [r"^lm_head\.weight$"]

    def __init__(self, config: PreTrainedConfig, backend: BackendConfig | dict[str, Any] | None = None):
        backend = BackendConfig.of(backend).apply_to(config)
        # not GenericForSequenceClassification's, which would build transformers' own backbone
        DecoderPreTrainedModel.__init__(self, config)
        self.backend = backend
        self.num_labels = config.num_labels
        self.model = DecoderModel(config, self.decoder_spec(config), self.backend)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.state_dict_adapter = self.adapter_class(config)
        self.post_init()

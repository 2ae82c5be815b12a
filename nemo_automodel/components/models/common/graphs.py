"""A backbone's forward and backward pass as CUDA graphs: launched as a whole, not kernel by kernel.

The host needs some milliseconds to launch the kernels of a layer, whatever its size. A small model's, or a short row's,
run shorter than that, and the GPU waits. Embeddings, head and loss stay outside, whose shapes differ between batches.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.kernels.launch import power_of_two
from nemo_automodel.components.models.common.varlen import Documents

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.decoder import DecoderModel

ATTENTIONS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""transformers' names of those that launch the same kernels for the same shapes, and ask the device for nothing."""

HOST_BOUND = 2e11
"""Parameters of a layer times tokens, below which a GPU is done with it before the host is (6 FLOP each; an H200)."""

MOST, SHARE = 8, 0.1
"""Shapes that have graphs, the first that come, and the share of the GPU's memory for the gradients that each holds."""

FEWEST_BOUNDS = 16


class Graphs:
    """The graphs of one backbone, each made when rows of its shape first come.

    They are for training on rows without a mask: whole ones, or packed ones with their documents' bounds. What else is
    asked of the backbone it computes itself, and a forward pass before autograd has let go of the last one, whose
    activations it would overwrite. Gradients of parameters are given in the same memory each time, to be used or added
    up elsewhere before the next backward pass. Hooks run when a graph is made, and not again.

    Args:
        backbone: in which nothing is in the way (`in_the_way`).
        always: also where the GPU is busy for longer than the host; what cannot be captured is an error then, else a
            warning.
    """

    def __init__(self, backbone: "DecoderModel", always: bool = False):
        self._backbone, self._always = backbone, always
        trained = sum(p.numel() * p.element_size() for p in backbone.parameters() if p.requires_grad)
        memory = torch.cuda.get_device_properties(next(backbone.parameters()).device).total_memory
        self._most = MOST if always else min(MOST, int(SHARE * memory / max(1, trained)))
        of_layers = sum(p.numel() for p in backbone.layers.parameters()) / len(backbone.layers)
        self._tokens = math.inf if always else HOST_BOUND / of_layers
        self._pool = torch.cuda.graph_pool_handle()
        self._made: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._captured: list[Tensor] = []
        self._places: tuple[Any, ...] = ()
        self._capturing = False
        self._last: Callable[[], Any] = lambda: None
        """The node of the last forward pass, as long as autograd has it."""

    @property
    def words(self) -> str:
        """For whom they are."""
        return "CUDA graphs" if self._always else f"CUDA graphs for up to {self._tokens:,.0f} tokens at a time"

    def run(self, inputs_embeds: Tensor, position_ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
        """Hidden states ``[B, S, hidden]`` after the final norm; None where no graph serves.

        Args:
            inputs_embeds: ``[B, S, hidden]``.
            position_ids: ``[B, S]`` of packed documents, None of whole rows.
            given: the other arguments, of which it knows what `Documents.as_inputs` returns.

        Raises:
            ValueError: the model does something that cannot be captured.
        """
        bounds, (batch, length) = given.get("cu_seq_lens_q"), inputs_embeds.shape[:2]
        known = set(given) <= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        trains = self._backbone.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")
        free = not self._capturing and self._last() is None
        if not (free and known and trains) or (position_ids is None) != (bounds is None):
            return None
        if self._places != self._now():  # weights were moved, or frozen: graphs have their addresses
            self._made.clear()
        inputs = [inputs_embeds]
        if bounds is not None and position_ids is not None:
            most = max(FEWEST_BOUNDS, power_of_two(len(bounds)))
            # documents without tokens follow, so that any number of documents has one of few shapes
            inputs += [position_ids.expand(batch, -1), F.pad(bounds, (0, most - len(bounds)), value=batch * length)]
        key = (inputs_embeds.requires_grad, *(each.shape for each in inputs))
        if key not in self._made:
            if len(self._made) >= self._most or batch * length > self._tokens:
                return None
            made = self._capture(inputs)
            if made is None:
                return None
            self._made[key] = made
        hidden = self._made[key](*inputs)
        self._last = weakref.ref(hidden.grad_fn)
        return hidden

    def _capture(self, inputs: list[Tensor]) -> Callable[..., Tensor] | None:
        samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in inputs)
        # made here: while a graph is captured, transformers makes sdpa a mask where it needs none
        sdpa = self._backbone.config._attn_implementation == "sdpa"
        masks = self._backbone.masks_of_rows(samples[0]) if sdpa else None
        self._capturing = True
        try:
            made: Callable[..., Tensor] = torch.cuda.make_graphed_callables(  # type: ignore[assignment, call-overload]
                _Rows(self._backbone, masks), samples, allow_unused_input=True, pool=self._pool
            )
        except RuntimeError as error:
            words = f"this model cannot be a CUDA graph; model.cuda_graphs=false does without ({error})"
            if self._always:
                raise ValueError(words) from error
            warnings.warn(words, stacklevel=2)
            self._most = 0
            return None
        finally:
            self._capturing = False
        torch.cuda.empty_cache()  # of what was tried before, on a stream of its own
        self._captured = [*self._backbone.parameters(), *self._backbone.buffers()]
        self._places = self._now()
        return made

    def _now(self) -> tuple[Any, ...]:
        return tuple((tensor.data_ptr(), tensor.requires_grad) for tensor in self._captured)


class _Rows(nn.Module):
    """The backbone from embeddings on, called as graphs are: with tensors, one after the other."""

    def __init__(self, backbone: "DecoderModel", masks: dict[str, Any] | None):
        super().__init__()
        self.backbone, self.masks = backbone, masks

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None, bounds: Tensor | None = None) -> Any:
        given = {} if bounds is None else Documents(bounds, inputs_embeds.shape[1]).as_inputs()
        return self.backbone(
            inputs_embeds=inputs_embeds, attention_mask=self.masks, position_ids=position_ids, use_cache=False, **given
        ).last_hidden_state


def in_the_way(backbone: "DecoderModel") -> str | None:
    """What keeps a backbone from CUDA graphs, in words; None: nothing."""
    parameters = list(backbone.parameters())
    attention = backbone.config._attn_implementation
    dropout = [getattr(module, "attention_dropout", 0) for module in backbone.modules()]
    dropout += [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    reasons = {
        "a device that is no GPU": any(parameter.device.type != "cuda" for parameter in parameters),
        # their gradients would be added up where they are given, which the next ones overwrite
        "weights or adapters in float32": any(p.dtype == torch.float32 for p in parameters if p.requires_grad),
        "nothing that is trained": not any(parameter.requires_grad for parameter in parameters),
        "dropout": backbone.embedding_dropout > 0 or any(dropout),
        f"attention {attention!r}": attention not in ATTENTIONS,
    }
    return next((words for words, holds in reasons.items() if holds), None)

"""A backbone's forward and backward pass as CUDA graphs: launched as a whole, not kernel by kernel.

The host needs some milliseconds to launch the kernels of a layer, whatever its size. A small model's, or a short row's,
run shorter than that, and the GPU waits. Embeddings, head and loss stay outside, whose shapes differ between batches.
"""

import gc
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.kernels.launch import power_of_two
from nemo_automodel.components.models.common.varlen import Documents, takes_bounds

if TYPE_CHECKING:
    from nemo_automodel.components.models.common.decoder import DecoderModel

ATTENTIONS = ("sdpa", "varlen", "flash_attention_2", "flash_attention_3")
"""transformers' names of those that were captured and compared with launches one by one."""

HOST_BOUND = 2e11
"""Parameters of a layer times tokens, below which a GPU is done with it before the host is (6 FLOP each; an H200)."""

MOST, SHARE = 8, 0.1
"""Shapes that have graphs, the first that recur; and the share of the GPU's memory for gradients, which each holds, and
for the activations of the largest."""

FEWEST_BOUNDS = 16


class Graphs:
    """The graphs of one backbone, each made when rows of its shape come for the second time.

    They are for training on rows without a mask: whole ones, or packed ones with their documents' bounds. What else is
    asked of the backbone it computes itself, and a forward pass before autograd has let go of the last one, whose
    activations it would overwrite. Gradients of parameters are given in the same memory each time, to be used or added
    up elsewhere before the next backward pass. Hooks run when a graph is made, and not again.

    Args:
        backbone: in which nothing is in the way (`in_the_way`), and whose modules stay.
        asked: also where the GPU is busy for longer than the host, or memory is short; a model that waits for the
            device is an error then, else a warning.

    Attributes:
        shapes: how many may have a graph.
        tokens: up to how many a forward pass may have.
    """

    def __init__(self, backbone: "DecoderModel", asked: bool = False):
        self._backbone, self._asked = backbone, asked
        trained = sum(p.numel() * p.element_size() for p in backbone.parameters() if p.requires_grad)
        memory = torch.cuda.get_device_properties(next(backbone.parameters()).device).total_memory
        self._memory = math.inf if asked else SHARE * memory
        self.shapes = MOST if asked else min(MOST, int(self._memory / max(1, trained)))
        self.tokens = math.inf if asked else host_bound(backbone)
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[tuple[Any, ...]] = set()
        self._large: set[tuple[Any, ...]] = set()
        self._made: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        self._captured: list[tuple[dict[str, Any], str]] = []
        self._addresses: tuple[Any, ...] = ()
        self._capturing = False
        self._last: Callable[[], Any] = lambda: None
        """The node of the last forward pass, as long as autograd has it."""

    @property
    def description(self) -> str:
        """For which passes they are."""
        return "CUDA graphs" if self._asked else f"CUDA graphs for up to {self.tokens:,.0f} tokens at a time"

    def run(self, inputs_embeds: Tensor, position_ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
        """Hidden states ``[B, S, hidden]`` after the final norm; None where no graph serves.

        Args:
            inputs_embeds: ``[B, S, hidden]``.
            position_ids: ``[B, S]`` of packed documents, None of whole rows.
            given: the other arguments, of which it knows what `Documents.as_inputs` returns.

        Raises:
            ValueError: the model does something that cannot be captured.
        """
        config, bounds = self._backbone.config, given.get("cu_seq_lens_q")
        known = set(given) <= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        known = known and not (config.output_hidden_states or config.output_attentions)
        packed = bounds is not None and takes_bounds(config._attn_implementation)
        trains = self._backbone.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")
        free = not self._capturing and self._last() is None
        if not (free and known and trains) or packed != (position_ids is not None) or packed != (bounds is not None):
            return None
        if self._addresses != self._now():  # weights were moved, exchanged or frozen
            self._forget()
        batch, length = inputs_embeds.shape[:2]
        inputs = [inputs_embeds]
        if bounds is not None and position_ids is not None:
            most = max(FEWEST_BOUNDS, power_of_two(len(bounds)))
            # documents without tokens follow, so that any number of documents has one of few shapes
            inputs += [position_ids.expand(batch, -1), F.pad(bounds, (0, most - len(bounds)), value=batch * length)]
        key = (config._attn_implementation, inputs_embeds.requires_grad, *(each.shape for each in inputs))
        if key not in self._made:
            again = key in self._seen
            self._seen.add(key)
            if not again or key in self._large or len(self._made) >= self.shapes or batch * length > self.tokens:
                return None
            made = self._make(inputs)
            if made is None:
                self._large.add(key)
                return None
            self._made[key] = made
        hidden = self._made[key](*inputs)
        self._last = weakref.ref(hidden.grad_fn)
        return hidden

    def _make(self, inputs: list[Tensor]) -> Callable[..., Tensor] | None:
        samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in inputs)
        # made here: while a graph is captured, transformers makes sdpa a mask where it needs none
        sdpa = self._backbone.config._attn_implementation == "sdpa"
        rows = _Rows(self._backbone, self._backbone.masks_of_rows(samples[0]) if sdpa else None)
        self._capturing = True
        try:
            kept = self._tried(rows, samples)
            if kept is None or kept > self._memory:
                return None
            with torch.cuda.device(samples[0].device):
                made: Callable[..., Tensor] = torch.cuda.make_graphed_callables(  # type: ignore[assignment, call-overload]
                    rows, samples, num_warmup_iters=2, allow_unused_input=True, pool=self._pool
                )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # which leaves the stream and the allocator as they are in a capture
            raise ValueError(f"a CUDA graph of this model failed; set model.cuda_graphs=false ({error})") from error
        finally:
            self._capturing = False
        rows.let_go()
        torch.cuda.empty_cache()  # of what was tried before, on a stream of its own
        self._captured = [
            (tensors, name)
            for module in self._backbone.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._addresses = self._now()
        return made

    def _tried(self, rows: "_Rows", samples: Sequence[Tensor]) -> int | None:
        """Bytes that a forward pass keeps; None: it asks the device for something, or there is no memory."""
        trained = [each for each in (*samples, *rows.parameters()) if each.requires_grad]
        before, mode = torch.cuda.memory_allocated(samples[0].device), torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            output = rows(*samples)
            kept = torch.cuda.memory_allocated(samples[0].device) - before
            torch.autograd.grad(output, trained, torch.zeros_like(output), allow_unused=True)
            del output
        except RuntimeError as error:
            words = f"this model cannot be a CUDA graph; model.cuda_graphs=false does without ({error})"
            if self._asked:
                raise error if isinstance(error, torch.OutOfMemoryError) else ValueError(words) from error
            warnings.warn(words, stacklevel=2)
            self.shapes = 0
            return None
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            rows.let_go()
        return kept

    def _forget(self) -> None:
        """All graphs, and the memory that they share: torch ties each to itself."""
        self._made.clear()
        gc.collect()
        self._pool = torch.cuda.graph_pool_handle()

    def _now(self) -> tuple[Any, ...]:
        """Where what was captured lies, and what is trained."""
        there = (tensors.get(name) for tensors, name in self._captured)
        return tuple(None if each is None else (each.data_ptr(), each.requires_grad) for each in there)


class _Rows(nn.Module):
    """The backbone from embeddings on, called as graphs are: with tensors, one after the other."""

    def __init__(self, backbone: "DecoderModel", masks: dict[str, Any] | None):
        super().__init__()
        self.backbone, self.masks = backbone, masks
        self._output: Tensor | None = None

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor | None = None, bounds: Tensor | None = None) -> Any:
        given = {} if bounds is None else Documents(bounds, inputs_embeds.shape[1]).as_inputs()
        self._output = self.backbone(
            inputs_embeds=inputs_embeds, attention_mask=self.masks, position_ids=position_ids, use_cache=False, **given
        ).last_hidden_state
        return self._output

    def let_go(self) -> None:
        """Of autograd's graph behind the captured output, which torch keeps.

        Its nodes of parameters belong to the stream of the capture, and would take every later gradient there.
        """
        output, self._output = self._output, None
        if output is not None and not output._is_view():
            output.detach_()


def host_bound(backbone: "DecoderModel") -> float:
    """Up to how many tokens of a forward pass the GPU is done before the host has launched it."""
    return HOST_BOUND * len(backbone.layers) / sum(parameter.numel() for parameter in backbone.layers.parameters())


def in_the_way(backbone: "DecoderModel") -> str | None:
    """What keeps a backbone from CUDA graphs, in words; None: nothing."""
    parameters = list(backbone.parameters())
    attention = backbone.config._attn_implementation
    names = ("attention_dropout", "residual_dropout", "embedding_dropout")
    dropout = [getattr(module, name, 0) for module in backbone.modules() for name in names]
    dropout += [module.p for module in backbone.modules() if isinstance(module, nn.Dropout)]
    kinds = {getattr(module, "rope_type", "") for module in backbone.modules()}
    reasons = {
        "a device that is no GPU": any(parameter.device.type != "cuda" for parameter in parameters),
        # their gradients would be added up where they are given, which the next ones overwrite
        "weights or adapters in float32": any(p.dtype == torch.float32 for p in parameters if p.requires_grad),
        "nothing that is trained": not any(parameter.requires_grad for parameter in parameters),
        # whose draws before a capture would not be those of a run that resumes
        "dropout": any(dropout),
        f"attention {attention!r}": attention not in ATTENTIONS,
        "RoPE of type 'dynamic', which asks how long rows are": "dynamic" in kinds,
    }
    return next((words for words, holds in reasons.items() if holds), None)

"""LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353) whose parts keep their own A and B inside a fused projection.

The maths is peft's on the separate projections: ``q = (W_q + s_q B_q A_q) x``, and with DoRA
``q = m_q (W_q + s_q B_q A_q) x / |W_q + s_q B_q A_q|``, the norm taken per row and held constant in the backward pass.
The base product is one for the whole fused projection; the parts' A are stacked, so the input is read once; their B are
laid out as the fused projection's rows are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.kernels.float8 import quantized_reference
from nemo_automodel.components.kernels.launch import runs_on
from nemo_automodel.components.kernels.linear import Gated, can_run, linear, mm_and_low_rank
from nemo_automodel.components.kernels.low_rank import Place, pack, unpack
from nemo_automodel.components.layout import Fusion
from nemo_automodel.components.peft.config import Update
from nemo_automodel.components.placement import whole


class LoRALinear(nn.Linear):
    """A linear layer, fused or not, with a low-rank update per targeted part.

    ``weight`` and ``bias`` are the frozen layer's own parameters, under their old names. The adapters' parameters are
    made on ``base``'s device and hold nothing yet: `init_adapters` or an adapter's file fills them.

    Args:
        base: the layer to adapt.
        name: the layer's own name, that of its one part when it is not fused.
        updates: targeted part -> its rank and scale.
        fusion: how the layer is fused; None for a plain one.
        dropout: on the adapters' input, while training.
        dora: whether rows have trained magnitudes.
        share_a: whether the parts share one A.
        dtype: of the adapters (default: the layer's).

    Attributes:
        lora_A: part name (with ``share_a``: the fused name) -> ``[r, in_features]``.
        lora_B: part name -> ``[rows of the part, r]``, in the order in which ``weight`` has them, so that a shard of B
            belongs to the same shard of ``weight``; a checkpoint's order may be another.
        lora_magnitude: with DoRA, part name -> ``[rows of the part]``; else empty.
        kernels: whether to use the library's own where they can run; the base layer's choice.
        column_ranks: that share the weight's columns (tensor parallelism, of a row-wise layer).
        scale: of the rows of ``weight``, fp32 ``[out_features, 1]``, once `quantize` put it in float8.

    Raises:
        ValueError: ``share_a`` with parts of unequal rank.
    """

    takes_gated = True
    writes: int = 0
    column_ranks: dist.ProcessGroup | None = None
    _joined: Tensor | None = None
    _known_places: tuple[Any, tuple[Place, ...]] = (None, ())
    scale: Tensor | None

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        updates: Mapping[str, Update],
        fusion: Fusion | None,
        *,
        dropout: float = 0.0,
        dora: bool = False,
        share_a: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.register_buffer("scale", None)  # in state dicts, where there is one: the weight means nothing without
        self.kernels = getattr(base, "kernels", True)
        self.fusion = None if fusion is None else replace(fusion, orders=())
        self.parts = fusion.parts if fusion else (name,)
        self.updates = {part: updates[part] for part in self.parts if part in updates}
        self.dora, self.share_a = dora, share_a and fusion is not None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        ranks = {part: update.r for part, update in self.updates.items()}
        if self.share_a and len(set(ranks.values())) > 1:
            raise ValueError(f"share_a: the parts of {name} have ranks {ranks}; give them one rank")
        self._of_a = {part: name if self.share_a else part for part in ranks}

        options: dict[str, Any] = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        self.lora_A, self.lora_B, self.lora_magnitude = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for part, r in ranks.items():
            if self._of_a[part] not in self.lora_A:
                self.lora_A[self._of_a[part]] = nn.Parameter(torch.empty(r, base.in_features, **options))
            self.lora_B[part] = nn.Parameter(torch.empty(self.rows(part), r, **options))
            if dora:
                self.lora_magnitude[part] = nn.Parameter(torch.empty(self.rows(part), **options))

    def rows(self, part: str) -> int:
        """Output rows of ``part``, in this rank's shard while it computes."""
        rows = self.weight.shape[0]
        return self.fusion.part_shape((rows,), part)[0] if self.fusion else rows

    def a_of(self, part: str) -> nn.Parameter:
        """A of ``part``: its own, or the shared one."""
        return self.lora_A[self._of_a[part]]

    def forward(self, x: Tensor | Gated) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` in the base product's dtype; adapters compute in their own."""
        if self._fuses(x):
            return linear(x, self.weight, self.bias, self, [*self.lora_A.values(), *self.lora_B.values()])
        if isinstance(x, Gated):
            x = x.made()
        if self.scale is not None:
            raise ValueError(
                "a weight in float8 takes inputs and adapters in one dtype, outside autocast and torch.compile; got "
                f"{x.dtype}, adapters {next(iter(self.lora_A.values())).dtype}"
            )
        # items: Dynamo takes a ParameterDict for a list of pairs, and leaves the graph
        a, b = _factors(self, list(self.lora_A.values()), dict(self.lora_B.items()))
        dropped = self.dropout(x)
        left = F.linear(dropped.to(a.dtype), a)
        if not self.dora:
            return self._added(x, left, b, self.bias)
        adapted = self._added(dropped, left, b, None)
        out = adapted * self._factor(self.weight, a, b, dict(self.lora_magnitude.items()))
        if dropped is not x:  # peft: magnitudes act on what dropout lets through, the base product stays whole
            out = out + F.linear(x - dropped, self.weight)
        return (out if self.bias is None else out + self.bias).to(adapted.dtype)

    def _added(self, x: Tensor, left: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + left b^T + bias``, rounded once where that can be had."""
        rows, left = x.reshape(-1, x.shape[-1]), left.reshape(-1, left.shape[-1])
        if self.kernels and can_run(rows, self.weight, bias, left, b, compiled=True):
            y = mm_and_low_rank(rows, self.weight, None, bias, left, b.t())
        else:
            y = torch.addmm(F.linear(left, b).to(x.dtype), rows, self.weight.t())
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.weight.shape[0])

    def _fuses(self, x: Tensor | Gated) -> bool:
        """Whether the kernels compute this layer, whose gradients are then those of plain LoRA."""
        adapters = (*self.lora_A.values(), *self.lora_B.values())
        if self.scale is not None:
            return can_run(x, self.bias, *adapters, anywhere=True)
        ready = self.kernels and self._plain and not self.weight.requires_grad
        return ready and can_run(x, self.weight, self.bias, *adapters)

    @property
    def _plain(self) -> bool:
        return not self.dora and not self.share_a and isinstance(self.dropout, nn.Identity)

    def can_join(self) -> bool:
        """Whether `join` would serve: the kernels compute this layer, and rows stay where 16 bytes are read at once."""
        return (
            self.kernels
            and self._plain
            and self.scale is None
            and runs_on(self.weight)
            and self.rank * self.weight.element_size() % 16 == 0
        )

    @torch.no_grad()
    def join(self) -> None:
        """Put the weight beside room for B, so that one product does for both.

        For a whole weight on one device: one that is sharded later would lose the tie.
        """
        joined = self.weight.new_zeros(self.out_features, self.in_features + self.rank)
        joined[:, : self.in_features] = self.weight
        self.weight.data = joined[:, : self.in_features]
        self._joined = joined

    @property
    def joined(self) -> Tensor | None:
        """``[W | B]``, ``[out_features, in_features + r]``, once `join` made it, while ``weight`` is a view of it.

        Whatever moves, casts, copies or replaces the weight ends that.
        """
        joined, weight = self._joined, self.weight
        if joined is not None and (
            weight.data_ptr() != joined.data_ptr()
            or (weight.device, weight.dtype, weight.stride()) != (joined.device, joined.dtype, joined.stride())
        ):
            joined = self._joined = None
        return joined

    @torch.no_grad()
    def quantize(self) -> None:
        """Keep the weight in float8, half as large and twice as fast where the hardware has it, for good.

        Raises:
            ValueError: DoRA, a shared A or dropout, which need the weight as it was; on a GPU another dtype than
                bfloat16, or sizes that its products do not take.
        """
        if not self._plain:
            raise ValueError("lora.base_dtype=float8 goes with plain LoRA: without dora, share_a and dropout")
        if self.scale is not None:
            return
        if self.weight.is_cuda and (self.weight.dtype != torch.bfloat16 or any(n % 16 for n in self.weight.shape)):
            raise ValueError(
                "lora.base_dtype=float8 takes bfloat16 models and layers of multiples of 16 channels; this one is "
                f"{str(self.weight.dtype).removeprefix('torch.')} {list(self.weight.shape)}"
            )
        self.separate()
        rows, scale = quantized_reference(self.weight)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.scale = scale

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        # .to(bfloat16) would make numbers of float8's codes, and round their scales
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        if scale is not None:
            self.weight = nn.Parameter(weight.to(self.weight.device), requires_grad=False)
            self.scale = scale.to(self.weight.device)
        return self

    def separate(self) -> None:
        """Undo `join`."""
        if self.joined is not None:
            self.weight.data, self._joined = self.weight.data.contiguous(), None

    @property
    def room(self) -> int:
        """Columns that the layer wants beside every row of its input."""
        return 0 if self.joined is None else self.rank

    @property
    def pairs(self) -> tuple[int, int] | None:
        """Ranks of the two parts whose rows alternate, 0 where one has no adapter; None: rows lie otherwise."""
        if self.fusion is None or self.fusion.blocks != (1, 1):
            return None
        of_first, of_second = (update.r if (update := self.updates.get(part)) else 0 for part in self.parts)
        return of_first, of_second

    @property
    def rank(self) -> int:
        """Of all parts together."""
        return sum(a.shape[0] for a in self.lora_A.values())

    def stacked(self, parameters: Sequence[Tensor]) -> Tensor:
        """A of all parts, ``[rank, in_features]``."""
        of_a = parameters[: len(self.lora_A)]
        return torch.cat(list(of_a)) if len(of_a) > 1 else of_a[0]

    def pack(self, parameters: Sequence[Tensor], into: Tensor) -> Tensor:
        """A of all parts, ``[rank, in_features]``; their B, times their scales, go into the fused rows of ``into``."""
        if self._packs(into, parameters):
            places = self._places(parameters)
            if len(self.lora_A) == 1:  # which is all of them
                pack(parameters[1:], places[1:], into, into)
                return parameters[0]
            all_a = into.new_empty(self.rank, parameters[0].shape[1])
            pack(parameters, places, all_a, into)
            return all_a
        for part, b, columns in zip(self.updates, parameters[len(self.lora_A) :], self._columns(into), strict=True):
            scaled = b * self.updates[part].scale
            if self.fusion is None:
                columns.copy_(scaled)
            else:
                self.fusion.write_part(columns, part, scaled)
        return self.stacked(parameters)

    def gradients(
        self, of_a: Tensor, of_b: Tensor, parameters: Sequence[Tensor], columns: Tensor | None = None, offset: float = 0
    ) -> list[Tensor]:
        """Of each A, then of each B; see `LowRank`."""
        if self._packs(of_b, parameters):
            return unpack(of_a, of_b, self._places(parameters), columns, offset, parameters[0])
        if columns is not None:
            of_a = of_a * (columns.float() + offset)
        parts = zip(self.updates, self._columns(of_b), strict=True)
        return [
            *of_a.to(parameters[0].dtype).split([a.shape[0] for a in self.lora_A.values()]),
            *(
                (columns if self.fusion is None else self.fusion.read_part(columns, part)) * self.updates[part].scale
                for part, columns in parts
            ),
        ]

    def _packs(self, all_b: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether one kernel moves all parameters."""
        return runs_on(all_b, *parameters) and all(parameter.is_contiguous() for parameter in parameters)

    def _places(self, parameters: Sequence[Tensor]) -> tuple[Place, ...]:
        """Of the parameters, which may be this rank's shards, as `pack` and `gradients` get them."""
        shapes = tuple(parameter.shape for parameter in parameters)
        if self._known_places[0] != shapes:
            self._known_places = shapes, tuple(self._place_all(shapes))
        return self._known_places[1]

    def _place_all(self, shapes: Sequence[torch.Size]) -> Iterator[Place]:
        before, ranks = 0, len(self.lora_A)
        for r, width in shapes[:ranks]:
            yield Place(rows=r, columns=width, block=r, group=r, start=before)
            before += r
        before = 0
        for (part, update), (rows, r) in zip(self.updates.items(), shapes[ranks:], strict=True):
            block, group, start = (rows, rows, 0) if self.fusion is None else self.fusion.rows_between(part)
            where = {"block": block, "group": group, "start": start, "column": before}
            yield Place(rows=rows, columns=r, **where, scale=update.scale, is_b=True)
            before += r

    def _columns(self, of_b: Tensor) -> list[Tensor]:
        """Of ``[out_features, rank]``, each part's ``[out_features, r]``, most of whose rows are other parts'."""
        return list(of_b.split([update.r for update in self.updates.values()], dim=1))

    def merged_weight(self) -> Tensor:
        """The weight that gives the adapted output: ``[out_features, in_features]``, fp32, whole on every rank."""
        if self.scale is not None:
            raise ValueError(
                "the weights under these adapters were rounded to float8 (lora.base_dtype); fold the saved adapter "
                "into the original checkpoint instead: automodel merge"
            )
        names = list(self.lora_A)
        a, b = _factors(
            self,
            [whole(self.lora_A[name]).float() for name in names],
            {part: whole(value).float() for part, value in self.lora_B.items()},
        )
        weight = whole(self.weight)
        merged = weight.float() + b @ a
        if self.dora:
            magnitudes = {part: whole(value) for part, value in self.lora_magnitude.items()}
            merged *= self._factor(weight, a, b, magnitudes).float().unsqueeze(1)
        return merged

    def _factor(self, weight: Tensor, a: Tensor, b: Tensor, magnitudes: Mapping[str, Tensor]) -> Tensor:
        """DoRA's factor per row, ``[out_features]``: magnitude over norm, one for parts that are not targeted."""
        with torch.no_grad():
            norm = torch.linalg.vector_norm(torch.addmm(weight.float(), b.float(), a.float()), dim=1)
            if weight.shape[1] < self.in_features:  # this rank's columns
                squares = norm.square()
                dist.all_reduce(squares, group=self.column_ranks)
                norm = squares.sqrt()
        # rounded as the magnitudes are, so that an adapter that has learnt nothing is an exact no-op in bf16 too
        norm = norm.to(next(iter(magnitudes.values())).dtype)
        if self.fusion is None:
            return magnitudes[self.parts[0]] / norm
        norms = zip(self.parts, self.fusion.split(norm), strict=True)
        return self.fusion.fuse(
            [magnitudes[part] / n if part in magnitudes else torch.ones_like(n) for part, n in norms]
        )

    def extra_repr(self) -> str:
        """torch's line for a linear layer, and the adapters."""
        ranks = ", ".join(f"{part} r={update.r}" for part, update in self.updates.items())
        return f"{super().extra_repr()}, {'DoRA' if self.dora else 'LoRA'}: {ranks}"


def _factors(layer: LoRALinear, a: Sequence[Tensor], b: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The update as one product: A ``[ranks, in]`` and B ``[out, ranks]`` in the fused rows, B times its scale."""
    stacked = layer.stacked(a)
    scaled = {part: value * layer.updates[part].scale for part, value in b.items()}
    if layer.fusion is None:
        return stacked, scaled[layer.parts[0]]
    columns, before = [], 0
    for part in layer.parts:
        if part not in scaled:
            columns.append(stacked.new_zeros(layer.rows(part), stacked.shape[0]))
        elif layer.share_a:
            columns.append(scaled[part])
        else:
            r = layer.updates[part].r
            columns.append(F.pad(scaled[part], (before, stacked.shape[0] - before - r)))
            before += r
    return stacked, layer.fusion.fuse(columns)

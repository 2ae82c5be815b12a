"""Which implementation serves attention, linear layers, norms and RoPE, chosen by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, cast

import torch
from torch import nn

from nemo_automodel.components.models.common.capabilities import (
    ATTENTIONS,
    BY_IMPLEMENTATION,
    Need,
    of_field,
    refuse,
    refuse_absent,
)
from nemo_automodel.components.models.common.norm import LayerNorm, NormSpec, RMSNorm
from nemo_automodel.components.models.common.te.float8 import TEFloat8
from nemo_automodel.components.models.common.te.modules import TELinear, te_norm

CHOICES: dict[str, tuple[Any, ...]] = {
    "attn": (*ATTENTIONS, "auto"),
    "linear": tuple(of_field("linear")),
    "rms_norm": tuple(of_field("rms_norm")),
    "rope_fusion": tuple(of_field("rope_fusion")),
    "kernels": ("auto", "torch"),
}


@dataclass(kw_only=True)
class BackendConfig:
    """Which implementation a model uses, field by field.

    Attributes:
        attn: attention, by its name in `capabilities.TABLE`: ``"sdpa"`` (torch), ``"flex"`` (torch flex attention),
            ``"varlen"`` (torch's, for packed documents, without a mask: CUDA, half precision, no cache), ``"flash2"``,
            ``"flash3"``, ``"flash4"`` (FlashAttention's packages), ``"te"`` (Transformer Engine) or ``"eager"``.
            ``"auto"`` is ``"sdpa"`` until who builds the model knows its data: `automodel train`, which has it for a
            default, takes the fastest that runs: for packed documents FlashAttention 4 or 3, Transformer Engine's or
            varlen, for whole rows FlashAttention 3 or 4, or sdpa.
            An ``attn_implementation`` given to ``from_pretrained`` decides before this field does.
        linear: what `initialize_linear_module` builds, ``"torch"`` or ``"te"``.
        rms_norm: what `initialize_rms_norm_module` builds: ``"torch"`` (statistics in fp32, one cast at the end),
            ``"torch_fp32"`` (the weight, too, is multiplied in fp32) or ``"te"``.
        rope_fusion: use a fused RoPE kernel (needs Transformer Engine).
        kernels: ``"auto"``: the library's own Triton kernels (gated activation, QKV split with RoPE, residual with
            norm, adapters, loss) where they can run, on a GPU; ``"torch"``: torch's operations only.

    Raises:
        ValueError: a value that is not one of the above; the message names the field.
        ImportError: the chosen backend's package is not installed; the message has the install line.
    """

    attn: Literal["sdpa", "flex", "varlen", "flash2", "flash3", "flash4", "te", "eager", "auto"] = field(
        default="sdpa",
        metadata={"help": "attention; auto: the fastest that runs, varlen or better for packed documents, else sdpa"},
    )
    linear: Literal["torch", "te"] = field(default="torch", metadata={"help": "linear layers"})
    rms_norm: Literal["torch", "torch_fp32", "te"] = field(default="torch", metadata={"help": "RMSNorm"})
    rope_fusion: bool = field(default=False, metadata={"help": "fused RoPE kernel"})
    kernels: Literal["auto", "torch"] = field(
        default="auto", metadata={"help": "the library's own kernels where they run, or torch's operations only"}
    )

    te_fp8: TEFloat8 | None = field(
        default=None, metadata={"help": "Transformer Engine's float8 products; set any key (or {}) to turn it on"}
    )

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
                raise ValueError(f"backend.{name}={value!r} is not one of {', '.join(map(repr, choices))}")
            refuse_absent(name, value)
        if self.te_fp8 is not None and self.linear != "te":
            raise ValueError(
                "backend.te_fp8 is a recipe for Transformer Engine's linear layers, and "
                f"backend.linear={self.linear!r}: set backend.linear='te', or leave te_fp8 out"
            )

    @classmethod
    def of(cls, value: "BackendConfig | Mapping[str, Any] | None") -> Self:
        """A `BackendConfig` from one, from a dict (as YAML gives it) or from None (the defaults).

        Raises:
            ValueError: an unknown field, by name.
            TypeError: any other type of value.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"backend must be a BackendConfig or a dict, not {type(value).__name__}")
        _refuse_unknown("backend", cls, value)
        if isinstance(float8 := value.get("te_fp8"), Mapping):  # as YAML gives it
            _refuse_unknown("backend.te_fp8", TEFloat8, float8)
            value = {**value, "te_fp8": TEFloat8(**float8)}
        return cls(**value)

    def apply_to(self, config: Any, attn_implementation: str | None = None) -> Self:
        """Write the attention implementation into a transformers config.

        ``"sdpa"`` and ``"auto"`` write nothing: what the config names stays, and where it names none transformers
        takes sdpa for the classes that have it.

        Args:
            config: a ``PreTrainedConfig``; changed in place.
            attn_implementation: transformers' name of one; decides before ``attn`` and before the config.

        Returns:
            The backend to build the model with: applied once more, it does not undo ``attn_implementation``.
        """
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
            known = BY_IMPLEMENTATION.get(attn_implementation, ATTENTIONS["sdpa"])
            return replace(self, attn=cast(Any, known.name))
        if self.attn not in ("sdpa", "auto"):
            config._attn_implementation = ATTENTIONS[self.attn].implementation
        return self


def _refuse_unknown(path: str, kind: type[Any], value: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise ValueError(f"{path}.{unknown[0]} is not a field of {kind.__name__}: {', '.join(sorted(known))}")


def initialize_rms_norm_module(
    rms_norm_impl: str,
    dim: int,
    eps: float = 1e-5,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """An RMSNorm over the last dimension.

    Args:
        rms_norm_impl: ``"torch"``, ``"torch_fp32"`` or ``"te"`` (see `BackendConfig`).
        dim: size of the last dimension; the weight has shape ``[dim]`` and starts at one.
        eps: added to the mean square.
        device: where the weight lives (default: torch's current default device).
        dtype: the weight's dtype (default: torch's default dtype).

    Raises:
        ValueError: an unknown implementation.
    """
    if rms_norm_impl not in CHOICES["rms_norm"]:
        raise ValueError(f"rms_norm_impl={rms_norm_impl!r} is not one of {CHOICES['rms_norm']}")
    if rms_norm_impl == "te":
        norm = te_norm(NormSpec(), dim, eps, device=device, dtype=dtype)
        assert norm is not None
        return norm
    return RMSNorm(dim, eps=eps, fp32=rms_norm_impl == "torch_fp32", device=device, dtype=dtype)


def initialize_norm_module(
    rms_norm_impl: str, spec: NormSpec, dim: int | tuple[int, ...], eps: float = 1e-5
) -> nn.Module:
    """A norm over the last dimension, of the kind that ``spec`` says.

    Args:
        rms_norm_impl: as for `initialize_rms_norm_module`, which builds the plain kind.
        spec: the kind.
        dim: shape of the weight; a pair is a weight for each head.
        eps: added to the mean square, or to the variance.

    Raises:
        ValueError: an implementation that does not have this kind.
    """
    if spec == NormSpec() and isinstance(dim, int):
        return initialize_rms_norm_module(rms_norm_impl, dim, eps=eps)
    if rms_norm_impl == "te" and (norm := te_norm(spec, dim, eps)) is not None:
        return norm
    weights = "" if isinstance(dim, int) else ", with a weight for each head"
    refuse(of_field("rms_norm")[rms_norm_impl], Need(kind=f"{spec}{weights}"))
    fp32 = spec.fp32 or rms_norm_impl == "torch_fp32"
    kind = RMSNorm if spec.kind == "rms" else LayerNorm
    return kind(dim, eps=eps, fp32=fp32, bias=spec.bias, offset=spec.offset, initial=spec.initial)


def initialize_linear_module(
    linear_impl: str,
    in_features: int,
    out_features: int,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A linear layer ``[..., in_features] -> [..., out_features]``.

    Args:
        linear_impl: ``"torch"`` or ``"te"`` (see `BackendConfig`).
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to add a bias.
        device: where the parameters live (default: torch's current default device).
        dtype: the parameters' dtype (default: torch's default dtype).

    Raises:
        ValueError: an unknown implementation.
    """
    if linear_impl not in CHOICES["linear"]:
        raise ValueError(f"linear_impl={linear_impl!r} is not one of {CHOICES['linear']}")
    kind = TELinear if linear_impl == "te" else nn.Linear
    return kind(in_features, out_features, bias=bias, device=device, dtype=dtype)

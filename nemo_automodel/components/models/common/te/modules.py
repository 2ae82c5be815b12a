"""Linear layers and norms that are this library's to everybody, and computed by Transformer Engine."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_automodel.components.models.common.norm import LayerNorm, NormSpec, RMSNorm
from nemo_automodel.components.models.common.te.engine import Engine, package, refuse_off_gpu
from nemo_automodel.components.models.common.te.float8 import MULTIPLE, TEFloat8


def _linear(in_features: int, out_features: int, bias: bool) -> nn.Module:
    made: nn.Module = package("pytorch").Linear(in_features, out_features, bias=bias, device="meta")
    return made


def _norm(kind: str, dim: int, eps: float, offset: bool) -> nn.Module:
    made: nn.Module = getattr(package("pytorch"), kind)(dim, eps=eps, zero_centered_gamma=offset, device="meta")
    return made


class TELinear(nn.Linear):
    """torch's to whoever holds it; Transformer Engine multiplies.

    Attributes:
        float8: how operands are scaled; None: they are not, but for a recipe that the caller is inside of.
        no_adapters: why it takes none.
    """

    no_adapters = (
        "adapters ride in this library's own products, and these layers are Transformer Engine's: use "
        "backend.linear='torch' with lora"
    )

    def __init__(self, *args: Any, float8: TEFloat8 | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.float8 = float8
        # of this rank's shards, where there are several: Transformer Engine reads the sizes off the weight
        self._engine = Engine(partial(_linear, self.in_features, self.out_features, self.bias is not None))

    @classmethod
    def around(cls, linear: nn.Linear, float8: TEFloat8 | None = None) -> "TELinear":
        """One with the parameters of ``linear``, the same ones."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", float8=float8)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``."""
        if self.float8 is None:
            return self._product(input)
        refuse_off_gpu(input)  # before the recipe does
        rows = input.reshape(-1, input.shape[-1])
        more = -len(rows) % MULTIPLE
        with self.float8.multiplying():
            made = self._product(F.pad(rows, (0, 0, 0, more)) if more else rows)
        return made[: len(rows)].view(*input.shape[:-1], made.shape[-1])

    def _product(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return self._engine(x, weight=self.weight)
        return self._engine(x, weight=self.weight, bias=self.bias)

    @torch.no_grad()  # with gradients, leaving the recipe would push the history on
    def float8_state(self) -> dict[str, Tensor]:
        """Scales ``[n]`` and histories ``[steps, n]``, fp32, of a recipe that looks back: the tensors themselves."""
        if self.float8 is None or not self.float8.looks_back:
            return {}
        made = self._engine.made()
        with self.float8.multiplying():
            made.init_fp8_metadata()  # which does nothing after the first time
        return {
            f"{what}_{way}": getattr(made.fp8_meta[f"scaling_{way}"], what)
            for way in ("fwd", "bwd")
            for what in ("scale", "amax_history")
        }


class TERMSNorm(RMSNorm):
    """`RMSNorm`, computed by Transformer Engine: in fp32, the weight too, and rounded once."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._engine = Engine(partial(_norm, "RMSNorm", len(self.weight), self.eps, bool(self.offset)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normed(self, hidden_states)

    def in_kernels(self, hidden_states: Tensor) -> bool:
        """No: not in this library's."""
        return False


class TELayerNorm(LayerNorm):
    """`LayerNorm`, computed by Transformer Engine: in fp32, weight and bias too, and rounded once."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._engine = Engine(partial(_norm, "LayerNorm", len(self.weight), self.eps, bool(self.offset)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normed(self, hidden_states)


def _normed(norm: TERMSNorm | TELayerNorm, x: Tensor) -> Tensor:
    parameters: dict[str, Any] = {name: tensor for name, tensor in norm._parameters.items() if tensor is not None}
    if isinstance(norm, LayerNorm) and norm.bias is None:  # which Transformer Engine always adds
        parameters["bias"] = torch.zeros_like(parameters["weight"], requires_grad=False)
    # computed in the weight's dtype, whatever that of x is
    return norm._engine(x, **parameters).to(x.dtype)


def te_norm(spec: NormSpec, dim: int | tuple[int, ...], eps: float, **options: Any) -> TERMSNorm | TELayerNorm | None:
    """Of that kind; None where Transformer Engine has none: a weight for each head, an offset other than one."""
    if not isinstance(dim, int) or spec.offset not in (0.0, 1.0):
        return None
    kind = TERMSNorm if spec.kind == "rms" else TELayerNorm
    return kind(dim, eps=eps, fp32=True, bias=spec.bias, offset=spec.offset, initial=spec.initial, **options)


def use_te_linears(model: nn.Module, float8: TEFloat8 | None = None) -> None:
    """Let Transformer Engine multiply in every linear layer of ``model``, whose parameters stay the same ones.

    Raises:
        ValueError: a width that float8 does not take, or a pattern in ``float8.keep`` that matches nothing.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = float8.kept(list(linears)) if float8 is not None else set()
    for name, linear in linears.items():
        if name in kept:
            continue
        if float8 is not None and (odd := [width for width in linear.weight.shape if width % MULTIPLE]):
            raise ValueError(
                f"{name} has {odd[0]} channels, and products in float8 take multiples of {MULTIPLE}: name it in "
                "te_fp8.keep"
            )
        model.set_submodule(name, TELinear.around(linear, float8))


def float8_state(model: nn.Module) -> dict[str, Tensor]:
    """What recipes that look back have seen: ``te_fp8.<layer>.<what>`` -> the tensor itself, to be saved or filled."""
    return {
        f"te_fp8.{name}.{what}": tensor
        for name, module in model.named_modules()
        if isinstance(module, TELinear)
        for what, tensor in module.float8_state().items()
    }

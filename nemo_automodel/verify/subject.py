"""The implementation and its reference holding the same random weights, in any dtype."""

import copy
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nemo_automodel.components.layout import Layout
from nemo_automodel.components.peft import layout_of
from nemo_automodel.verify.exact import Exact
from nemo_automodel.verify.names import call_as_stored, stored_name
from nemo_automodel.verify.shrink import LENGTH
from nemo_automodel.verify.target import Target

_SEED = 0


class Subject:
    """A target's tiny model, in the hands of the checks.

    Every model that it gives out is new, in evaluation mode, and holds the weights of one checkpoint that
    transformers' ``save_pretrained`` wrote. Use it as a context manager: the checkpoint is removed at the end.

    Args:
        target: what is verified.
        device: where the models run.
    """

    def __init__(self, target: Target, device: torch.device | str = "cpu"):
        self.target = target
        self.device = torch.device(device)
        self._folder = tempfile.TemporaryDirectory(prefix="automodel-verify-")

    def __enter__(self) -> Self:
        assert self.checkpoint.is_dir()  # written now: in the midst of a check's `Exact` it would be in float64
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    @property
    def config(self) -> PreTrainedConfig:
        """The tiny config."""
        return self.target.tiny

    @cached_property
    def scratch(self) -> Path:
        """A folder for what checks write."""
        folder = Path(self._folder.name) / "scratch"
        folder.mkdir()
        return folder

    @cached_property
    def checkpoint(self) -> Path:
        """A Hugging Face folder of the reference with random weights in float32, none of them trivial."""
        folder = Path(self._folder.name) / "checkpoint"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            config = copy.deepcopy(self.config)
            config.dtype = torch.float32
            model = randomize(self.target.reference_class(config).float())
        model.save_pretrained(folder)
        return folder

    def reference(self, dtype: torch.dtype = torch.float32, attn: str = "eager", **config: Any) -> Any:
        """The reference, loaded by transformers."""
        model = self.target.reference_class.from_pretrained(
            self.checkpoint, dtype=dtype, attn_implementation=attn, **config
        )
        return call_as_stored(model.to(self.device).eval(), self.layout)

    @cached_property
    def layout(self) -> Layout:
        """The implementation's table of names and rows."""
        with torch.device("meta"):
            return layout_of(self.target.model_class(copy.deepcopy(self.config)))

    def ours(self, dtype: torch.dtype = torch.float32, attn: str = "eager", **options: Any) -> Any:
        """The implementation, loaded through its own ``from_pretrained``."""
        return self.target.model_class.from_pretrained(
            self.checkpoint, dtype=dtype, attn_implementation=attn, device=self.device, **options
        )

    def tokens(self, batch: int = 2, length: int = LENGTH, seed: int = _SEED) -> Tensor:
        """Random token ids ``[batch, length]`` that are no special ones."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(5, self.config.vocab_size, (batch, length), generator=generator).to(self.device)

    @cached_property
    def truth(self) -> "Step":
        """The reference's training step on the standard sample, in float64."""
        with Exact():
            return step(self.reference(torch.float64), self.tokens())

    def takes(self, attn: str) -> bool:
        """Whether the implementation says that it supports that attention."""
        flag = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}[attn]
        return bool(getattr(self.target.model_class, flag, False))


class Step:
    """Logits, loss and gradients of one training step; gradients have the checkpoint's names."""

    def __init__(self, logits: Tensor, loss: Tensor, gradients: dict[str, Tensor]):
        self.logits, self.loss, self.gradients = logits, loss, gradients

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {"logits": self.logits, "loss": self.loss[None], **{f"grad {k}": v for k, v in self.gradients.items()}}


def step(model: Any, ids: Tensor, **inputs: Any) -> Step:
    """Forward with ``ids`` as labels, and backward.

    Raises:
        ValueError: a parameter got no gradient.
    """
    model.zero_grad()
    outputs = model(input_ids=ids, **{"labels": ids, "use_cache": False, **inputs})
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    if absent := [name for name, gradient in gradients.items() if gradient is None]:
        raise ValueError(f"{absent[0]} takes no part in the loss: it has no gradient")
    if hasattr(model, "state_dict_adapter"):
        gradients = model.state_dict_adapter.to_hf(gradients)
    gradients = {stored_name(model, name): gradient for name, gradient in gradients.items()}
    return Step(outputs.logits.detach(), outputs.loss.detach(), gradients)


@torch.no_grad()
def randomize(model: Any) -> Any:
    """Give every parameter random values such that no term of the forward pass is invisible.

    Matrices keep the scale of their input, so that scores differ and a softmax is neither flat nor one-hot. Vectors
    (norm weights, biases) are spread around what the class starts them at: ones, or zeros where a norm multiplies by
    1 + weight. Embeddings are small, so that an epsilon beside their mean square shows.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float32)
        if id(parameter) in embeddings:
            parameter.copy_(noise * 0.05)
        elif parameter.ndim >= 2:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.3 * noise)
    return model

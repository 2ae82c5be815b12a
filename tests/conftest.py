"""What the model tests share: tiny configs, random weights that hide nothing, the comparison with transformers."""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from nemo_automodel._transformers import registry
from nemo_automodel.components.kernels import launch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and test processes share the cores

VOCAB = 61
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Model = TypeVar("Model", bound=nn.Module)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_where_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TRITON_INTERPRET=1 the kernels could run on the CPU everywhere, slowly."""
    if request.node.get_closest_marker("interpreted") is None:
        monkeypatch.setattr(launch, "INTERPRETED", False)


def tiny(config_class: type[PreTrainedConfig] = LlamaConfig, attn: str | None = None, **changes: Any) -> Any:
    """A config that builds in milliseconds; ``attn`` names the attention implementation."""
    config = config_class(**{**TINY, **changes})
    if attn is not None:
        config._attn_implementation = attn
    return config


def randomize(model: Model, seed: int = 0) -> Model:
    """Give every parameter random values: norm weights around one, biases too, so that no term is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(values + 1 if parameter.ndim == 1 and name.endswith("weight") else values)
    return model


def twins(hf_class: Any, config: PreTrainedConfig, seed: int = 0, **kwargs: Any) -> tuple[Any, Any]:
    """transformers' model with random weights, and the registered class holding the same, both in eval mode."""
    hf = randomize(hf_class(copy.deepcopy(config)), seed)
    ours = registry.resolve(hf_class.__name__)(copy.deepcopy(config), **kwargs)
    state = hf.state_dict()
    if ours.state_dict_adapter.layout.ambiguous:
        state = ours.state_dict_adapter.from_hf(state)
    ours.load_state_dict(state)
    return hf.eval(), ours.eval()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, none of them a special one."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, expected: Tensor, atol: float = 1e-5, what: str = "") -> None:
    """Equal within ``atol``, relative to the largest value where that is above one: fp32 rounds relatively."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol * scale, msg=lambda text: f"{what}: {text}")


def assert_same_gradients(ours: PreTrainedModel, hf: PreTrainedModel, atol: float = 1e-5) -> None:
    """Every gradient, under Hugging Face's names; none may be missing or vanish."""
    own = {name: parameter.grad for name, parameter in ours.named_parameters()}
    actual: Mapping[str, Tensor] = ours.state_dict_adapter.to_hf(own)
    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, f"{name}: a gradient of zero proves nothing"
        assert_near(actual[name], gradient, atol, what=name)


def assert_same_step(hf: Any, ours: Any, real: Tensor | None = None, atol: float = 1e-5, **inputs: Any) -> None:
    """Logits (at ``real`` positions, default all), loss and every gradient of one backward pass."""
    expected, actual = hf(**inputs), ours(**inputs)
    real = torch.ones(expected.logits.shape[:2], dtype=torch.bool) if real is None else real.bool()
    assert_near(actual.logits[real], expected.logits[real], atol, what="logits")
    assert_near(actual.loss, expected.loss, atol, what="loss")
    for model, outputs in ((hf, expected), (ours, actual)):
        model.zero_grad()
        outputs.loss.backward()
    assert_same_gradients(ours, hf, atol)


def uncompiled(attn: str) -> AbstractContextManager[Any]:
    """Flex attention without its compiler, which takes half a minute; backward is not there on the CPU at all."""
    return torch.compiler.set_stance("force_eager") if attn == "flex_attention" else nullcontext()

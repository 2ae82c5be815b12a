"""Operators are called as such where somebody looks, and else as the functions that they are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_automodel.components.kernels.launch import called_directly

calls: list[str] = []


@torch.library.custom_op("nemo_automodel_tests::twice", mutates_args=())
def registered(x: Tensor) -> Tensor:
    calls.append("operator")
    return x * 2


@registered.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def function(x: Tensor) -> Tensor:
    """Twice."""
    calls.append("function")
    return x * 2


twice = called_directly(registered, function)


class Seen(TorchDispatchMode):
    """The names of operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_called() -> None:
    calls.clear()


def test_where_nobody_looks_the_function_is_called() -> None:
    x = torch.tensor([1.5], requires_grad=True)
    with torch.no_grad():
        assert twice(x).tolist() == [3.0]
    assert calls == ["function"]
    assert (twice.__name__, twice.__doc__) == ("function", "Twice.")


def test_a_mode_sees_the_operator() -> None:
    """Selective checkpointing chooses by its name, tensors without memory are computed by its fake."""
    with torch.no_grad(), Seen() as seen:
        assert twice(torch.tensor([1.5])).tolist() == [3.0]
    assert "nemo_automodel_tests::twice" in seen.names
    assert calls == ["operator"]


def test_where_gradients_are_asked_for_it_is_the_operator() -> None:
    assert twice(torch.tensor([1.5])).tolist() == [3.0]
    assert calls == ["operator"]


def test_a_compiler_sees_the_operator() -> None:
    targets: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        assert torch.compile(twice, fullgraph=True, backend=backend)(torch.tensor([1.5])).tolist() == [3.0]
    assert any("nemo_automodel_tests.twice" in str(target) for target in targets)
    assert calls == ["operator"]

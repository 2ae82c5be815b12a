"""Triton's interpreter, for the tests marked so."""

from typing import Any

import numpy as np
import pytest
import torch

from nemo_automodel.components.kernels import launch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`test_interpreted` runs them: ``-m slow`` by itself takes none of them."""
    if launch.INTERPRETED or "interpreted" in config.option.markexpr:
        return
    others = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("interpreted") is None:
        return
    if not launch.INTERPRETED:
        pytest.fail("set TRITON_INTERPRET=1, as `test_interpreted` does")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, dtype: Any) -> Any:
        """To the nearest, as on a GPU: by itself the interpreter cuts bf16's digits off, which errs twice as much."""
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return TensorHandle(bits.numpy().reshape(source.data.shape), dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)

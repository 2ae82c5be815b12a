"""Sums of squares over many tensors, interpreted and by torch: against float64."""

import pytest
import torch

from nemo_automodel.components.kernels.squares import BLOCK, launch, sum_of_squares

SIZES = (1, 7, BLOCK, BLOCK + 1000, 3 * BLOCK - 1)


def tensors(dtype: torch.dtype, offset: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(offset + n).to(dtype)[offset:] * (1 + i) for i, n in enumerate(SIZES)]


def exact(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.double().square().sum() for value in values]).sum()


@pytest.mark.interpreted
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel(dtype: torch.dtype, offset: int) -> None:
    values = tensors(dtype, offset)
    torch.testing.assert_close(launch(values, dtype == torch.bfloat16, offset == 0), exact(values), rtol=2e-6, atol=0)


def test_what_the_kernel_does_not_take() -> None:
    values = [*tensors(torch.float16, 1), *tensors(torch.float32, 0), torch.empty(0), torch.randn(5, 7).t()]
    torch.testing.assert_close(sum_of_squares(values), exact(values), rtol=2e-6, atol=0)
    assert sum_of_squares([torch.empty(0)]) == 0
    assert sum_of_squares([torch.tensor([1.0, float("nan")])]).isnan()

"""All adapters of a layer into one place and their gradients back, interpreted: against plain indexing."""

import pytest
import torch
from torch import Tensor

from nemo_automodel.components.kernels.low_rank import BLOCK, Place, add_product, pack, unpack

pytestmark = pytest.mark.interpreted

WIDTH = 37
PLACES = (
    Place(rows=3, columns=WIDTH, block=3, group=3),
    Place(rows=16, columns=WIDTH, block=16, group=16, start=3),
    Place(rows=24, columns=3, block=6, group=10, column=0, scale=2.0, is_b=True),
    Place(rows=16, columns=16, block=4, group=10, start=6, column=3, scale=0.3, is_b=True),
)
"""Two parts of a projection of 40 rows, in turn by 6 and 4."""


def places_of(place: Place) -> tuple[Tensor, slice]:
    """Rows and columns, from what `Place` says."""
    i = torch.arange(place.rows)
    rows = i // place.block * place.group + place.start + i % place.block
    return rows, slice(place.column, place.column + place.columns)


def parameters(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(place.rows, place.columns).to(dtype) for place in PLACES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack(dtype: torch.dtype) -> None:
    given = parameters(dtype)
    around = torch.full((40, 50), 7.0, dtype=dtype)
    all_a, all_b = torch.empty(19, WIDTH, dtype=dtype), around[:, 20:39]
    expected_a, expected = all_a.clone(), around.clone()
    for parameter, place in zip(given, PLACES, strict=True):
        rows, columns = places_of(place)
        target = expected[:, 20:39] if place.is_b else expected_a
        target[rows, columns] = (parameter.float() * place.scale).to(dtype)
    pack(given, PLACES, all_a, all_b)
    assert torch.equal(all_a, expected_a)
    assert torch.equal(around, expected)
    assert (all_b == 7).any()  # where parts do not meet


@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack(dtype: torch.dtype, with_columns: bool) -> None:
    torch.manual_seed(0)
    all_a, all_b = torch.randn(19, WIDTH), torch.randn(40, 25).to(dtype)[:, 3:22]
    weight = torch.randn(WIDTH).to(dtype) if with_columns else None
    found = unpack(all_a, all_b, PLACES, weight, 1.0, all_b)
    for gradient, place in zip(found, PLACES, strict=True):
        rows, columns = places_of(place)
        expected = (all_b if place.is_b else all_a)[rows, columns].float() * place.scale
        if weight is not None and not place.is_b:
            expected = expected * (weight.float() + 1.0)
        assert gradient.dtype == dtype
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, expected.to(dtype), rtol=2**-8, atol=0)


def test_parameters_of_several_programs_and_none() -> None:
    wide = BLOCK + 5
    places = (Place(rows=2, columns=wide, block=2, group=2), Place(rows=0, columns=3, block=1, group=1, is_b=True))
    given = [torch.randn(2, wide), torch.empty(0, 3)]
    all_a, all_b = torch.empty(2, wide), torch.zeros(0, 3)
    pack(given, places, all_a, all_b)
    assert torch.equal(all_a, given[0])
    (of_a, of_b) = unpack(all_a, all_b, places, None, 0.0, all_a)
    assert torch.equal(of_a, given[0])
    assert of_b.shape == (0, 3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rank", [5, 129])
def test_add_product_to_what_is_not_rounded_yet(rank: int, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(70, 300)
    left, right, bias = (torch.randn(shape).bfloat16() for shape in ((70, rank), (rank, 300), (300,)))
    exact = x.double() + left.double() @ right.double() + (bias.double() if biased else 0.0)
    out = add_product(x, left, right, torch.empty(70, 300, dtype=torch.bfloat16), bias if biased else None)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)  # one rounding, and fp32 sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "rank"), [(1, 1, 1), (70, 300, 5), (65, 128, 48), (3, 9, 129), (0, 8, 4)])
def test_add_product(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    """No further from float64 than torch's; from rows that lie apart, by a turned matrix; what lies around stays."""
    torch.manual_seed(0)
    around = torch.randn(rows, width + 8).to(dtype)
    left, right = torch.randn(rows, rank + 3).to(dtype)[:, :rank], torch.randn(width, rank + 3).to(dtype)[:, :rank].t()
    exact = around.double()
    exact[:, 3:-5] += left.double() @ right.double()
    theirs = around.clone()
    theirs[:, 3:-5].addmm_(left, right)
    other = add_product(around[:, 3:-5], left, right, torch.empty(rows, width, dtype=dtype))
    add_product(around[:, 3:-5], left, right, around[:, 3:-5])
    assert torch.equal(around[:, 3:-5], other)
    assert torch.equal(around[:, :3], theirs[:, :3])
    assert torch.equal(around[:, -5:], theirs[:, -5:])
    ours, torchs = ((x.double() - exact).norm().item() for x in (around, theirs))
    assert ours <= 1.05 * torchs + 1e-6 * exact.norm().item()  # fp32 sums in other orders

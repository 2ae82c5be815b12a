"""Queries and keys split off and turned, interpreted: against float64, whatever the launch is."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nemo_automodel.components.kernels import qkv_rope as kernels
from nemo_automodel.components.kernels.qkv_rope import HeadNorms, split_and_turn, split_and_turn_reference
from tests.components.kernels.cases import (
    BF16,
    FP32,
    assert_equal,
    assert_graph_rules,
    assert_near,
    assert_noticed,
    rope_case,
)

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For which the interpreter takes its time; more of them: below."""
    monkeypatch.setattr(kernels, "TOKENS", 8)


def test_the_reference_is_transformers() -> None:
    case = rope_case(2, 5, 3, 2, 8, dtype=FP32, shared=False)
    qkv, cos, sin = (x.double() for x in case.inputs)
    q, k, v = split_and_turn_reference(qkv, cos, sin, 2, 8)
    groups = qkv.view(2, 5, 3, 32)  # a group: two queries, key, value, of eight channels
    queries = groups[..., :16].reshape(2, 5, 6, 8).transpose(1, 2)
    keys, values = (groups[..., at : at + 8].transpose(1, 2) for at in (16, 24))
    for actual, expected in zip((q, k), apply_rotary_pos_emb(queries, keys, cos, sin), strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.equal(v, values)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("group", range(1, 9))
def test_groups(group: int, dtype: torch.dtype) -> None:
    assert_near(rope_case(1, 5, 1 + (group < 3), group, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("head_dim", "rotary"), [(64, 64), (80, 80), (80, 32), (96, 96), (96, 22), (128, 64), (256, 256), (8, 2)]
)
def test_heads(head_dim: int, rotary: int, dtype: torch.dtype) -> None:
    assert_near(rope_case(2, 5, 1, 1, head_dim, rotary, dtype=dtype))
    assert_near(rope_case(2, 2, 1, 2, head_dim, rotary, shared=False, strided=True, dtype=dtype))


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 1), (1, 9), (0, 3), (2, 0)])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_shapes(batch: int, sequence: int, shared: bool) -> None:
    assert_near(rope_case(batch, sequence, 2, 2, 8, 6, shared=shared, dtype=FP32))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("head_dim", "rotary", "group"), [(64, 64, 2), (80, 32, 1)])
def test_norms_of_heads(head_dim: int, rotary: int, group: int, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights' gradients are sums over programs that take several blocks of tokens each, the last one in part."""
    monkeypatch.setattr(kernels, "PARTIAL_SUMS", 2)
    qkv, cos, sin = rope_case(2, 11, 2, group, head_dim, rotary, dtype=FP32).inputs
    weights = [torch.randn(head_dim) for _ in range(2)]
    given = [x.detach().requires_grad_() for x in (qkv, *weights)]
    exact = [x.detach().double().requires_grad_() for x in given]
    outputs = split_and_turn(given[0], cos, sin, group, head_dim, HeadNorms(*given[1:], 1e-6, offset))
    expected = split_and_turn_reference(
        exact[0], cos.double(), sin.double(), group, head_dim, HeadNorms(*exact[1:], 1e-6, offset)
    )
    gradients = [torch.randn_like(output) for output in outputs]
    actual = torch.autograd.grad(outputs, given, gradients)
    reference = torch.autograd.grad(expected, exact, [gradient.double() for gradient in gradients])
    for one, other in zip((*outputs, *actual), (*expected, *reference), strict=True):
        assert (one - other).norm() < 1e-6 * other.norm()  # fp32 operations, a dozen roundings of 6e-8


def test_tables_in_fp32_beside_bf16() -> None:
    case = rope_case(2, 5, 2, 2, 16, dtype=FP32)
    qkv, cos, sin = case.inputs
    case.inputs = [qkv.detach().bfloat16().requires_grad_(), cos, sin]
    assert_near(case)


def test_tables_with_strides() -> None:
    case = rope_case(3, 2, 1, 2, 16, dtype=FP32)
    expected = case.outcome(case.kernel, case.inputs)
    qkv, *tables = case.inputs
    for view in (
        lambda t: t.expand(3, -1, -1),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat((t, t), -1)[..., :16],
    ):
        assert_equal(case.outcome(case.kernel, [qkv, *map(view, tables)]), expected)


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_tokens_of_a_program_change_nothing(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = rope_case(2, 5, 1, 2, 8, 6, dtype=BF16)
    expected = case.outcome(case.kernel, case.inputs)
    monkeypatch.setattr(kernels, "TOKENS", tokens)
    assert_equal(case.outcome(case.kernel, case.inputs), expected)


def test_gradients_in_any_order_in_memory() -> None:
    case = rope_case(2, 3, 2, 2, 8, dtype=FP32)
    qkv = case.inputs[0]

    def gradient(*layout: int) -> torch.Tensor:
        outs = case.kernel(*case.inputs)
        grads = []
        for seed, out in enumerate(outs):
            dense = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
            there = [layout.index(i) for i in range(4)]
            grads.append(dense.permute(layout).contiguous().permute(there))
        return torch.autograd.grad(outs, qkv, grads)[0]

    expected = gradient(0, 1, 2, 3)
    for layout in ((0, 2, 1, 3), (3, 2, 1, 0)):
        assert torch.equal(gradient(*layout), expected)
    ones = torch.autograd.grad(outs := case.kernel(*case.inputs), qkv, [torch.ones_like(o) for o in outs])
    sums = torch.autograd.grad([o.sum() for o in case.kernel(*case.inputs)], qkv)  # whose strides are zero
    assert torch.equal(sums[0], ones[0])


@pytest.mark.parametrize("norms", [True, "frozen"])
@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (24, 22)])
def test_norms_of_heads_in_bf16(head_dim: int, rotary: int, norms: bool | str) -> None:
    case = rope_case(2, 5, 2, 2, head_dim, rotary, norms=norms, offset=1.0, strided=True, shared=False, dtype=BF16)
    assert_near(case)


def test_norms_of_heads_of_no_tokens() -> None:
    assert_near(rope_case(2, 0, 2, 2, 8, norms=True, dtype=FP32))


def test_a_norms_weight_that_changes_is_noticed() -> None:
    assert_graph_rules(rope_case(2, 3, 2, 1, 8, norms=True, dtype=FP32))
    assert_noticed(rope_case(2, 3, 2, 1, 8, norms=True, dtype=FP32), 3)
    assert_noticed(rope_case(2, 3, 2, 1, 8, norms=True, dtype=FP32), 4)


def test_queries_alone() -> None:
    case = rope_case(2, 5, 2, 2, 8, dtype=FP32)
    kernel, reference = case.kernel, case.reference
    case.kernel, case.reference = (lambda *x, f=f: f(*x)[0] for f in (kernel, reference))
    assert_near(case)


def test_the_rules_of_autograd() -> None:
    assert_graph_rules(rope_case(2, 3, 2, 1, 8, dtype=FP32))
    case = rope_case(2, 3, 2, 1, 8, dtype=FP32)
    out = case.kernel(*case.inputs)
    case.inputs[1].add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out[0].sum().backward()


def test_float64_goes_to_the_reference() -> None:
    case = rope_case(2, 3, 2, 1, 8, dtype=FP32)
    inputs = [x.double() for x in case.inputs]
    for actual, expected in zip(split_and_turn(*inputs, 1, 8), split_and_turn_reference(*inputs, 1, 8), strict=True):
        assert torch.equal(actual, expected)

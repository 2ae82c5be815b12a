"""The fused projections used directly, whole and cut into tensor-parallel shards."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from nemo_automodel.components.layout import GATE_UP
from nemo_automodel.components.models.common import CombinedGateUpMLP, CombinedQKVAttentionMixin
from tests.conftest import assert_near, randomize, tiny

HEADS = [(8, 8, 4), (8, 2, 4), (6, 2, 5), (4, 1, 3), (12, 4, 2)]


class Attention(CombinedQKVAttentionMixin, nn.Module):
    def __init__(self, heads: int, kv_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        self.setup_qkv_projection(
            hidden_size=16, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, bias=bias
        )


def shard(module: nn.Linear, rank: int, ranks: int) -> nn.Linear:
    """What ColwiseParallel leaves a rank: the rank-th of equal cuts of the rows."""
    cut = copy.deepcopy(module)
    cut.weight = nn.Parameter(module.weight.chunk(ranks)[rank])
    cut.bias = None if module.bias is None else nn.Parameter(module.bias.chunk(ranks)[rank])
    return cut


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_qkv_rows_are_grouped_by_kv_head(heads, kv_heads, head_dim, bias):
    attention = randomize(Attention(heads, kv_heads, head_dim, bias))
    projection, group = attention.qkv_proj, heads // kv_heads
    assert projection.weight.shape == ((heads + 2 * kv_heads) * head_dim, 16)
    assert (projection.bias is not None) == bias
    x = torch.randn(2, 5, 16)
    # the spec's picture, read literally: [Q_group | K | V] per KV head
    by_group = projection(x).view(2, 5, kv_heads, group + 2, head_dim)
    expected = by_group[..., :group, :], by_group[..., group, :], by_group[..., group + 1, :]
    for actual, want in zip(attention.compute_qkv(x), expected, strict=True):
        assert torch.equal(actual, want.reshape(2, 5, -1))
        assert actual.view(2, 5, -1, head_dim).stride(-1) == 1


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_qkv_on_shards_is_qkv_of_the_whole(heads, kv_heads, head_dim):
    attention = randomize(Attention(heads, kv_heads, head_dim, bias=True))
    x, whole, projection = torch.randn(3, 16), attention.compute_qkv(torch.zeros(1, 16)), attention.qkv_proj
    whole = attention.compute_qkv(x)
    for ranks in {1, 2, kv_heads} if kv_heads > 1 else {1}:
        pieces = []
        for rank in range(ranks):
            attention.qkv_proj = shard(projection, rank, ranks)
            pieces.append(attention.compute_qkv(x))
        attention.qkv_proj = projection
        for part, want in zip(zip(*pieces, strict=True), whole, strict=True):
            assert_near(torch.cat(part, -1), want)


def test_qkv_refusals():
    with pytest.raises(ValueError, match="num_attention_heads=6 is not a multiple of num_key_value_heads=4"):
        Attention(6, 4, 8)
    attention = Attention(4, 2, 8)
    attention.qkv_proj = nn.Linear(16, 48, bias=False)  # a cut through a group, as of a third rank
    with pytest.raises(ValueError, match="qkv_proj: 48 rows are not a whole number of groups of 32"):
        attention.compute_qkv(torch.randn(1, 16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_mlp_equals_transformers_and_its_shards_add_up(act, bias):
    config = tiny(hidden_act=act, mlp_bias=bias, intermediate_size=18)
    reference, mlp = randomize(LlamaMLP(config)), CombinedGateUpMLP(config)
    rows = torch.stack([reference.gate_proj.weight, reference.up_proj.weight], 1)  # gate_0, up_0, gate_1, up_1, ...
    state = {"gate_up_proj.weight": rows.flatten(0, 1), "down_proj.weight": reference.down_proj.weight}
    if bias:
        biases = torch.stack([reference.gate_proj.bias, reference.up_proj.bias], 1).flatten()
        state |= {"gate_up_proj.bias": biases, "down_proj.bias": reference.down_proj.bias}
    mlp.load_state_dict(state)
    x = torch.randn(2, 5, 32)
    assert_near(mlp(x), reference(x))

    total = 0 if mlp.down_proj.bias is None else mlp.down_proj.bias
    for rank in range(3):
        part = copy.deepcopy(mlp)
        part.gate_up_proj = shard(mlp.gate_up_proj, rank, 3)
        part.down_proj = nn.Linear(6, 32, bias=False)
        part.down_proj.weight = nn.Parameter(mlp.down_proj.weight.chunk(3, dim=1)[rank])
        total = total + part(x)
    assert_near(total, reference(x))


def test_mlp_config():
    config = SimpleNamespace(hidden_size=8, intermediate_size=5, hidden_act="silu")
    mlp = CombinedGateUpMLP(config)  # mlp_bias is optional
    assert mlp.gate_up_proj.bias is None
    assert mlp.down_proj.bias is None
    assert mlp.gate_up_proj.weight.shape == (10, 8)
    with pytest.raises(ValueError, match="hidden_act='swish-like' is not one of"):
        CombinedGateUpMLP(LlamaConfig(hidden_act="swish-like"))


def test_layout_writes_and_reads_parts_in_place():
    gate, up = torch.randn(5, 3), torch.randn(5, 3)
    fused = torch.empty(10, 3)
    GATE_UP.write_part(fused, "gate_proj", gate)
    GATE_UP.write_part(fused, "up_proj", up)
    assert torch.equal(fused, GATE_UP.fuse((gate, up)))
    assert torch.equal(GATE_UP.read_part(fused, "up_proj"), up)
    assert GATE_UP.part_shape(fused.shape, "up_proj") == (5, 3)

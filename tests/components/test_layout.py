"""`Fusion` and `Layout` against a slow reference that moves one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.layout import (
    GATE_UP,
    Fusion,
    Interleaved,
    Layout,
    PartKey,
    concatenated,
    interleaved,
    qkv_fusion,
    reordered,
    stored_as,
)

QKV = qkv_fusion(4, 2, 3)
LAYOUT = Layout((QKV, GATE_UP))

fusions = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda blocks: Fusion(fused="fused", parts=tuple(f"part_{i}" for i in range(len(blocks))), blocks=tuple(blocks))
)


def parts_of(fusion, groups, tail):
    """Parts whose every element differs from all others."""
    count, parts = 0, []
    for block in fusion.blocks:
        shape = (groups * block, *tail)
        size = torch.Size(shape).numel()
        parts.append(torch.arange(count, count + size).view(shape))
        count += size
    return parts


def fused_slowly(fusion, parts):
    rows, groups = [], len(parts[0]) // fusion.blocks[0]
    for group in range(groups):
        for part, block in zip(parts, fusion.blocks, strict=True):
            for row in range(block):
                rows.append(part[group * block + row])
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(fusion=fusions, groups=st.integers(1, 4), tail=st.sampled_from([(), (1,), (5,), (2, 3)]), data=st.data())
def test_every_way_in_and_out_agrees_with_the_slow_reference(fusion, groups, tail, data):
    parts = parts_of(fusion, groups, tail)
    fused = fusion.fuse(parts)
    assert torch.equal(fused, fused_slowly(fusion, parts))

    written = torch.full(fused.shape, -1.0)
    for name, part, back in zip(fusion.parts, parts, fusion.split(fused), strict=True):
        assert torch.equal(back, part)
        assert torch.equal(fusion.read_part(fused, name), part)
        assert fusion.part_shape(fused.shape, name) == tuple(part.shape)
        fusion.write_part(written, name, part)
    assert torch.equal(written, fused.float())

    # the output of a projection: the same rows, in the last dimension
    last = fused.unsqueeze(0).transpose(1, -1)
    for part, back in zip(parts, fusion.split(last, dim=-1), strict=True):
        assert torch.equal(back, part.unsqueeze(0).transpose(1, -1))

    # a shard of whole groups is split by the same rule: the group count comes from its shape
    first = data.draw(st.integers(0, groups - 1))
    shard = fused[first * fusion.group :]
    for part, block, back in zip(parts, fusion.blocks, fusion.split(shard), strict=True):
        assert torch.equal(back, part[first * block :])


def test_rows_as_the_spec_draws_them():
    assert QKV.fuse([torch.arange(12), torch.arange(20, 26), torch.arange(30, 36)]).tolist() == [
        *range(6), *range(20, 23), *range(30, 33), *range(6, 12), *range(23, 26), *range(33, 36),
    ]  # fmt: skip
    assert GATE_UP.fuse([torch.arange(3), torch.arange(10, 13)]).tolist() == [0, 10, 1, 11, 2, 12]


@pytest.mark.parametrize("prefix", ["", "model.layers.0.self_attn.", "base_model.model.layers.11.mlp.", "q_proj."])
@pytest.mark.parametrize(
    "tail",
    ["", ".weight", ".bias", ".base_layer.weight", ".lora_A.default.weight", ".lora_magnitude_vector.default.weight"],
)
@pytest.mark.parametrize("fusion", LAYOUT.fusions, ids=lambda fusion: fusion.fused)
def test_keys_are_found_both_ways(prefix, tail, fusion):
    own = prefix + fusion.fused + tail
    places = LAYOUT.hf_keys(own)
    assert list(places) == [prefix + part + tail for part in fusion.parts]
    for key, place in places.items():
        assert place == LAYOUT.locate(key)
        assert (place.own, place.fusion) == (own, fusion)
    assert [place.part for place in places.values()] == list(fusion.parts)


@pytest.mark.parametrize(
    "key",
    ["", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    + [f"model.{name}.weight" for name in ("xq_proj", "q_projx", "up_proj_norm", "my_gate_up_proj", "qkv_projection")],
)
def test_unrelated_names_stay(key):
    assert LAYOUT.locate(key) == PartKey(own=key)
    assert LAYOUT.hf_keys(key) == {key: PartKey(own=key)}


def test_own_names_stay_own():
    assert LAYOUT.locate("model.qkv_proj.weight") == PartKey(own="model.qkv_proj.weight")
    assert LAYOUT.fusion_of("model.layers.3.mlp.gate_up_proj") is GATE_UP
    assert LAYOUT.fusion_of("model.layers.3.mlp.down_proj") is None
    assert LAYOUT.fusion_of("gate_up_proj.lora_A") is None


ROWS = "qkv_proj: 13 rows are not a whole number of groups of 12"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QKV.fuse([torch.zeros(12), torch.zeros(6), torch.zeros(3)]), "q_proj 12, k_proj 6, v_proj 3"),
        (lambda: QKV.fuse([torch.zeros(12), torch.zeros(6), torch.zeros(7)]), "v_proj 7"),
        (lambda: QKV.fuse([torch.zeros(12), torch.zeros(6)]), "zip"),
        (lambda: QKV.split(torch.zeros(13)), ROWS),
        (lambda: QKV.split(torch.zeros(12, 13), dim=-1), ROWS),
        (lambda: QKV.read_part(torch.zeros(13), "q_proj"), ROWS),
        (lambda: QKV.part_shape((13, 2), "q_proj"), ROWS),
        (lambda: QKV.read_part(torch.zeros(12), "o_proj"), "not in tuple"),
        # these would broadcast into the rows
        (lambda: QKV.write_part(torch.zeros(12, 2), "k_proj", torch.zeros(3, 1)), r"k_proj: shape \[3, 1\] where"),
        (lambda: QKV.write_part(torch.zeros(12, 3), "k_proj", torch.zeros(3)), r"qkv_proj takes \[3, 3\]"),
        (lambda: qkv_fusion(6, 4, 8), "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        (lambda: qkv_fusion(6, 0, 8), "num_key_value_heads=0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


STORED = {
    "gqa": (qkv_fusion(6, 3, 4), 3),
    "mha": (qkv_fusion(4, 4, 2), 4),
    "mqa": (qkv_fusion(5, 1, 3), 1),
    "gate_up": (GATE_UP, 7),
    "one tensor, grouped": (stored_as(qkv_fusion(6, 3, 4), "query_key_value"), 3),
    "one tensor, concatenated": (concatenated(qkv_fusion(6, 3, 4), "qkv_proj"), 3),
    "gate and up in one": (concatenated(GATE_UP, "gate_up_proj"), 7),
    "interleaved": (interleaved(qkv_fusion(6, 3, 8), 8), 3),
    "interleaved in part": (interleaved(qkv_fusion(6, 2, 8), 4), 2),
}


@pytest.mark.parametrize("name", STORED)
def test_rows_are_found_in_every_shard(name: str) -> None:
    """Any cut, through groups, blocks and pairs: what the rows bring is what the whole has there."""
    fusion, groups = STORED[name]
    parts = [torch.arange(groups * block)[:, None] + 1000 * i for i, block in enumerate(fusion.blocks)]
    whole = fusion.fuse(parts)
    assert all(torch.equal(a, b) for a, b in zip(fusion.split(whole), parts, strict=True))
    assert all(torch.equal(fusion.read_part(whole, n), part) for n, part in zip(fusion.parts, parts, strict=True))
    written = torch.zeros_like(whole)
    for part_name, part in zip(fusion.parts, parts, strict=True):
        fusion.write_part(written, part_name, part)
    assert torch.equal(written, whole)
    for start in range(0, len(whole) + 1, 3):
        for stop in range(start, len(whole) + 1):
            shard = torch.full((stop - start, 1), -1)
            for part_name, part in zip(fusion.parts, parts, strict=True):
                own, hf = fusion.rows(part_name, start, stop, len(whole))
                shard[own] = part[hf]
            assert torch.equal(shard, whole[start:stop]), (start, stop)


def test_one_tensor_as_its_names_say():
    q, k, v = torch.arange(12), torch.arange(20, 26), torch.arange(30, 36)
    stored = concatenated(QKV, "qkv_proj").fuse([torch.cat((q, k, v))])
    assert torch.equal(stored, QKV.fuse([q, k, v]))
    assert torch.equal(stored_as(QKV, "query_key_value").fuse([stored]), stored)
    assert concatenated(GATE_UP, "gate_up_proj").fuse([torch.arange(6)]).tolist() == [0, 3, 1, 4, 2, 5]


def test_interleaved_rope_is_half_split_rope_on_the_other_rows():
    """Scores of neighbouring channels turned in the checkpoint's order equal those of halves turned in ours."""
    heads, kv, dim, turning = 4, 2, 8, 6
    fusion = interleaved(qkv_fusion(heads, kv, dim), turning)
    x, angles = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, turning // 2, dtype=torch.float64)
    weights = [torch.randn(rows * dim, 7, dtype=torch.float64) for rows in (heads, kv, kv)]
    q, k, v = (x @ weight.T for weight in weights)

    def pairs(y):  # [S, heads, D]
        a, b = y[..., :turning:2], y[..., 1:turning:2]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), y[..., turning:]), -1)

    def halves(y):
        a, b = y[..., : turning // 2], y[..., turning // 2 : turning]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, y[..., turning:]), -1)

    expected = torch.einsum("shd,thd->hst", pairs(q.view(5, heads, dim)[:, ::2]), pairs(k.view(5, kv, dim)))
    own = x @ fusion.fuse(weights).T
    own_q, own_k, own_v = qkv_fusion(heads, kv, dim).split(own, dim=-1)
    actual = torch.einsum("shd,thd->hst", halves(own_q.view(5, heads, dim)[:, ::2]), halves(own_k.view(5, kv, dim)))
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    assert not torch.equal(own_q, q)
    assert torch.equal(own_v, v)


def test_norms_of_heads_follow_their_channels():
    norm = reordered("q_norm", Interleaved(6, 4))
    stored = torch.arange(12).view(2, 6)
    own = norm.fuse([stored])
    assert own.tolist() == [[0, 2, 1, 3, 4, 5], [6, 8, 7, 9, 10, 11]]
    assert torch.equal(norm.split(own)[0], stored)
    assert torch.equal(norm.split(own[None], dim=-1)[0], stored[None])  # the norm's output
    assert torch.equal(norm.read_part(own, "q_norm"), stored)
    norm.write_part(written := torch.zeros_like(own), "q_norm", stored)
    assert torch.equal(written, own)
    rows, hf = norm.rows("q_norm", 1, 2, 2)
    assert (rows.tolist(), hf.tolist()) == ([0], [1])
    assert torch.equal(stored[:, norm.hf_columns(6)], own)
    assert Layout((QKV, norm)).ambiguous
    assert not LAYOUT.ambiguous


RENAMED = Layout(
    (stored_as(QKV, "query_key_value"),),
    (
        ("model.layers", "gpt_neox.layers"),
        ("self_attn.o_proj", "self_attn.dense"),
        ("self_attn", "attention"),
        ("lm_head", "embed_out"),
    ),
)


@pytest.mark.parametrize(
    ("own", "hf"),
    [
        ("model.layers.3.self_attn.qkv_proj.bias", "gpt_neox.layers.3.attention.query_key_value.bias"),
        ("model.layers.3.self_attn.o_proj.weight", "gpt_neox.layers.3.attention.dense.weight"),
        ("model.layers.3.self_attn", "gpt_neox.layers.3.attention"),
        ("model.layers.3.mlp.up_proj.weight", "gpt_neox.layers.3.mlp.up_proj.weight"),
        ("lm_head.weight", "embed_out.weight"),
        ("score.weight", "score.weight"),
    ],
)
def test_other_names_both_ways(own, hf):
    assert list(RENAMED.hf_keys(own)) == [hf]
    assert RENAMED.locate(hf).own == own
    assert RENAMED.stored_name(hf) == hf


def test_what_a_class_calls_otherwise_than_its_checkpoints():
    assert RENAMED.stored_name("lm_head.weight") == "embed_out.weight"
    assert LAYOUT.stored_name("model.layers.0.self_attn.k_proj.bias") == "model.layers.0.self_attn.k_proj.bias"

"""`Fusion` and `Layout` against a slow reference that moves one row at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_automodel.components.layout import GATE_UP, Fusion, Layout, PartKey, qkv_fusion

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
        assert torch.equal(fusion.part_view(fused, name).flatten(0, 1), part)
        assert fusion.part_shape(fused.shape, name) == tuple(part.shape)
        fusion.write_part(written, name, part)
    assert torch.equal(written, fused.float())
    fusion.part_view(written, fusion.parts[0]).zero_()
    assert not fusion.split(written)[0].any(), "a view writes through"

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
        (lambda: QKV.part_view(torch.zeros(13), "q_proj"), ROWS),
        (lambda: QKV.part_shape((13, 2), "q_proj"), ROWS),
        (lambda: QKV.part_view(torch.zeros(12), "o_proj"), "not in tuple"),
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


@pytest.mark.parametrize(
    ("fusion", "groups"),
    [(qkv_fusion(6, 3, 4), 3), (qkv_fusion(4, 4, 2), 4), (qkv_fusion(5, 1, 3), 1), (GATE_UP, 7)],
    ids=["gqa", "mha", "mqa", "gate_up"],
)
def test_runs_find_every_row_of_every_shard(fusion: Fusion, groups: int) -> None:
    """Any cut, through groups, blocks and pairs: what the runs bring is what the whole has there."""
    parts = [torch.arange(groups * block)[:, None] + 1000 * i for i, block in enumerate(fusion.blocks)]
    whole = fusion.fuse(parts)
    for start in range(len(whole) + 1):
        for stop in range(start, len(whole) + 1):
            shard = torch.full((stop - start, 1), -1)
            for name, part in zip(fusion.parts, parts, strict=True):
                for run in fusion.runs(name, start, stop):
                    run.view(shard).copy_(part[run.hf : run.hf + run.groups * run.rows].view(run.groups, run.rows, 1))
            assert torch.equal(shard, whole[start:stop]), (start, stop)

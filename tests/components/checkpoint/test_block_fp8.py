"""Block FP8: any range of a matrix is value times scale, rounded once; what does not fit is an error by name."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers import LlamaForCausalLM as HFLlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from nemo_automodel.components.checkpoint import CheckpointError, SafetensorsReader, block_fp8, load_parameters
from nemo_automodel.components.checkpoint.block_fp8 import open_checkpoint
from nemo_automodel.components.models.llama import LlamaForCausalLM
from tests.conftest import randomize, tiny

FP8 = torch.float8_e4m3fn
SINGLE = "model.safetensors"


def config(block: tuple[int, int] = (128, 128), **changes: object) -> dict:
    """As in the config.json of Qwen3-8B-FP8."""
    fields = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}
    return {**fields, **changes}


def quantize(weight: Tensor, block: tuple[int, int], dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """FP8 values ``[rows, columns]`` and their scales ``[blocks, blocks]``: the largest of a block becomes FP8's."""
    blocks = [-(-size // side) for size, side in zip(weight.shape, block, strict=True)]
    scale = torch.empty(blocks)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            scale[i, j] = part.abs().max() / torch.finfo(dtype).max
    return (weight / spread(scale, weight.shape, block)).to(dtype), scale


def spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The scale of every element, by index."""
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    return scale[rows[:, None], columns[None, :]]


def exact(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The product in float64, where it is exact: 4 bits times 24."""
    return values.double() * spread(scale.double(), values.shape, block)


def save(folder: Path, shape: tuple[int, int], block: tuple[int, int], fp8=FP8, scales=torch.float32) -> Tensor:
    """A matrix ``w`` in FP8 and a vector ``v`` beside it; the matrix in float64."""
    generator = torch.Generator().manual_seed(0)
    values, scale = quantize(torch.randn(shape, generator=generator), block, fp8)
    scale = scale.to(scales)
    tensors = {"v": torch.ones(3), "w": values, "w_scale_inv": scale}
    save_file(tensors, folder / SINGLE)
    return exact(values, scale.float(), block)


SHAPES = [
    ((256, 384), (128, 128)),
    ((130, 257), (128, 128)),
    ((5, 7), (128, 128)),
    ((7, 300), (2, 64)),
    ((9, 5), (4, 2)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_whole_matrices_are_the_product_rounded_once(tmp_path, shape, block, dtype):
    expected = save(tmp_path, shape, block)
    reader = open_checkpoint(tmp_path, config(block), dtype=dtype)
    assert (list(reader), len(reader), "w_scale_inv" in reader, "w" in reader) == (["v", "w"], 2, False, True)
    assert (reader.path, reader.shape("w"), reader.dtype("w")) == (tmp_path, shape, dtype)
    # float64 -> float32 is the product's own rounding, which float32 has to do as well
    assert torch.equal(reader.read("w"), expected.float().to(dtype))
    assert reader.dtype("v") == torch.float32
    assert reader.read("v").tolist() == [1, 1, 1]


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_of_values_and_scales(tmp_path, fp8, scales):
    expected = save(tmp_path, (130, 257), (128, 128), fp8, scales)
    assert torch.equal(open_checkpoint(tmp_path, config()).read("w"), expected.float().bfloat16())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    block=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    piece=st.integers(1, 40),
)
def test_any_range_with_any_pieces(tmp_path, shape, block, ends, piece):
    expected = save(tmp_path, shape, block).float().bfloat16().view(-1)
    start, end = sorted(round(share * expected.numel()) for share in ends)
    target = torch.full((end - start,), float("nan"), dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_fp8, "PIECE", piece)
        open_checkpoint(tmp_path, config(block)).read_into(target, "w", start)
    assert torch.equal(target, expected[start:end])


def test_targets_of_other_strides_and_dtypes_get_the_same_values(tmp_path):
    expected = save(tmp_path, (6, 4), (2, 3)).float().bfloat16()
    reader = open_checkpoint(tmp_path, config((2, 3)))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for target in (
            torch.zeros(2, 4, dtype=dtype),
            torch.zeros(4, 2, dtype=dtype).T,
            torch.zeros(8, 4, dtype=dtype)[::4],
        ):
            reader.read_into(target, "w", start=3 * 4)
            assert torch.equal(target, expected[3:5].to(dtype))
    reader.read_into(torch.empty(0), "w", 24)
    for start, size in ((-1, 2), (23, 2)):
        with pytest.raises(ValueError, match=r"w: elements .* of shape \[6, 4\]"):
            reader.read_into(torch.empty(size), "w", start)


def test_threads_read_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(block_fp8, "PIECE", 100)
    expected = save(tmp_path, (64, 50), (16, 16)).float().bfloat16()
    reader, result = open_checkpoint(tmp_path, config((16, 16))), torch.empty(64, 50, dtype=torch.bfloat16)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: reader.read_into(result[row], "w", row * 50), range(64)))
    assert torch.equal(result, expected)


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation gives back, that of ``known`` aside."""

    def __init__(self, known: Tensor):
        super().__init__()
        self.known, self.seen = known.data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and (storage := result.untyped_storage()).data_ptr() != self.known:
            self.seen = max(self.seen, storage.nbytes())
        return result


def test_pieces_bound_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(block_fp8, "PIECE", 1000)
    expected, target = save(tmp_path, (512, 384), (128, 128)), torch.empty(512, 384, dtype=torch.bfloat16)
    reader = open_checkpoint(tmp_path, config())
    with Largest(target) as largest:
        reader.read_into(target, "w")
    assert largest.seen == 1000 * 4
    assert torch.equal(target, expected.float().bfloat16())


def quantized_twin(folder: Path) -> dict[str, Tensor]:
    """A tiny Llama in block FP8, as its publishers would save it; gives back its weights, dequantized in float64."""
    model = randomize(HFLlamaForCausalLM(tiny(intermediate_size=48)))
    model.save_pretrained(folder)
    tensors, exactly = load_file(folder / SINGLE), {}
    for key in [key for key in tensors if "proj" in key]:
        tensors[key], tensors[f"{key}_scale_inv"] = quantize(tensors[key], (16, 16))
        exactly[key] = exact(tensors[key], tensors[f"{key}_scale_inv"], (16, 16))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    table = json.loads((folder / "config.json").read_text())
    table["quantization_config"] = config((16, 16), modules_to_not_convert=["lm_head"])
    (folder / "config.json").write_text(json.dumps(table))
    return exactly


def test_a_model_equals_transformers_dequantizing_it(tmp_path):
    exactly = quantized_twin(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=FineGrainedFP8Config(
            dequantize=True, weight_block_size=(16, 16), modules_to_not_convert=["lm_head"]
        ),
        dtype=torch.float32,
    ).eval()
    reader = open_checkpoint(tmp_path, config((16, 16), modules_to_not_convert=["lm_head"]), dtype=torch.float32)
    assert set(reader) == set(hf.state_dict())
    assert set(exactly) < set(reader)
    for key, value in hf.state_dict().items():
        assert torch.equal(reader.read(key), value), key
        if key in exactly:
            assert torch.equal(value, exactly[key].float()), key
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny(intermediate_size=48))
    assert not load_parameters(model, reader, model.state_dict_adapter.layout, dtype=torch.float32)
    for key, value in model.state_dict_adapter.to_hf(model.state_dict()).items():
        assert torch.equal(value, hf.state_dict()[key]), key


def test_a_matrix_equals_transformers_operation(tmp_path):
    save(tmp_path, (256, 384), (128, 128))
    stored = load_file(tmp_path / SINGLE)
    theirs = Fp8Dequantize(None)._dequantize_one(stored["w"], stored["w_scale_inv"], output_dtype=torch.bfloat16)
    assert torch.equal(open_checkpoint(tmp_path, config()).read("w"), theirs)


def test_without_quantization_config_it_is_the_plain_reader(tmp_path):
    save(tmp_path, (6, 4), (2, 3))
    for nothing in (None, {}):
        reader = open_checkpoint(tmp_path, nothing, check_finite=True)
        assert type(reader) is SafetensorsReader
        assert reader.check_finite
        assert reader.dtype("w") == FP8


W, SCALE = torch.zeros(6, 4).to(FP8), torch.ones(3, 2)
# name: (tensors that change, None to go; config that changes; what the message says)
REFUSED = {
    "gptq": ({}, {"quant_method": "gptq"}, r"config\.json: quantization_config has quant_method 'gptq'"),
    "no method": ({}, {"quant_method": None}, "quant_method None"),
    "per tensor": ({}, {"weight_block_size": None}, r"config\.json: .*weight_block_size None"),
    "one size": ({}, {"weight_block_size": [128]}, r"weight_block_size \[128\]"),
    "size 0": ({}, {"weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
    "size of text": ({}, {"weight_block_size": "12"}, "weight_block_size '12'"),
    "size of floats": ({}, {"weight_block_size": [2.0, 3.0]}, "weight_block_size"),
    "kept a name": ({}, {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
    "kept numbers": ({}, {"modules_to_not_convert": [1]}, r"modules_to_not_convert \[1\]"),
    "kept but FP8": ({}, {"modules_to_not_convert": ["mlp"]}, r"'mlp\.w' is in FP8, though .* lists 'mlp'"),
    "ignored but FP8": ({}, {"ignored_layers": ["mlp"]}, r"'mlp\.w' is in FP8, though"),
    "no scale": ({"mlp.w_scale_inv": None}, {}, r"'mlp\.w' is in FP8, and its 'mlp\.w_scale_inv' is missing"),
    "scale without weight": ({"mlp.w": None}, {}, r"'mlp\.w_scale_inv' is a scale for 'mlp\.w', which is missing"),
    "scale of no FP8": ({"mlp.w": torch.zeros(6, 4)}, {}, "a scale for 'mlp.w', which is not in FP8"),
    "scale's rows": ({"mlp.w_scale_inv": torch.ones(2, 2)}, {}, r"shape \[2, 2\] where \[6, 4\] has \[3, 2\] blocks"),
    "scale's dims": ({"mlp.w_scale_inv": torch.ones(6)}, {}, r"'mlp\.w_scale_inv' has shape \[6\]"),
    "scale transposed": ({"mlp.w_scale_inv": torch.ones(2, 3)}, {}, r"shape \[2, 3\] where"),
    "scale of integers": ({"mlp.w_scale_inv": SCALE.to(torch.uint8)}, {}, r"has dtype torch\.uint8; a floating"),
    "scale in FP8": ({"mlp.w_scale_inv": SCALE.to(FP8)}, {}, r"'mlp\.w_scale_inv'.* has dtype torch\.float8_e4m3fn"),
    "vector": ({"mlp.w": torch.zeros(6).to(FP8)}, {}, r"'mlp\.w' is in FP8 with shape \[6\]"),
    "experts": ({"mlp.w": torch.zeros(2, 6, 4).to(FP8)}, {}, r"in FP8 with shape \[2, 6, 4\]; only matrices"),
    "very many": ({f"x{i}": W.clone() for i in range(20)}, {}, r"x0.*\n  and 12 more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_block_fp8_is_refused_by_name(tmp_path, name):
    changes, fields, message = REFUSED[name]
    tensors = {"mlp.w": W, "mlp.w_scale_inv": SCALE, "norm": torch.ones(2)}
    save_file(tensors, tmp_path / SINGLE)
    assert len(open_checkpoint(tmp_path, config((2, 3), modules_to_not_convert=["norm", "ml"]))) == 2
    save_file({key: value for key, value in (tensors | changes).items() if value is not None}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)) as caught:
        open_checkpoint(tmp_path, config((2, 3), **fields))
    assert str(tmp_path) in str(caught.value)
    if not fields:
        assert SINGLE in str(caught.value)


@pytest.mark.parametrize("where", ["weight", "scale", "product"])
def test_values_that_are_not_finite_when_checking_is_asked_for(tmp_path, where):
    values, scale = torch.full((6, 4), 256.0).to(FP8), torch.ones(3, 2)
    if where == "weight":
        values[3, 1] = float("nan")
    scale[1, 0] = {"weight": 1.0, "scale": float("inf"), "product": 3e38}[where]
    save_file({"w": values, "w_scale_inv": scale}, tmp_path / SINGLE)
    key, at = {"weight": ("w", 13), "scale": ("w_scale_inv", 2), "product": ("w", 8)}[where]
    reader = open_checkpoint(tmp_path, config((2, 3)), check_finite=True)
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: tensor '{key}' holds (nan|inf) at element {at}"):
        reader.read("w")
    assert not open_checkpoint(tmp_path, config((2, 3))).read("w").isfinite().all()

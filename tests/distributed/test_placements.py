"""Any shape on any placement: checkpoint and adapter -> shards -> files, bitwise.

What a shard must hold is worked out here from the files, by `torch.chunk` and plain reshapes: neither the layout table
nor DTensor has a say in it. The cases are drawn beforehand and run in one group of ranks, so there is no shrinking; the
models are tiny as it is.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.peft import adapter_tensors
from tests.conftest import randomize, tiny
from tests.distributed.meshes import fsdp
from tests.distributed.ranks import run_ranks

Case = dict[str, Any]
FAMILIES: dict[str, Any] = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
MESHES = {
    1: [{"fsdp": 1}, {"tp": 1}],
    2: [{"fsdp": 2}, {"tp": 2}],
    3: [{"fsdp": 3}, {"tp": 3}],
    4: [{"fsdp": 4}, {"tp": 4}, {"replicate": 2, "fsdp": 2}, {"fsdp": 2, "tp": 2}],
}
PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
BLOCK = (3, 5)
PREFIX = "base_model.model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

adapters = st.fixed_dictionaries(
    {
        "targets": st.lists(st.sampled_from(PROJECTIONS), min_size=1, unique=True),
        "r": st.integers(1, 5),
        "dora": st.booleans(),
        "bias": st.sampled_from(["none", "all"]),
        "saved": st.sampled_from([None, HEAD, EMBEDDING]),
        "wide": st.booleans(),
    }
)


def cases(ranks: int) -> st.SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "mesh": st.sampled_from(MESHES[ranks]),
            "family": st.sampled_from(sorted(FAMILIES)),
            "kv_heads": st.integers(1, 3),
            "group": st.integers(1, 3),
            "head_dim": st.sampled_from([2, 4, 6]),
            "hidden": st.integers(1, 5),  # times the heads, which transformers asks for
            "intermediate": st.integers(1, 11),
            "vocab": st.integers(3, 11),
            "attention_bias": st.booleans(),
            "mlp_bias": st.booleans(),
            "tied": st.booleans(),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
            "fp8": st.booleans(),
            "adapter": st.none() | adapters,
            "seed": st.integers(0, 999),
        }
    )


def drawn(ranks: int, count: int) -> list[Case]:
    """As many cases as asked for, the same ones every time."""
    found: list[Case] = []

    @seed(ranks)
    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=HealthCheck)
    @given(cases(ranks))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def write_checkpoint(folder: Path, case: Case) -> dict[str, Tensor]:
    """A checkpoint as transformers writes it, or in block FP8; gives back the values that it stands for."""
    hf_class, config_class = FAMILIES[case["family"]]
    config = tiny(
        config_class,
        num_hidden_layers=1,
        num_key_value_heads=case["kv_heads"],
        num_attention_heads=case["kv_heads"] * case["group"],
        head_dim=case["head_dim"],
        hidden_size=case["hidden"] * case["kv_heads"] * case["group"],
        intermediate_size=case["intermediate"],
        vocab_size=case["vocab"],
        tie_word_embeddings=case["tied"],
        **({name: case[name] for name in ("attention_bias", "mlp_bias")} if case["family"] == "llama" else {}),
    )
    randomize(hf_class(config), case["seed"]).to(case["dtype"]).save_pretrained(folder)
    values = load_file(folder / "model.safetensors")
    if case["fp8"]:
        stored = dict(values)
        for key in [key for key in values if key.endswith("_proj.weight")]:
            rows, columns = values[key].shape
            stored[key] = (values[key].float() * 50).to(torch.float8_e4m3fn)
            scale = stored[f"{key}_scale_inv"] = 0.1 + torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
            spread = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:rows, :columns]
            values[key] = (stored[key].float() * spread).to(case["dtype"])
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        table = json.loads((folder / "config.json").read_text())
        table["quantization_config"] = {"quant_method": "fp8", "weight_block_size": BLOCK}
        (folder / "config.json").write_text(json.dumps(table))
    return values


def write_adapter(folder: Path, case: Case, base: dict[str, Tensor]) -> None:
    """An adapter as peft writes it."""
    adapter, tensors = case["adapter"], {}
    dtype = torch.float32 if adapter["wide"] else case["dtype"]
    adapted = {
        key.removesuffix(".weight") for key in base if key.endswith(tuple(f"{t}.weight" for t in adapter["targets"]))
    }
    for path in adapted:
        rows, columns = base[f"{path}.weight"].shape
        tensors[f"{path}.lora_A.weight"] = torch.randn(adapter["r"], columns, dtype=dtype)
        tensors[f"{path}.lora_B.weight"] = torch.randn(rows, adapter["r"], dtype=dtype)
        if adapter["dora"]:
            tensors[f"{path}.lora_magnitude_vector"] = torch.rand(rows, dtype=dtype)
    for key in [key for key in base if key.endswith(".bias") and adapter["bias"] == "all"]:
        path = key.removesuffix(".bias")
        tensors[f"{path}.base_layer.bias" if path in adapted else key] = torch.randn_like(base[key])
    if adapter["saved"]:
        tensors[adapter["saved"]] = torch.randn_like(base[EMBEDDING])
    folder.mkdir()
    save_file({PREFIX + key: value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    options = {
        "peft_type": "LORA",
        "r": adapter["r"],
        "lora_alpha": 3,
        "use_dora": adapter["dora"],
        "bias": adapter["bias"],
        "target_modules": [target.rpartition(".")[2] for target in adapter["targets"]],
        "modules_to_save": [adapter["saved"].split(".")[-2]] if adapter["saved"] else None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(options))


def fused(values: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Own names and rows: ``[Q_group | K | V]`` per KV head, ``gate_0, up_0, gate_1, ...``."""
    own = {}
    for key, value in values.items():
        if ".q_proj." in key:
            parts = [values[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            grouped = [part.reshape(case["kv_heads"], -1, *part.shape[1:]) for part in parts]
            own[key.replace("q_proj", "qkv_proj")] = torch.cat(grouped, 1).reshape(-1, *value.shape[1:])
        elif ".gate_proj." in key:
            pair = torch.stack([value, values[key.replace("gate_proj", "up_proj")]], 1)
            own[key.replace("gate_proj", "gate_up_proj")] = pair.reshape(-1, *value.shape[1:])
        elif not any(f".{part}_proj." in key for part in ("k", "v", "up")):
            own[key] = value
    return own


def tp_dim(case: Case, name: str, ndim: int) -> int | None:
    """The dim along which tensor parallelism cuts a parameter: any, or none."""
    return random.Random(f"{case['seed']} {name}").choice([0, None] if ndim == 1 else [0, 1, None])


def shard(case: Case) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        mesh = init_device_mesh("cpu", tuple(case["mesh"].values()), mesh_dim_names=tuple(case["mesh"]))
        if "tp" in case["mesh"]:
            cut: dict[int, torch.nn.Parameter] = {}  # tied ones stay tied
            for name, parameter in list(model.named_parameters(remove_duplicate=False)):
                if id(parameter) not in cut:
                    dim = tp_dim(case, name, parameter.ndim)
                    placed = distribute_tensor(parameter, mesh["tp"], [Replicate() if dim is None else Shard(dim)])
                    cut[id(parameter)] = torch.nn.Parameter(placed, requires_grad=parameter.requires_grad)
                path, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(path), leaf, cut[id(parameter)])
        if "fsdp" in case["mesh"]:
            fsdp(model, mesh if "replicate" in case["mesh"] else mesh["fsdp"])

    return prepare


def local(full: Tensor, case: Case, name: str) -> Tensor:
    """This rank's shard of a parameter: cut for tensor parallelism first, then for FSDP."""
    mesh, rank = case["mesh"], dist.get_rank()
    coordinates = dict(zip(mesh, divmod(rank, 2) if len(mesh) == 2 else (rank,), strict=True))
    for axis, dim in (("tp", tp_dim(case, name, full.ndim)), ("fsdp", 0)):
        if axis in mesh and dim is not None:
            parts = full.chunk(mesh[axis], dim)
            full = parts[coordinates[axis]] if coordinates[axis] < len(parts) else full.narrow(dim, 0, 0)
    return full


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


def _load_and_save(folder: Path, case: Case) -> None:
    adapter = folder / "adapter" if case["adapter"] else None
    options = {"dtype": case["dtype"], "adapter": adapter, "prepare": shard(case)}
    model = NeMoAutoModelForCausalLM.from_pretrained(folder / "base", **options)
    values, keys = load_file(folder / "values.safetensors"), {}
    if adapter:
        if case["adapter"]["saved"]:
            values.setdefault(HEAD, values[EMBEDDING])  # no longer tied
        tensors = {key.removeprefix(PREFIX): v for key, v in load_file(adapter / "adapter_model.safetensors").items()}
        values |= {key.replace(".base_layer", ""): value for key, value in tensors.items() if ".lora_" not in key}
        keys = {id(parameter): key.removeprefix(PREFIX) for key, parameter in adapter_tensors(model).items()}
    expected, unseen = fused(values, case), {*fused(values, case), *keys.values()}
    for name, parameter in model.named_parameters():
        key = keys.get(id(parameter), name)
        full = tensors[key] if key != name else expected[name]
        assert isinstance(parameter, DTensor), name
        assert same(parameter.to_local(), local(full, case, name)), name
        unseen.remove(key)
    assert not unseen
    if adapter:
        model.save_adapter(folder / "saved")
    else:
        model.save_pretrained(folder / "saved", max_shard_size="1KB")


def _load_and_save_all(folder: Path, cases: list[Case]) -> None:
    for number, case in enumerate(cases):
        try:
            _load_and_save(folder / str(number), case)
        except BaseException as error:
            error.add_note(f"case {number}: {case}")
            raise


def round_trips(folder: Path, ranks: int, count: int) -> None:
    found = drawn(ranks, count)
    for number, case in enumerate(found):
        torch.manual_seed(case["seed"])
        home = folder / str(number)
        values = write_checkpoint(home / "base", case)
        save_file(values, home / "values.safetensors")
        if case["adapter"]:
            write_adapter(home / "adapter", case, values)
    run_ranks(ranks, _load_and_save_all, folder, found, timeout=60 + count)
    for number, case in enumerate(found):
        home = folder / str(number)
        source = home / ("adapter/adapter_model.safetensors" if case["adapter"] else "values.safetensors")
        saved = {key: v for file in (home / "saved").glob("*.safetensors") for key, v in load_file(file).items()}
        expected = load_file(source)
        assert saved.keys() == expected.keys(), case
        assert all(same(saved[key], value) for key, value in expected.items()), case


@pytest.mark.parametrize("ranks", MESHES)
def test_round_trips(ranks: int, tmp_path: Path) -> None:
    round_trips(tmp_path, ranks, 12)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", MESHES)
def test_many_round_trips(ranks: int, tmp_path: Path) -> None:
    round_trips(tmp_path, ranks, 150)

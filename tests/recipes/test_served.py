"""What serves each part of a model, as a training says when it begins, and which attention `auto` takes."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen as torch_varlen
from transformers import (
    Gemma2Config,
    LlamaConfig,
    NemotronConfig,
    Olmo2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.kernels import launch
from nemo_automodel.components.models.common import cudnn
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.capabilities import Package
from nemo_automodel.components.models.common.te.float8 import TEFloat8
from nemo_automodel.components.peft import LoRAConfig, apply_lora, layout_of
from nemo_automodel.config import load_config
from nemo_automodel.recipes import building, served
from nemo_automodel.recipes.served import KERNELS, LOADED_BY, attention_for, in_one_line
from nemo_automodel.recipes.train import ModelConfig, Run, TrainConfig
from tests.components.models.test_varlen import runs_anywhere, varlen_reference
from tests.conftest import tiny

AUTO = ModelConfig(path="x")
WIDE = {"hidden_size": 512, "head_dim": 128, "pad_token_id": 0}


def model_of(config_class: Any, lora: LoRAConfig | None = None, **options: Any) -> Any:
    changes = {**WIDE, **options.pop("changes", {})}
    if config_class in (NemotronConfig, StableLmConfig, Starcoder2Config):
        changes.pop("head_dim")
    model = NeMoAutoModelForCausalLM.from_config(tiny(config_class, **changes), **options)
    if lora is not None:
        apply_lora(model, lora, layout_of(model))
    return model


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose kernels run, as far as the description can tell; varlen too."""
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "triton", object())
    runs_anywhere(monkeypatch)


def test_here_it_is_torch_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = served.served(model_of(LlamaConfig), AUTO, packing=True)
    assert found == {
        "attention": "sdpa (varlen has no kernel for float32 on cpu, only for bfloat16 and float16 on cuda)",
        **dict.fromkeys(("norms", "gated MLP", "RoPE", "loss"), "torch (no GPU)"),
    }
    assert in_one_line(found).endswith("on cuda); norms, gated MLP, RoPE, loss: torch (no GPU)")
    options = ModelConfig(path="x", backend=BackendConfig(kernels="torch"))
    asked = served.served(model_of(LlamaConfig, backend={"kernels": "torch"}), options, packing=False)
    assert asked["norms"] == "torch (asked for)"
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "triton", None)
    assert served.served(model_of(LlamaConfig), AUTO, False)["RoPE"] == "torch: Triton is not installed"


EVERYWHERE = dict.fromkeys(("norms", "gated MLP", "RoPE", "loss"), KERNELS)
WIDE_NORMS = {"RoPE": "torch for norms of queries and keys before it, other than over each head"}


@pytest.mark.parametrize(
    ("config_class", "changes", "lora", "expected"),
    [
        (LlamaConfig, {}, None, {}),
        (LlamaConfig, {}, LoRAConfig(), {"LoRA": KERNELS}),
        (LlamaConfig, {}, LoRAConfig(dora=True), {"LoRA": "torch for DoRA"}),
        (LlamaConfig, {}, LoRAConfig(dropout=0.1), {"LoRA": "torch for dropout"}),
        (LlamaConfig, {"hidden_act": "gelu"}, None, {"gated MLP": "torch for activation gelu"}),
        (LlamaConfig, {"hidden_size": 256}, None, {"norms": "torch for norms of fewer than 512 channels"}),
        (Gemma2Config, {}, None, {}),
        (Qwen3Config, {}, None, {}),
        (Olmo2Config, {}, None, WIDE_NORMS),
        (
            SmolLM3Config,
            {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
            None,
            {"RoPE": f"{KERNELS}, torch for layers without it (1 of 4)"},
        ),
        (NemotronConfig, {}, None, {"norms": "torch for layer norms", "gated MLP": "torch for MLPs without a gate"}),
        (Starcoder2Config, {}, None, {"norms": "torch for layer norms", "gated MLP": "torch for MLPs without a gate"}),
    ],
)
def test_what_the_kernels_do_not_cover_is_named(
    gpu: None, config_class: Any, changes: dict[str, Any], lora: LoRAConfig | None, expected: dict[str, str]
) -> None:
    if config_class is Olmo2Config:
        changes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    found = served.served(model_of(config_class, lora, changes=changes), AUTO, packing=True)
    found.pop("attention")
    assert found == EVERYWHERE | expected


def test_what_transformer_engine_serves(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: True)
    backend = BackendConfig(
        linear="te", rms_norm="te", rope_fusion=True, te_fp8=TEFloat8(recipe="block", keep=["*.mlp.*"])
    )
    found = served.served(model_of(LlamaConfig, backend=backend), AUTO, packing=False)
    assert found["linear layers"] == "Transformer Engine, float8 by recipe 'block' (asked for)"
    assert found["norms"] == found["RoPE"] == "Transformer Engine (asked for)"
    assert found["gated MLP"] == found["loss"] == KERNELS


def test_two_versions_of_cudnn_are_a_warning(gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imported Transformer Engine (`import peft` does) may have brought the system's in."""
    monkeypatch.setattr(cudnn, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(served, "_home", lambda model: (torch.device("cuda"), torch.bfloat16))
    line = "7f00-7f01 r-xp 00000000 fe:00 42    {}/libcudnn_graph.so.9\n"
    (tmp_path / "maps").write_text(line.format("/a"))
    assert "warning" not in served.served(model_of(LlamaConfig), AUTO, packing=False)
    (tmp_path / "maps").write_text(line.format("/a") + line.format("/b"))
    found = in_one_line(served.served(model_of(LlamaConfig), AUTO, packing=False))
    assert "; warning: parts of two versions of cuDNN, from /a and /b, whose gradients may be wrong" in found


def test_transformers_own_class_has_one_line() -> None:
    found = served.served(model_of(StableLmConfig), AUTO, packing=True)
    assert found == {"attention": "sdpa (transformers' own class)", "layers": "transformers' own class"}


@pytest.mark.parametrize(
    ("config_class", "options", "packing", "reason"),
    [
        (LlamaConfig, AUTO, False, "rows are not packed"),
        (LlamaConfig, ModelConfig(path="x", attn_implementation="sdpa"), True, "asked for"),
        (LlamaConfig, ModelConfig(path="x", backend=BackendConfig(attn="sdpa")), True, "asked for"),
        (Gemma2Config, AUTO, True, "varlen has no softcap on the scores, as this model needs (50.0)"),
        (StableLmConfig, AUTO, True, "transformers' own class"),
    ],
)
def test_which_attention_auto_takes(
    gpu: None, config_class: Any, options: ModelConfig, packing: bool, reason: str
) -> None:
    assert attention_for(model_of(config_class), options, packing) == (None, reason)


WITHOUT = "packed documents without a mask; "
WHOLE = "rows are not packed; "
FLASH4 = "flash4 (needs FlashAttention 4, which is not installed: pip install --pre flash-attn-4)"
WHEEL = "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130"
FLASH3 = f"flash3 (needs FlashAttention 3, which is not installed: {WHEEL})"
INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
TE = f"te (needs Transformer Engine, which is not installed: {INSTALL})"
DTYPES = "has no kernel for float64 on cpu, only for "


def for_all(reason: str, packing: bool = True) -> str:
    *names, last = (f"{name} ({reason})" for name in served.FASTER[packing])
    rows = WITHOUT if packing else WHOLE
    return f"{rows}faster are {' and '.join(names)} and {last}"


@pytest.fixture
def hopper(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which attentions were measured, with all of them installed."""
    for name in ("te", "flash3", "flash4"):
        runs_anywhere(monkeypatch, name)
    monkeypatch.setattr(Package, "installed", lambda self: True)
    monkeypatch.setattr(served, "LOADED_BY", dict.fromkeys(served.LOADED_BY, lambda: None))
    monkeypatch.setattr(served, "SHORT", 10**9)  # no model here is large
    monkeypatch.setattr(served, "compute_of", lambda device: (9, 0))


def broken() -> None:
    raise AssertionError("libcudnn.so")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("there", ("flash_attention_4", f"{WITHOUT}the fastest")),
        ("without flash4", ("flash_attention_3", f"{WITHOUT}faster is {FLASH4}")),
        ("only te", ("te", f"{WITHOUT}faster are {FLASH4} and {FLASH3}")),
        (
            "flash4 not there",
            ("flash_attention_3", f"{WITHOUT}faster is flash4 (does not load: No module named 'flash_attn')"),
        ),
        ("not installed", ("varlen", f"{WITHOUT}faster are {FLASH4} and {FLASH3} and {TE}")),
        ("broken", ("varlen", for_all("does not load: libcudnn.so"))),
        ("older", ("varlen", for_all("was measured on Hopper only"))),
        ("newer", ("varlen", for_all("was measured on Hopper only"))),
        ("selective", ("varlen", for_all("would be computed again by selective checkpointing"))),
        ("deterministic", ("varlen", for_all("was not measured where steps are deterministic"))),
        ("compiled", ("varlen", for_all("cuts compiled layers in two"))),
        ("whole, there", ("flash_attention_3", f"{WHOLE}the fastest")),
        ("whole, only te", (None, f"{WHOLE}faster are {FLASH3} and {FLASH4}")),
        ("whole, broken", (None, for_all("does not load: libcudnn.so", packing=False))),
        ("whole, compiled", (None, for_all("cuts compiled layers in two", packing=False))),
        ("whole, older", (None, WHOLE.removesuffix("; "))),
    ],
)
def test_rows_are_for_the_fastest_that_runs(
    hopper: None, case: str, expected: tuple[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packing, case = not case.startswith("whole, "), case.removeprefix("whole, ")
    flash = ("FlashAttention 4", "FlashAttention 3")
    absent = {"not installed": ("Transformer Engine", *flash), "only te": flash, "without flash4": flash[:1]}
    monkeypatch.setattr(Package, "installed", lambda self: self.name not in absent.get(case, ()))
    if case == "broken":
        monkeypatch.setattr(served, "LOADED_BY", dict.fromkeys(served.LOADED_BY, broken))
    if case == "flash4 not there":
        monkeypatch.setitem(served.LOADED_BY, "flash4", LOADED_BY["flash4"])
    monkeypatch.setattr(served, "compute_of", lambda device: {"older": (8, 0), "newer": (10, 0)}.get(case, (9, 0)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: case == "deterministic")
    checkpointing = "selective" if case == "selective" else False
    options = ModelConfig(path="x", compile=case == "compiled", gradient_checkpointing=checkpointing)
    model = model_of(LlamaConfig)
    found = attention_for(model, options, packing)
    assert found == expected
    assert served.served(model, options, packing)["attention"] == f"sdpa ({found[1]})"


def test_what_the_table_has_not_is_not_taken(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "compute_of", lambda device: (9, 0))
    only = for_all(f"{DTYPES}bfloat16 and float16 on cuda")
    assert attention_for(model_of(LlamaConfig).double(), AUTO, True) == ("varlen", only)


def test_what_graphs_do_not_take_is_for_larger_models(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU of its own, that is, where they could be taken."""
    monkeypatch.setattr(served, "SHORT", 4096)
    monkeypatch.setattr(served, "_home", lambda model: (torch.device("cuda"), torch.bfloat16))
    model = model_of(LlamaConfig)
    reason = "was not tried in CUDA graphs, from which so small a model gains more"
    assert attention_for(model, AUTO, True) == ("flash_attention_3", f"{WITHOUT}faster is flash4 ({reason})")
    for options in (ModelConfig(path="x", cuda_graphs=False), ModelConfig(path="x", gradient_checkpointing=True)):
        assert attention_for(model, options, True)[0] == "flash_attention_4"
    monkeypatch.setattr(served.Together, "__init__", lambda self: setattr(self, "size", 2))
    assert attention_for(model, AUTO, True)[0] == "flash_attention_4"


@pytest.mark.parametrize("packing", [True, False])
def test_a_softcap_is_for_what_surely_has_it(hopper: None, packing: bool) -> None:
    """Builds of FlashAttention 3 may leave it out."""
    name, why = attention_for(model_of(Gemma2Config), AUTO, packing)
    assert name == "flash_attention_4"
    assert ("flash3 (may have been built without a softcap)" in why) is not packing


@pytest.mark.parametrize(
    ("reason", "options", "of_the_rest"),
    [
        (None, {}, {}),
        (None, {}, {"packing": True, "attention": "varlen"}),
        (None, {}, {"compute": (8, 0)}),
        ("device cpu", {}, {"device": "cpu"}),
        ("several ranks", {}, {"several": True}),
        ("model.compile=true", {"compile": True}, {}),
        ("model.cpu_offload=true", {"cpu_offload": True}, {}),
        ("model.gradient_checkpointing=selective", {"gradient_checkpointing": "selective"}, {}),
        ("model.float8=rowwise", {"float8": "rowwise"}, {}),
        ("Transformer Engine", {}, {"rope_fusion": True}),
        ("packed documents and attention 'sdpa', which tells them apart by a mask", {}, {"packing": True}),
        ("attention 'eager'", {}, {"attention": "eager"}),
        ("transformers' own class", {}, {"config_class": StableLmConfig}),
    ],
)
def test_what_cuda_graphs_go_with(
    gpu: None, monkeypatch: pytest.MonkeyPatch, reason: str | None, options: dict[str, Any], of_the_rest: dict[str, Any]
) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: True)
    if of_the_rest.get("rope_fusion"):
        options = {"backend": BackendConfig(rope_fusion=True)}
    wants = {"device": "cuda", "several": False, "packing": False, "attention": "sdpa", "config_class": LlamaConfig}
    wants |= {"shapes": 1, "compute": (9, 0)} | of_the_rest
    monkeypatch.setattr(served, "compute_of", lambda device: wants["compute"])
    model = model_of(wants["config_class"]).bfloat16()
    model.config._attn_implementation = wants["attention"]
    monkeypatch.setattr(served, "_home", lambda model: (torch.device(wants["device"]), torch.bfloat16))
    monkeypatch.setattr(served, "Graphs", lambda backbone, asked: SimpleNamespace(asked=asked, shapes=wants["shapes"]))
    for parameter in model.parameters():
        parameter.__class__ = type("There", (nn.Parameter,), {"device": torch.device(wants["device"])})
    rest = wants["packing"], wants["several"]
    auto = served.graphs_for(model, ModelConfig(path="x", **options), *rest)
    assert (auto is not None) is (reason is None and wants["compute"] == (9, 0))  # where it was measured
    assert not served.graphs_for(model, ModelConfig(path="x", cuda_graphs=False, **options), *rest)
    asked = ModelConfig(path="x", cuda_graphs=True, **options)
    if reason is None:
        assert auto is None or not auto.asked
        graphs = served.graphs_for(model, asked, *rest)
        assert graphs is not None
        assert graphs.asked
        wants["shapes"] = 0  # no room for their gradients
        assert served.graphs_for(model, ModelConfig(path="x", **options), *rest) is None
    else:
        with pytest.raises(ValueError, match=f"cuda_graphs=true does not go with {re.escape(reason)}: set one"):
            served.graphs_for(model, asked, *rest)


def test_graphs_that_are_asked_for_and_cannot_be_are_refused_before_weights_are_read(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeMoAutoModelForCausalLM, "from_pretrained", None)
    config = load_config(TrainConfig, None, overrides("run", model__cuda_graphs="true", train__device="cpu"))
    with pytest.raises(ValueError, match=r"model.cuda_graphs=true does not go with device cpu: set one of them back"):
        building.build_model(config, None, torch.device("cpu"))


def test_who_launches_is_told(gpu: None) -> None:
    model = model_of(LlamaConfig)
    assert "launches" not in served.served(model, AUTO, packing=False)
    model.base_model.graphs = SimpleNamespace(description="CUDA graphs")
    assert served.served(model, AUTO, packing=False)["launches"] == "CUDA graphs"


def test_a_packed_training_takes_varlen_and_finds_documents_on_the_host(
    gpu: None, overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are those of sdpa with a mask, which fp32 on a CPU would take."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_reference)
    packing = {"data__packing": "true", "data__max_length": 128, "train__batch_size": 2, "train__max_steps": 3}
    losses = []
    for name, options in {"auto": {}, "sdpa": {"model__backend__attn": "sdpa"}}.items():
        said: list[str] = []
        run = Run(load_config(TrainConfig, None, overrides(name, **packing, **options)), said.append)
        slower = for_all("has no kernel for float32 on cpu, only for bfloat16 and float16 on cuda")
        chosen = f"varlen ({slower})" if name == "auto" else "sdpa (asked for)"
        assert said[-1] == f"attention: {chosen}; norms, gated MLP, RoPE, loss: torch (no GPU)"
        if name == "auto":
            seen = given_to(run.model.model)
        for step in (1, 2, 3):
            run.step(step)
        losses.append([row["loss"] for _, row in run.rows(until=3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 rounding, three steps deep
    assert len(seen) >= 3
    assert all(isinstance(each["max_length_q"], int) and each["cu_seq_lens_q"].dtype == torch.int32 for each in seen)


def given_to(module: nn.Module) -> list[dict[str, Any]]:
    """The keyword arguments of the calls of ``module`` from now on."""
    seen: list[dict[str, Any]] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    return seen


def test_asked_for_where_it_does_not_run_it_is_refused_before_the_model_is_built(
    overrides: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("built")

    monkeypatch.setattr(building.NeMoAutoModelForCausalLM, "from_pretrained", unreachable)
    refused = {
        "varlen": "'varlen' has no kernel for float32 on cpu, .*: use backend.attn='sdpa'",
        "flex": "'flex' has no backward pass on cpu: use backend.attn='sdpa' or 'eager'",
    }
    implementations = {"varlen": "varlen", "flex": "flex_attention"}
    for name, message in refused.items():
        for options in ({"model__backend__attn": name}, {"model__attn_implementation": implementations[name]}):
            config = load_config(TrainConfig, None, overrides(**options))
            with pytest.raises(ValueError, match=message):
                Run(config, lambda line: None)

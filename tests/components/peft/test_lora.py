"""LoRA on fused projections against peft on the separate ones."""

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nemo_automodel.components.peft import (
    LoRAConfig,
    adapter_tensors,
    apply_lora,
    load_adapter_tensors,
    merge_lora,
    save_adapter,
)
from nemo_automodel.components.peft.lora import LoRALinear
from tests.components.kernels.cases import learnt
from tests.conftest import assert_near, tiny, tokens, twins

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = [
    ["q_proj", "v_proj"],
    ["k_proj"],
    ["up_proj"],
    ["gate_proj", "down_proj", "q_proj"],
    ["o_proj"],
    PROJECTIONS,
]


def _peft_twin(targets: list[str], qwen: bool = False, rslora: bool = False):  # type: ignore[no-untyped-def]
    """transformers with peft, random A and B; and ours, which loads them by peft's names."""
    config = tiny(Qwen2Config if qwen else LlamaConfig, **({} if qwen else {"attention_bias": True, "head_dim": 6}))
    hf, ours = twins(Qwen2ForCausalLM if qwen else LlamaForCausalLM, config)
    theirs = get_peft_model(
        hf, LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.0, use_rslora=rslora)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    apply_lora(ours, LoRAConfig(r=3, alpha=5, targets=targets, rslora=rslora), ours.state_dict_adapter.layout)
    tensors = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    load_adapter_tensors(ours, tensors)
    return theirs, ours, tensors


@pytest.mark.parametrize(
    "options", [{"kernels": False}, {"kernels": False, "dora": True}, {"float8": True}], ids=["LoRA", "DoRA", "float8"]
)
def test_updates_are_not_lost_in_rounding(options: dict[str, bool]) -> None:
    """As peft's are at first, whose output is rounded before they are added: 0.06 of them is left."""
    assert learnt(**options) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("targets", "qwen", "rslora"), [*((c, False, False) for c in CASES), (CASES[0], True, True)])
def test_logits_and_gradients_equal_pefts(targets: list[str], qwen: bool, rslora: bool) -> None:
    theirs, ours, tensors = _peft_twin(targets, qwen, rslora)
    ids = tokens(2, 11)
    expected, actual = theirs(input_ids=ids, labels=ids), ours(input_ids=ids, labels=ids)
    assert_near(actual.logits, expected.logits)
    expected.loss.backward()
    actual.loss.backward()
    own = adapter_tensors(ours)
    assert own.keys() == tensors.keys()
    for name, parameter in tensors.items():
        assert parameter.grad.abs().max() > 0
        assert_near(own[name].grad, parameter.grad, what=name)
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("dora", [False, True])
def test_layers_with_adapters_are_one_graph_of_the_compiler(dora: bool) -> None:
    _, ours = twins(LlamaForCausalLM, tiny(LlamaConfig, num_hidden_layers=1))
    apply_lora(ours, LoRAConfig(r=3, targets=PROJECTIONS, dora=dora), ours.state_dict_adapter.layout)
    for layer in (each for each in ours.modules() if isinstance(each, LoRALinear)):
        x = torch.randn(2, 5, layer.in_features)
        assert_near(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], PROJECTIONS])
def test_saved_adapters_load_in_peft(targets: list[str], tmp_path: Path) -> None:
    _, ours, _ = _peft_twin(targets)
    save_adapter(ours, tmp_path, LoRAConfig(r=3, alpha=5, targets=targets), "base")
    hf, _ = twins(LlamaForCausalLM, ours.config)
    ids = tokens(1, 8)
    assert_near(PeftModel.from_pretrained(hf, tmp_path)(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("targets", CASES)
def test_merging_changes_no_logits_and_leaves_plain_layers(targets: list[str]) -> None:
    _, ours, _ = _peft_twin(targets)
    ids = tokens(1, 8)
    adapted = ours(ids).logits
    merge_lora(ours)
    assert_near(ours(ids).logits, adapted)
    assert not any("lora" in name for name, _ in itertools.chain(ours.named_parameters(), ours.named_modules()))


def test_fused_names_stand_for_all_their_parts() -> None:
    _, fused = twins(LlamaForCausalLM, tiny())
    apply_lora(fused, LoRAConfig(targets=["qkv_proj"]), fused.state_dict_adapter.layout)
    assert {key.split(".")[-3] for key in adapter_tensors(fused)} == {"q_proj", "k_proj", "v_proj"}


def test_all_linear_is_every_projection_but_the_head_and_starts_as_a_no_op() -> None:
    hf, ours = twins(LlamaForCausalLM, tiny())
    adapted = apply_lora(ours, LoRAConfig(r=2), ours.state_dict_adapter.layout)
    assert {key.split(".")[-3] for key in adapter_tensors(ours)} == set(PROJECTIONS)
    assert len(adapted) == 4 * 2
    ids = tokens(1, 5)
    assert_near(ours(ids).logits, hf(ids).logits)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 0}, "r=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"targets": []}, "targets is empty"),
    ],
)
def test_a_bad_value_is_refused_by_name(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**config)


def test_an_unknown_target_names_those_there_are() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    with pytest.raises(ValueError, match=r"'query' is no projection of this model; there are .*q_proj"):
        apply_lora(ours, LoRAConfig(targets=["q_proj", "query"]), ours.state_dict_adapter.layout)


def test_an_adapted_models_own_state_dict_loads_into_it() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    apply_lora(ours, LoRAConfig(targets=["q_proj"]), ours.state_dict_adapter.layout)
    state = {name: torch.randn_like(value) for name, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_an_adapter_that_does_not_fit_changes_nothing(damage: str) -> None:
    _, ours, tensors = _peft_twin(["q_proj"])
    tensors = {name: torch.zeros_like(value) for name, value in tensors.items()}
    key = next(iter(tensors))
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors[key.replace("q_proj", "k_proj")] = tensors[key]
    else:
        tensors[key] = tensors[key][:2]
    with pytest.raises(ValueError, match="does not fit the model"):
        load_adapter_tensors(ours, tensors)
    assert all(parameter.abs().max() > 0 for parameter in adapter_tensors(ours).values())

"""Adapters joined to their weight: whatever ends the tie, or writes other adapters, is noticed. Interpreted."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import LlamaConfig, PreTrainedModel

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.kernels.linear import mm_and_low_rank
from nemo_automodel.components.kernels.linear_cross_entropy import linear_cross_entropy
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.components.models.common import norm
from nemo_automodel.components.peft import LoRAConfig, LoRALinear, apply_lora, join_adapters, quantize_base
from tests.components.kernels.cases import LEARNT, learnt

pytestmark = pytest.mark.interpreted
IDS = torch.arange(14).view(2, 7)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "NARROW", 1)


def model(join: bool) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=31, hidden_size=48, intermediate_size=72, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    made = NeMoAutoModelForCausalLM.from_config(config, dtype="float32").train()
    apply_lora(made, LoRAConfig(r=8), made.state_dict_adapter.layout)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    if join:
        join_adapters(made)
        assert all(layer.joined is not None for layer in adapted(made))
    return made


def adapted(made: nn.Module) -> list[LoRALinear]:
    return [module for module in made.modules() if isinstance(module, LoRALinear)]


@pytest.mark.parametrize(
    "treated",
    [copy.deepcopy, lambda made: made.double().float(), lambda made: made],
    ids=["a deep copy", "a cast and back", "data replaced"],
)
@torch.no_grad()
def test_a_weight_that_is_replaced_counts(treated: Callable[[nn.Module], PreTrainedModel]) -> None:
    logits = []
    for made in map(treated, (model(join=True), model(join=False))):
        for layer in adapted(made):
            layer.weight.data = layer.weight.data * 1.5
        logits.append(made(IDS).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)  # fp32, in another order


def test_another_forward_pass_may_have_other_adapters() -> None:
    """As a reference model by zero adapters, between the two passes of the trained one."""
    gradients: list[dict[str, Tensor]] = []
    for made in (model(join=True), model(join=False)):
        loss = next_token_loss(made, {"input_ids": IDS, "labels": IDS})
        with torch.no_grad():
            zero = {name: torch.zeros_like(p) for name, p in made.named_parameters() if "lora_B" in name}
            functional_call(made, zero, (IDS,))
        loss.backward()
        gradients.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    assert any(gradient.abs().max() > 0.01 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_float8_weights_and_others_do_not_load_each_other() -> None:
    plain, coded = model(join=True), model(join=True)
    quantize_base(coded)
    assert all(layer.joined is None for layer in adapted(coded))
    before = coded(IDS).logits
    quantize_base(coded)
    assert torch.equal(coded.to(torch.float32)(IDS).logits, before)
    for one, other in ((plain, coded), (coded, plain)):
        with pytest.raises(RuntimeError, match="scale"):
            one.load_state_dict({**other.state_dict()})


@torch.no_grad()
def test_a_patched_module_is_called() -> None:
    made = model(join=True)
    before = next_token_loss(made, {"input_ids": IDS, "labels": IDS})
    head = made.lm_head.forward
    made.lm_head.forward = lambda x: 2 * head(x)
    assert abs(next_token_loss(made, {"input_ids": IDS, "labels": IDS}) - before) > 0.1


def test_targets_are_checked_and_what_is_no_number_shows() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(9, 8)
    with pytest.raises(ValueError, match="1 targets for 5 rows"):
        linear_cross_entropy(hidden, weight, torch.tensor([3]))
    assert linear_cross_entropy(hidden, weight, torch.tensor([3, -1, 2, 0, 1])).isnan()
    weight[0] = float("nan")
    assert linear_cross_entropy(hidden, weight, torch.arange(5)).isnan()


@pytest.mark.parametrize("options", LEARNT, ids=str)
def test_updates_are_not_lost_in_rounding(options: dict[str, bool]) -> None:
    assert learnt(**options) == pytest.approx(1, abs=0.2)  # 0.06 where they are added to what is rounded


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_of_a_sum_that_is_rounded_once(frozen: bool) -> None:
    torch.manual_seed(0)
    shapes = ((5, 7), (9, 7), (9,), (5, 3), (3, 9))
    x, weight, bias, left, right = (torch.randn(shape, requires_grad=True) for shape in shapes)
    for tensor in (x, weight, bias):
        tensor.requires_grad_(not frozen)
    wanted = [tensor for tensor in (x, weight, bias, left, right) if tensor.requires_grad]
    outputs = mm_and_low_rank(x, weight, None, bias, left, right), x @ weight.t() + bias + left @ right
    grad = torch.randn(5, 9)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(*(torch.autograd.grad(output, wanted, grad) for output in outputs))

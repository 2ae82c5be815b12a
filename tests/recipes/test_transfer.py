"""What a batch is on the device, and numbers that come back."""

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_automodel.recipes.transfer import Numbers, to_device
from tests.conftest import tiny, tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("mask", "kept"),
    [([[1, 1, 1], [1, 1, 0]], False), ([[1, 1, 1], [0, 1, 1]], True), ([[1, 0, 1], [1, 1, 1]], True)],
    ids=["right", "left", "hole"],
)
def test_a_mask_of_padding_on_the_right_is_left_out(mask: list[list[int]], kept: bool) -> None:
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.tensor(mask)}
    assert ("attention_mask" in to_device(batch, CPU)) == kept


def test_labels_stay_on_the_host() -> None:
    batch = {name: torch.zeros(2, 3, dtype=torch.long) for name in ("input_ids", "labels")}
    assert {name: value.device.type for name, value in to_device(batch, torch.device("meta")).items()} == {
        "input_ids": "meta",
        "labels": "cpu",
    }


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_without_that_mask_the_loss_and_its_gradients_are_the_same(attn: str) -> None:
    model = LlamaForCausalLM(tiny(attn=attn))
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    gradients = []
    for inputs in (batch, to_device(batch, CPU)):
        model.zero_grad()
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-5)  # other kernels, other sums


def test_numbers_come_back_as_they_were() -> None:
    loss = torch.tensor(0.1)
    numbers = Numbers(loss, torch.tensor(2.0, dtype=torch.float64))
    loss.zero_()
    assert numbers.read() == [torch.tensor(0.1).item(), 2.0]

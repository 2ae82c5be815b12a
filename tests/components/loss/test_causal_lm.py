"""The loss against transformers' own, as a sum, however the data is split."""

import pytest
import torch
from transformers import LlamaForCausalLM

from nemo_automodel.components.loss import IGNORE, next_token_loss, next_token_targets, valid_tokens
from tests.conftest import assert_near, assert_same_gradients, tiny, tokens, twins


def _batch(prompts: list[int], length: int = 9) -> dict[str, torch.Tensor]:
    ids = tokens(len(prompts), length)
    labels = ids.clone()
    for row, prompt in enumerate(prompts):
        labels[row, :prompt] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("prompts", [[0, 0], [3, 7], [8, 2, 5]])
def test_sum_and_gradients_equal_transformers_mean_times_count(prompts: list[int]) -> None:
    hf, ours = twins(LlamaForCausalLM, tiny())
    batch = _batch(prompts)
    loss = next_token_loss(ours, batch)
    count = valid_tokens(batch["labels"])
    expected = hf(**batch).loss * count
    assert_near(loss, expected)
    loss.backward()
    expected.backward()
    assert_same_gradients(ours, hf)


def test_rows_one_by_one_add_up_to_the_batch() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    batch = _batch([1, 6, 3])
    parts = [next_token_loss(ours, {name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    assert_near(torch.stack(parts).sum(), next_token_loss(ours, batch))


def test_a_batch_with_nothing_to_predict_is_zero_and_has_a_gradient() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    loss = next_token_loss(ours, _batch([9]))
    loss.backward()
    assert loss.item() == 0.0


def test_the_head_sees_supervised_positions_only() -> None:
    _, ours = twins(LlamaForCausalLM, tiny())
    seen = []
    ours.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[:-1].numel()))
    next_token_loss(ours, _batch([7, 8]))
    assert seen == [4]  # of nine positions in each of two rows, 6 and 7 predict tokens 7 and 8


def test_targets_and_counts() -> None:
    labels = torch.tensor([[5, 6, IGNORE, 7], [IGNORE, IGNORE, 8, 9]])
    assert next_token_targets(labels).tolist() == [[6, IGNORE, 7, IGNORE], [IGNORE, 8, 9, IGNORE]]
    assert valid_tokens(labels) == 4  # the first label of a row is never predicted

"""Products in float8 by torchao: which layers, how near, what is refused. Emulated, for there is no GPU."""

import importlib.util

import pytest
import torch
from transformers import LlamaConfig

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components import float8_training
from nemo_automodel.components.float8_training import check_float8, is_float8, to_float8
from nemo_automodel.components.loss import next_token_loss
from nemo_automodel.components.models.common import decoder
from nemo_automodel.recipes.checks import check_packing
from tests.conftest import randomize, tiny


class Rounds(torch.nn.Linear):
    """A layer of torchao's kind, which rounds as the largest of all tokens wants it."""

    __module__ = "torchao.float8.float8_linear"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().max() / 7
        return super().forward((x / scale).round() * scale)


@pytest.mark.parametrize("attn", ["sdpa", "blind"])
def test_packing_is_proved_whatever_float8_rounds_by(attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that share a scale see nothing of each other, unless their attention does."""
    model, rounds = randomize(NeMoAutoModelForCausalLM.from_config(tiny())), Rounds.forward
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.__class__ = Rounds
    assert is_float8(model.model.layers[0].mlp.down_proj)
    assert not is_float8(model.lm_head)
    ids, positions = torch.tensor([[3, 4, 5, 6, 0, 1], [3, 9, 9, 9, 0, 1]]), torch.tensor([[0, 1, 2, 3, 0, 1]])
    one, other = (model(row[None], position_ids=positions, use_cache=False).logits[:, 4:] for row in ids)
    assert not torch.equal(one, other)  # by the scale alone
    if attn == "sdpa":
        check_packing(model, torch.device("cpu"))
        assert not torch.equal(one, model(ids[1:], position_ids=positions, use_cache=False).logits[:, 4:])
        return
    monkeypatch.setitem(decoder.MASKS, "full_attention", lambda **options: None)
    with pytest.raises(ValueError, match="packed documents see each other"):
        check_packing(model, torch.device("cpu"))
    assert Rounds.forward is rounds


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_layers_are_rounded_and_saved_as_before(recipe: float8_training.Recipe) -> None:
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(config, dtype="bfloat16").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 48, (2, 13))  # 26 tokens, not a multiple of 16
    gradients = []
    for rounded in (False, True):
        if rounded:
            names = to_float8(model, recipe, emulate=True)
        model.zero_grad()
        next_token_loss(model, {"input_ids": ids, "labels": ids}).backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None})
    # down_proj has 72 channels
    assert {name.rpartition(".")[2] for name in names} == {"qkv_proj", "o_proj", "gate_up_proj"}
    assert len(names) == 6
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    plain, coarse = gradients
    assert plain.keys() == coarse.keys()
    for name, gradient in plain.items():
        away = (coarse[name] - gradient).norm() / gradient.norm()
        assert 0 < away < 0.25, (name, away)  # of roundings to 3 bits of mantissa


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_training, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torchao"):
        check_float8(torch.device("cuda"))
    monkeypatch.setattr(float8_training, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="needs a GPU"):
        check_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"8\.9 or higher.*has 8\.0"):
        check_float8(torch.device("cuda"))

"""The table of backends: its refusals, the alternatives that they name, and that it says what the code does."""

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_automodel import NeMoAutoModelForCausalLM
from nemo_automodel.components.models.common import capabilities
from nemo_automodel.components.models.common.backend import BackendConfig
from nemo_automodel.components.models.common.capabilities import (
    ATTENTIONS,
    BY_IMPLEMENTATION,
    FEATURES,
    TABLE,
    Need,
    Package,
    alternatives,
    missing,
    of_field,
    refuse,
)
from tests.conftest import tiny, tokens

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ASKED: dict[str, Any] = {
    **{"packing": True, "window": 7, "softcap": 50.0, "dropout": 0.1, "cache": True, "left_padding": True},
    **{"mask": True, "later": True, "deterministic": True, "tp": 2, "cp": 2, "kind": "layer norm"},
}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: False)


def test_every_feature_is_a_field_of_need_and_every_row_uses_their_names() -> None:
    assert set(ASKED) == set(FEATURES)
    for row in TABLE:
        assert set(row.has) <= set(FEATURES), row.title
        assert row.on, row.title
    assert all(name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) for name in BY_IMPLEMENTATION if name != "te")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.field} {row.name}")
def test_what_the_row_does_not_have_is_refused_by_name_and_no_alternative_lacks_it(row: Any) -> None:
    assert missing(row, Need()) is None
    for name in {name for each in of_field(row.field).values() for name in each.has}:
        value = ASKED[name]
        need = Need(**{name: value})
        if name in row.has:
            refuse(row, need)
            continue
        with pytest.raises(ValueError, match=f"{FEATURES[name].words.split(' (')[0].format(value)}") as refused:
            refuse(row, need)
        assert str(refused.value).startswith(row.title)
        for other in of_field(row.field).values():
            named = f"{other.name!r}" in str(refused.value).partition(": ")[2]
            assert not named or name in other.has


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("need", "expected"),
    [
        (Need(softcap=50.0), "'flex' or 'eager'"),
        (Need(softcap=50.0, device=CPU, backward=True), "'eager'"),
        (Need(dropout=0.1), "'sdpa' or 'eager'"),
        (Need(device=CUDA, dtype=torch.float32), "'sdpa' or 'flex' or 'eager'"),
        (Need(device=CUDA, dtype=torch.float64), "'sdpa' or 'eager'"),
        (Need(device=CUDA, head_dim=8, left_padding=True), "'sdpa' or 'eager'"),
    ],
    ids=str,
)
def test_the_alternatives_have_all_that_is_needed(need: Need, expected: str) -> None:
    assert alternatives(ATTENTIONS["varlen"], need) == f"backend.attn={expected}"


def test_an_alternative_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Package, "installed", lambda self: self.name == "FlashAttention 2")
    assert alternatives(ATTENTIONS["varlen"], Need(softcap=5.0)) == "backend.attn='flex' or 'flash2' or 'eager'"


def test_flash_attention_may_come_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers has it: neither a backend nor an attn_implementation by its name is refused before."""
    monkeypatch.setattr(capabilities, "find_spec", lambda name: object() if name == "kernels" else None)
    config = tiny()
    for name in ("flash2", "flash3", "flash4"):
        assert BackendConfig(attn=name).attn == name
        assert BackendConfig().apply_to(config, ATTENTIONS[name].implementation).attn == name
    with pytest.raises(ImportError, match="needs Transformer Engine, which is not installed"):
        BackendConfig(attn="te")


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    missing.cache_clear()
    with pytest.raises(ValueError, match=r"'varlen' has no kernel for GPUs of compute .* 7\.5, only from 8\.0 on: use"):
        refuse(ATTENTIONS["varlen"], Need(device=CUDA, dtype=torch.float16))
    missing.cache_clear()


def test_flex_does_not_train_on_a_cpu() -> None:
    model = NeMoAutoModelForCausalLM.from_config(tiny(), backend={"attn": "flex"})
    with pytest.raises(
        ValueError, match=r"'flex' has no backward pass on cpu: use backend.attn='sdpa' or 'eager', or t"
    ):
        model(tokens(1, 5))

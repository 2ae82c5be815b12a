"""The registry: lazy, with tags, open to classes from outside."""

import subprocess
import sys
from collections import OrderedDict

import pytest
from torch import nn

from nemo_automodel._transformers import registry
from nemo_automodel.components.models.llama import LlamaForCausalLM

MODELS = "nemo_automodel.components.models"
ARCHITECTURES = [name for name, entry in registry.MODEL_ARCH_MAPPING.items() if entry[0].startswith(MODELS)]


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.setattr(registry, "MODEL_ARCH_MAPPING", OrderedDict(registry.MODEL_ARCH_MAPPING))
    monkeypatch.setattr(registry, "_registered_classes", dict(registry._registered_classes))


class Outside(nn.Module):
    pass


def test_mapping_has_two_and_three_elements_and_tags():
    assert isinstance(registry.MODEL_ARCH_MAPPING, OrderedDict)
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"} <= set(ARCHITECTURES)
    module = f"{MODELS}.llama.model"
    assert registry.MODEL_ARCH_MAPPING["LlamaForCausalLM"] == (module, "LlamaForCausalLM")
    assert registry.MODEL_ARCH_MAPPING["LlamaForSequenceClassification"][2:] == ({"retrieval"},)
    assert registry.tags("LlamaForCausalLM") == frozenset()
    assert registry.tags("LlamaForSequenceClassification") == {"retrieval"}
    assert registry.architectures("retrieval") == [name for name in ARCHITECTURES if "Sequence" in name]
    assert set(ARCHITECTURES) <= set(registry.architectures())
    with pytest.raises(KeyError):
        registry.tags("NobodyForCausalLM")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_resolves_and_has_the_required_attributes(name):
    model_class = registry.resolve(name)
    assert model_class.__name__ == name
    module = sys.modules[model_class.__module__]
    if name.endswith("CausalLM"):
        assert module.ModelClass is model_class
        assert model_class._tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
        assert model_class._tp_plan == {"lm_head": "colwise_rep"}
        assert model_class._pp_plan == {"lm_head": (["hidden_states"], ["logits"])}
    assert model_class.base_model_prefix == "model"
    assert model_class.supports_gradient_checkpointing
    assert model_class._supports_sdpa or model_class._supports_flex_attn
    assert model_class._supports_flex_attn
    assert model_class._supports_flash_attn


def test_importing_it_imports_no_model():
    code = (
        "import sys\n"
        "from nemo_automodel._transformers import registry\n"
        f"families = lambda: [f for f in ('llama', 'qwen2') if '{MODELS}.' + f in sys.modules]\n"
        "assert families() == []\n"
        "registry.resolve('Qwen2ForCausalLM')\n"
        "assert families() == ['qwen2']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_from_outside():
    registry.register("OutsideForCausalLM", Outside, tags={"retrieval"})
    assert registry.resolve("OutsideForCausalLM") is Outside
    assert registry.tags("OutsideForCausalLM") == {"retrieval"}
    assert registry.MODEL_ARCH_MAPPING["OutsideForCausalLM"][:2] == (__name__, "Outside")
    with pytest.raises(ValueError, match="OutsideForCausalLM is registered already; pass exist_ok=True"):
        registry.register("OutsideForCausalLM", LlamaForCausalLM)
    registry.register("OutsideForCausalLM", f"{MODELS}.llama.model", exist_ok=True)
    assert registry.resolve("OutsideForCausalLM") is LlamaForCausalLM, "the module's ModelClass"
    assert registry.resolve("NobodyForCausalLM") is None


def test_editing_the_mapping_as_the_spec_shows():
    module = f"{MODELS}.qwen2.model"
    registry.MODEL_ARCH_MAPPING["TwoForCausalLM"] = (module, "Qwen2ForCausalLM")
    registry.MODEL_ARCH_MAPPING["ThreeForCausalLM"] = (module, "Qwen2ForCausalLM", {"retrieval", "other"})
    for name, tags in (("TwoForCausalLM", set()), ("ThreeForCausalLM", {"retrieval", "other"})):
        assert registry.resolve(name).__name__ == "Qwen2ForCausalLM"
        assert registry.tags(name) == tags


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((f"{MODELS}.llama.model", "Lama"), r"NobodyForCausalLM is registered as .*model\.Lama"),
        (("nemo_automodel.nowhere", "Lama"), "nowhere"),
    ],
)
def test_entries_that_lead_nowhere(entry, message):
    registry.MODEL_ARCH_MAPPING["NobodyForCausalLM"] = entry
    with pytest.raises(ImportError, match=message):
        registry.resolve("NobodyForCausalLM")

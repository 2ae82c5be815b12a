"""Which class implements which architecture, imported when it is asked for."""

from collections import OrderedDict
from collections.abc import Collection
from importlib import import_module
from typing import Any

_MODELS = "nemo_automodel.components.models"

MODEL_ARCH_MAPPING: OrderedDict[str, tuple[Any, ...]] = OrderedDict(
    [
        ("LlamaForCausalLM", (f"{_MODELS}.llama.model", "LlamaForCausalLM")),
        (
            "LlamaForSequenceClassification",
            (f"{_MODELS}.llama.model", "LlamaForSequenceClassification", {"retrieval"}),
        ),
        ("Qwen2ForCausalLM", (f"{_MODELS}.qwen2.model", "Qwen2ForCausalLM")),
        (
            "Qwen2ForSequenceClassification",
            (f"{_MODELS}.qwen2.model", "Qwen2ForSequenceClassification", {"retrieval"}),
        ),
        ("Qwen3ForCausalLM", (f"{_MODELS}.qwen3.model", "Qwen3ForCausalLM")),
        (
            "Qwen3ForSequenceClassification",
            (f"{_MODELS}.qwen3.model", "Qwen3ForSequenceClassification", {"retrieval"}),
        ),
        ("MistralForCausalLM", (f"{_MODELS}.mistral.model", "MistralForCausalLM")),
        (
            "MistralForSequenceClassification",
            (f"{_MODELS}.mistral.model", "MistralForSequenceClassification", {"retrieval"}),
        ),
        ("MinistralForCausalLM", (f"{_MODELS}.ministral.model", "MinistralForCausalLM")),
        (
            "MinistralForSequenceClassification",
            (f"{_MODELS}.ministral.model", "MinistralForSequenceClassification", {"retrieval"}),
        ),
        ("Ministral3ForCausalLM", (f"{_MODELS}.ministral3.model", "Ministral3ForCausalLM")),
        (
            "Ministral3ForSequenceClassification",
            (f"{_MODELS}.ministral3.model", "Ministral3ForSequenceClassification", {"retrieval"}),
        ),
        ("Exaone4ForCausalLM", (f"{_MODELS}.exaone4.model", "Exaone4ForCausalLM")),
        (
            "Exaone4ForSequenceClassification",
            (f"{_MODELS}.exaone4.model", "Exaone4ForSequenceClassification", {"retrieval"}),
        ),
        ("SeedOssForCausalLM", (f"{_MODELS}.seed_oss.model", "SeedOssForCausalLM")),
        (
            "SeedOssForSequenceClassification",
            (f"{_MODELS}.seed_oss.model", "SeedOssForSequenceClassification", {"retrieval"}),
        ),
        ("HunYuanDenseV1ForCausalLM", (f"{_MODELS}.hunyuan_v1_dense.model", "HunYuanDenseV1ForCausalLM")),
        (
            "HunYuanDenseV1ForSequenceClassification",
            (f"{_MODELS}.hunyuan_v1_dense.model", "HunYuanDenseV1ForSequenceClassification", {"retrieval"}),
        ),
        ("NemotronForCausalLM", (f"{_MODELS}.nemotron.model", "NemotronForCausalLM")),
        (
            "NemotronForSequenceClassification",
            (f"{_MODELS}.nemotron.model", "NemotronForSequenceClassification", {"retrieval"}),
        ),
        ("ApertusForCausalLM", (f"{_MODELS}.apertus.model", "ApertusForCausalLM")),
        ("ArceeForCausalLM", (f"{_MODELS}.arcee.model", "ArceeForCausalLM")),
        ("ArceeForSequenceClassification", (f"{_MODELS}.arcee.model", "ArceeForSequenceClassification", {"retrieval"})),
        ("GraniteForCausalLM", (f"{_MODELS}.granite.model", "GraniteForCausalLM")),
        ("GraniteMoeHybridForCausalLM", (f"{_MODELS}.granitemoehybrid.model", "GraniteMoeHybridForCausalLM")),
        ("GemmaForCausalLM", (f"{_MODELS}.gemma.model", "GemmaForCausalLM")),
        ("GemmaForSequenceClassification", (f"{_MODELS}.gemma.model", "GemmaForSequenceClassification", {"retrieval"})),
        ("Gemma2ForCausalLM", (f"{_MODELS}.gemma2.model", "Gemma2ForCausalLM")),
        (
            "Gemma2ForSequenceClassification",
            (f"{_MODELS}.gemma2.model", "Gemma2ForSequenceClassification", {"retrieval"}),
        ),
        ("Gemma3ForCausalLM", (f"{_MODELS}.gemma3.model", "Gemma3ForCausalLM")),
        (
            "Gemma3TextForSequenceClassification",
            (f"{_MODELS}.gemma3.model", "Gemma3TextForSequenceClassification", {"retrieval"}),
        ),
        ("SmolLM3ForCausalLM", (f"{_MODELS}.smollm3.model", "SmolLM3ForCausalLM")),
        (
            "SmolLM3ForSequenceClassification",
            (f"{_MODELS}.smollm3.model", "SmolLM3ForSequenceClassification", {"retrieval"}),
        ),
        ("Olmo2ForCausalLM", (f"{_MODELS}.olmo2.model", "Olmo2ForCausalLM")),
        ("Olmo2ForSequenceClassification", (f"{_MODELS}.olmo2.model", "Olmo2ForSequenceClassification", {"retrieval"})),
        ("Olmo3ForCausalLM", (f"{_MODELS}.olmo3.model", "Olmo3ForCausalLM")),
        ("Olmo3ForSequenceClassification", (f"{_MODELS}.olmo3.model", "Olmo3ForSequenceClassification", {"retrieval"})),
        ("Phi3ForCausalLM", (f"{_MODELS}.phi3.model", "Phi3ForCausalLM")),
        ("Phi3ForSequenceClassification", (f"{_MODELS}.phi3.model", "Phi3ForSequenceClassification", {"retrieval"})),
        ("GlmForCausalLM", (f"{_MODELS}.glm.model", "GlmForCausalLM")),
        ("GlmForSequenceClassification", (f"{_MODELS}.glm.model", "GlmForSequenceClassification", {"retrieval"})),
        ("Glm4ForCausalLM", (f"{_MODELS}.glm4.model", "Glm4ForCausalLM")),
        ("Glm4ForSequenceClassification", (f"{_MODELS}.glm4.model", "Glm4ForSequenceClassification", {"retrieval"})),
        ("CohereForCausalLM", (f"{_MODELS}.cohere.model", "CohereForCausalLM")),
        ("Cohere2ForCausalLM", (f"{_MODELS}.cohere2.model", "Cohere2ForCausalLM")),
        ("Ernie4_5ForCausalLM", (f"{_MODELS}.ernie4_5.model", "Ernie4_5ForCausalLM")),
        ("Starcoder2ForCausalLM", (f"{_MODELS}.starcoder2.model", "Starcoder2ForCausalLM")),
        (
            "Starcoder2ForSequenceClassification",
            (f"{_MODELS}.starcoder2.model", "Starcoder2ForSequenceClassification", {"retrieval"}),
        ),
        ("GPTNeoXForCausalLM", (f"{_MODELS}.gpt_neox.model", "GPTNeoXForCausalLM")),
        (
            "GPTNeoXForSequenceClassification",
            (f"{_MODELS}.gpt_neox.model", "GPTNeoXForSequenceClassification", {"retrieval"}),
        ),
    ]
)
"""Architecture (as in ``config.json``) -> ``(module_path, class_name)`` or ``(module_path, class_name, tags)``.

Tags say what else an architecture is for: ``retrieval`` marks those that score a text, as rerankers do.
"""

_registered_classes: dict[str, type] = {}


def register(architecture: str, model: type | str, *, tags: Collection[str] = (), exist_ok: bool = False) -> None:
    """Add an architecture from outside the package.

    Args:
        architecture: the name in ``config.json``'s ``architectures``.
        model: the class, or the path of a module whose ``ModelClass`` it is (imported when first asked for).
        tags: what else it is for.
        exist_ok: replace an architecture that is registered already.

    Raises:
        ValueError: the architecture is registered already.
    """
    if architecture in MODEL_ARCH_MAPPING and not exist_ok:
        raise ValueError(f"{architecture} is registered already; pass exist_ok=True to replace it")
    _registered_classes.pop(architecture, None)
    if isinstance(model, str):
        MODEL_ARCH_MAPPING[architecture] = (model, "ModelClass", set(tags))
    else:
        MODEL_ARCH_MAPPING[architecture] = (model.__module__, model.__qualname__, set(tags))
        _registered_classes[architecture] = model


def resolve(architecture: str) -> type | None:
    """The class that implements ``architecture``, None when none is registered.

    Raises:
        ImportError: the registered module cannot be imported, or has no such class.
    """
    if architecture not in MODEL_ARCH_MAPPING:
        return None
    if architecture in _registered_classes:
        return _registered_classes[architecture]
    module_path, class_name = MODEL_ARCH_MAPPING[architecture][:2]
    try:
        return getattr(import_module(module_path), class_name)
    except AttributeError as error:
        raise ImportError(
            f"{architecture} is registered as {module_path}.{class_name}, which does not exist"
        ) from error


def tags(architecture: str) -> frozenset[str]:
    """The tags of a registered architecture (empty where it has none).

    Raises:
        KeyError: the architecture is not registered.
    """
    return frozenset(*MODEL_ARCH_MAPPING[architecture][2:])


def architectures(tag: str | None = None) -> list[str]:
    """The registered architectures, or those with ``tag``."""
    return [name for name in MODEL_ARCH_MAPPING if tag is None or tag in tags(name)]

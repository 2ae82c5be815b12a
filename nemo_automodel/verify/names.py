"""One name for each tensor and module on both sides: the checkpoint's.

transformers' classes may call a module otherwise than their checkpoints do (GPT-NeoX's ``lm_head`` is stored as
``embed_out``), and rename it as they load and save.
"""

from typing import Any

from nemo_automodel.components.layout import Layout

_STORED = "_automodel_stored_names"


def call_as_stored(reference: Any, layout: Layout) -> Any:
    """Have `stored_name` answer for ``reference``, a class of transformers', by the implementation's table."""
    names = [name for name, _ in (*reference.named_modules(), *reference.named_parameters()) if name]
    stored = {name: layout.stored_name(name) for name in names}
    setattr(reference, _STORED, {name: other for name, other in stored.items() if other != name})
    return reference


def stored_name(model: Any, name: str) -> str:
    """What checkpoints call the module or parameter that ``model`` calls ``name``, where that is known to differ."""
    return getattr(model, _STORED, {}).get(name, name)

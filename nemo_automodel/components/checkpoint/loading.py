"""Fill a model that was built on the meta device from a checkpoint, tensor by tensor."""

import re
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from nemo_automodel.components.checkpoint.reading import CheckpointError, SafetensorsReader
from nemo_automodel.components.layout import Layout, PartKey

READERS = 4
"""Tensors in flight. Each costs the host its size while it is copied into the fused parameter."""

_SHOWN = 8


def load_parameters(
    model: nn.Module,
    reader: SafetensorsReader,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    tied: Mapping[str, str] | None = None,
    may_miss: Collection[str] = (),
    may_ignore: Collection[str] = (),
) -> set[str]:
    """Give every parameter and persistent buffer of ``model`` its values from the checkpoint.

    Names, shapes and dtypes are checked before anything is read. A tensor is read, cast, copied to its rows and
    dropped before the next one, so the host never holds more than the model and `READERS` tensors.

    Args:
        model: its parameters may be on the meta device; they are replaced.
        reader: the checkpoint.
        layout: which rows of which own parameter a Hugging Face tensor fills.
        dtype: of floating-point parameters.
        device: where the parameters go.
        tied: own name -> the name it is tied to; one of the two may be missing.
        may_miss: regular expressions of own names that the checkpoint need not have.
        may_ignore: regular expressions of checkpoint keys that the model need not use.

    Returns:
        The own names that the checkpoint does not have (tied ones, and those in ``may_miss``): still on meta.

    Raises:
        CheckpointError: keys missing, unexpected, of another shape or stored in 8 bits, all named at once.
    """
    own = dict(model.state_dict(keep_vars=True))
    plan = {key: place for key in reader if (place := layout.locate(key)).own in own}
    missing = _check(own, plan, reader, layout, tied or {}, may_miss, may_ignore)
    filled: dict[str, Tensor] = {}
    lock = threading.Lock()

    def read(key: str) -> None:
        place, value = plan[key], reader.read(key)
        target = dtype if own[place.own].is_floating_point() else own[place.own].dtype
        if place.fusion is None:
            filled[place.own] = value.to(device=device, dtype=target)
            return
        with lock:
            if place.own not in filled:
                filled[place.own] = torch.empty(own[place.own].shape, dtype=target, device=device)
        place.fusion.write_part(filled[place.own], place.part, value)

    with ThreadPoolExecutor(READERS) as pool:
        for done in [pool.submit(read, key) for key in plan]:
            done.result()
    for name, value in filled.items():
        assign(model, name, value)
    return missing


def assign(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer called ``name``."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[leaf] = value


def _check(
    own: Mapping[str, Tensor],
    plan: Mapping[str, PartKey],
    reader: SafetensorsReader,
    layout: Layout,
    tied: Mapping[str, str],
    may_miss: Collection[str],
    may_ignore: Collection[str],
) -> set[str]:
    problems: list[str] = []
    unexpected = [key for key in reader if key not in plan and not _matches(key, may_ignore)]
    problems += _named("not used by this model", unexpected)

    absent = {name: [key for key in layout.hf_keys(name) if key not in plan] for name in own}
    partners = dict(tied) | {source: target for target, source in tied.items()}
    excused = {
        name
        for name, keys in absent.items()
        if keys and len(keys) == len(layout.hf_keys(name)) and (absent.get(partners.get(name, name)) == [])
        or keys and _matches(name, may_miss)
    }
    problems += _named("missing", [key for name, keys in absent.items() if name not in excused for key in keys])

    for key, place in plan.items():
        shape = tuple(own[place.own].shape)
        wanted = place.fusion.part_shape(shape, place.part) if place.fusion else shape
        if reader.shape(key) != wanted:
            problems.append(f"{key}: shape {list(reader.shape(key))} where the config asks for {list(wanted)}")
        elif reader.dtype(key).itemsize == 1 and own[place.own].is_floating_point():
            problems.append(f"{key}: stored as {reader.dtype(key)}; quantized checkpoints are not read")
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise CheckpointError(f"{reader.path} does not fit the model:\n  " + "\n  ".join(shown))
    return excused


def _named(what: str, keys: list[str]) -> list[str]:
    return [f"{key}: {what}" for key in keys]


def _matches(key: str, patterns: Collection[str]) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)

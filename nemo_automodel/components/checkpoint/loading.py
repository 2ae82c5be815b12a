"""Fill a model that was built on the meta device from a checkpoint, piece by piece."""

import re
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from nemo_automodel.components.checkpoint.reading import CheckpointError, SafetensorsReader
from nemo_automodel.components.layout import Layout, PartKey

READERS = 4
"""Pieces in flight."""

PIECE = 4 * 2**20
"""Bytes of a piece, the unit of reading: small enough for the cache where it takes a detour to be permuted or cast."""

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

    Names, shapes and dtypes are checked before anything is read. Pieces of the tensors are read straight into the
    parameter, or permuted and cast on the way, so the host never holds more than the model and `READERS` pieces.

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
    located = {key: layout.locate(key) for key in reader}
    # a fused name in the file would be rows in an order that nobody knows: not used
    plan = {key: place for key, place in located.items() if place.own in own and key in layout.hf_keys(place.own)}
    missing = _check(own, plan, reader, layout, tied or {}, may_miss, may_ignore)
    filled = {
        name: torch.empty_like(own[name], dtype=dtype if own[name].is_floating_point() else None, device=device)
        for name in dict.fromkeys(place.own for place in plan.values())
    }
    with ThreadPoolExecutor(READERS) as pool:
        pieces = (piece for key, place in plan.items() for piece in _pieces(key, place, filled[place.own], reader))
        for _ in pool.map(lambda piece: reader.read_into(*piece), pieces):
            pass  # the first error ends it
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


def _pieces(key: str, place: PartKey, own: Tensor, reader: SafetensorsReader) -> Iterator[tuple[Tensor, str, int]]:
    """Views of ``own`` that together hold the tensor ``key``, each with the first of its elements."""
    view = place.fusion.part_view(own, place.part) if place.fusion else own.view(-1)
    block = view.shape[1:].numel()  # elements that lie together in both the file and the parameter
    step = max(1, PIECE // (block * reader.dtype(key).itemsize)) if block else 1
    for start, piece in enumerate(view.split(step)):
        yield piece, key, start * step * block


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
    unexpected = [key for key in reader if key not in plan and not matches(key, may_ignore)]
    problems += _named("not used by this model", unexpected)

    absent = {name: [key for key in layout.hf_keys(name) if key not in plan] for name in own}
    partners = dict(tied) | {source: target for target, source in tied.items()}
    excused = {
        name
        for name, keys in absent.items()
        if (keys and len(keys) == len(layout.hf_keys(name)) and (absent.get(partners.get(name, name)) == []))
        or (keys and matches(name, may_miss))
    }
    problems += _named("missing", [key for name, keys in absent.items() if name not in excused for key in keys])

    for key, place in plan.items():
        shape = tuple(own[place.own].shape)
        wanted = place.fusion.part_shape(shape, place.part) if place.fusion else shape
        if reader.shape(key) != wanted:
            problems.append(f"{key}: shape {list(reader.shape(key))} where the config asks for {list(wanted)}")
            continue
        stored, floating = reader.dtype(key), own[place.own].is_floating_point()
        if stored.is_floating_point != floating or (floating and stored.itemsize == 1):
            problems.append(f"{key}: stored as {stored}; quantized checkpoints are not read")
    refuse(reader, problems)
    return excused


def refuse(reader: SafetensorsReader, problems: list[str]) -> None:
    """Raise a CheckpointError that lists the first of the problems and counts the rest; none of them: do nothing."""
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise CheckpointError(f"{reader.path} does not fit the model:\n  " + "\n  ".join(shown))


def _named(what: str, keys: list[str]) -> list[str]:
    return [f"{key}: {what}" for key in keys]


def matches(key: str, patterns: Collection[str]) -> bool:
    """Whether any of the regular expressions is found in ``key``."""
    return any(re.search(pattern, key) for pattern in patterns)

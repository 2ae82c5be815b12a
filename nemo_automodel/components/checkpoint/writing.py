"""Write safetensors shards with bounded memory, and publish them so that a save is complete or invisible."""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nemo_automodel.components.checkpoint.reading import INDEX, SINGLE
from nemo_automodel.components.placement import whole
from nemo_automodel.components.together import Together

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_size: int | str = "5GB",
    together: Together | None = None,
) -> None:
    """Write ``model.safetensors``, or shards and their index, into ``folder``.

    The shards are dealt to the ranks in turn, and written while the next tensors are gathered: a rank holds two of its
    shards and one tensor on the host at most (one process alone: one shard and one tensor).

    Args:
        folder: exists and holds no weights yet.
        tensors: names and values, in the order they are written; the same on every rank. A DTensor is gathered, one
            at a time.
        max_shard_size: bytes, or text such as ``"5GB"``; a larger tensor gets a shard of its own.
        together: the ranks that write; each calls this function. Default: this process alone.

    Raises:
        ValueError: a ``max_shard_size`` that is not a size.
        AnotherRankFailed: another rank could not write; it gathered its share of every tensor all the same.
    """
    together = together or Together(alone=True)
    remaining = _numbered(tensors, parse_size(max_shard_size))
    shards: list[list[str]] = []
    total = 0

    def write_mine() -> None:
        nonlocal total
        written: Future[None] | None = None
        with ThreadPoolExecutor(1) as pool:
            for number, members in groupby(remaining, key=itemgetter(0)):
                shards.append([])
                mine: dict[str, Tensor] = {}
                for _, name, value in members:
                    shards[-1].append(name)
                    total += value.nbytes
                    if number % together.size == together.rank:
                        mine[name] = value.to("cpu").contiguous()
                if mine:
                    if written:
                        written.result()
                    written = pool.submit(save_file, mine, folder / f"shard-{number}", {"format": "pt"})
                    if together.size == 1:
                        written.result()
            if written:
                written.result()

    def write_mine_and_gather_all() -> None:
        try:
            write_mine()
        finally:  # a rank that could not write gathers on, so that the others do not wait for it for ever
            if together.size > 1:
                deque(remaining, maxlen=0)

    together.run(write_mine_and_gather_all)
    together.run(lambda: _name_shards(folder, shards, total), everywhere=False)


def _numbered(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[tuple[int, str, Tensor]]:
    """The number of each tensor's shard, its name and its whole value: who takes it has gathered it."""
    number = size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if size and size + nbytes > limit:
            number, size = number + 1, 0
        size += nbytes
        yield number, name, whole(tensor)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if not shards:
        save_file({}, folder / SINGLE, {"format": "pt"})
        return
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    weight_map = {key: name for keys, name in zip(shards, names, strict=True) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def publish_folder(
    folder: str | os.PathLike[str],
    write: Callable[[Path], None],
    *,
    replace: bool = False,
    together: Together | None = None,
) -> Path:
    """Let ``write`` fill a hidden folder aside, then publish it as ``folder``.

    A new ``folder`` appears by one rename, complete. Into an existing one the files move one by one: no weights of an
    earlier save are overwritten but by one step, that of ``model.safetensors`` or of the index, which switches from
    all of the old ones to all of the new ones. Then the old ones go; other files (a tokenizer, notes) stay. When
    ``write`` fails or is killed, ``folder`` is as it was; the next save clears away what it left.

    Args:
        folder: where to publish; made, with its parents, when it is not there.
        write: fills the folder it is given.
        replace: an existing ``folder`` gives way as a whole, files that ``write`` does not know included.
        together: the ranks that write, on a file system they share; each calls this function. Default: this process.

    Raises:
        NotADirectoryError: ``folder`` is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give a folder to save into")
    # inside a folder that stays: it may be a mount, whose parent is another file system
    merge = folder.exists() and not replace
    aside = folder / ".incomplete" if merge else folder.parent / f".{folder.name}.incomplete"
    together = together or Together(alone=True)
    together.run(lambda: _make_afresh(aside), everywhere=False)
    try:
        together.run(lambda: write(aside))
        together.run(lambda: _publish(aside, folder, merge), everywhere=False)
    finally:
        if together.leads:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _make_afresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(aside: Path, folder: Path, merge: bool) -> None:
    _sync(aside)
    if merge:
        _move_into(aside, folder)
    else:
        old = _hide(folder)
        aside.rename(folder)
        sync_path(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete ``folder`` so that it is gone at once and never found half deleted."""
    shutil.rmtree(_hide(folder))


def parse_size(size: int | str) -> int:
    """Bytes of ``5_000_000`` or ``"5MB"`` (decimal units, as Hugging Face counts them).

    Raises:
        ValueError: anything else.
    """
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]B)", size.strip().upper())
    if match is None:
        raise ValueError(f"size {size!r} is neither a number of bytes nor like '5GB'")
    return int(match[1]) * _UNITS[match[2]]


def _hide(folder: Path) -> Path:
    hidden = folder.parent / f".{folder.name}.discarded"
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        folder.rename(hidden)
    return hidden


def _move_into(aside: Path, folder: Path) -> None:
    if (aside / INDEX).is_file():
        _rename_clashing_shards(aside, folder)
    new = {file.name for file in aside.iterdir()}
    stale = []
    if any(_is_weights(name) for name in new):
        stale = [file for file in folder.iterdir() if _is_weights(file.name) and file.name not in new]
    # the index last: it is what makes the shards visible
    for name in sorted(new, key=lambda name: (name == INDEX, name.endswith(".json"), name)):
        os.replace(aside / name, folder / name)
    sync_path(folder)
    for file in stale:
        file.unlink()


def _rename_clashing_shards(aside: Path, folder: Path) -> None:
    index = json.loads((aside / INDEX).read_text())
    names = set(index["weight_map"].values())
    tag = 1
    while any((folder / _tagged(name, tag)).exists() for name in names):
        tag += 1
    for name in names:
        (aside / name).rename(aside / _tagged(name, tag))
    index["weight_map"] = {key: _tagged(name, tag) for key, name in index["weight_map"].items()}
    (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tagged(name: str, tag: int) -> str:
    """``model-00001-of-00002.safetensors`` -> itself for the first tag, then ``model.2-00001-of-00002.safetensors``."""
    return name if tag == 1 else name.replace("model-", f"model.{tag}-", 1)


def _is_weights(name: str) -> bool:
    return name == INDEX or re.fullmatch(r"model(\.\d+)?(-\d+-of-\d+)?\.safetensors", name) is not None


def _sync(folder: Path) -> None:
    """Flush to disk; and safetensors makes files that only their owner may read, whatever the umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Return once what ``path`` holds is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

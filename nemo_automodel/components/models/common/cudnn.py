"""Which cuDNN is loaded into this process: torch's, which Transformer Engine must take, or parts of two versions."""

import ctypes
import os
from pathlib import Path

MAPS = Path("/proc/self/maps")
"""Linux: what files are mapped into this process."""


def mixed() -> str | None:
    """Of which versions cuDNN is loaded, and what to do, in words; None where there is one, or none."""
    folders = sorted({str(file.parent) for file in _in_use()})
    if len(folders) < 2:
        return None
    return (
        f"parts of two versions of cuDNN, from {' and '.join(folders)}, whose gradients may be wrong: start Python "
        "with CUDNN_HOME and LD_LIBRARY_PATH set to the folder of torch's"
    )


def load_the_rest() -> None:
    """All libraries of the cuDNN of which torch has loaded some, since the loader goes by their names alone."""
    for folder in {file.parent for file in _in_use()}:
        # each after those that it needs, which is the alphabet's order but for these two
        needed = ("libcudnn_graph", "libcudnn_ops")
        for library in sorted(sorted(folder.glob("libcudnn*.so.*")), key=lambda file: not file.name.startswith(needed)):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ.setdefault("CUDNN_HOME", str(folder))  # where Transformer Engine looks first


def _in_use() -> list[Path]:
    """The files of cuDNN that are mapped into this process; none where the system does not say."""
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    names = {line.split(maxsplit=5)[5] for line in lines if "/libcudnn" in line}
    return [Path(os.path.realpath(name)) for name in names if Path(name).name.startswith(("libcudnn.so", "libcudnn_"))]

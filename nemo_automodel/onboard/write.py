"""Files onto the disk: what is there already and differs is left alone, shared files get one entry more."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A piece of text that a shared file gets once.

    Attributes:
        path: of the file.
        text: what is added.
        before: pattern of the place; the text goes in front of its first group.
        present: pattern that shows that it is there already.
    """

    path: Path
    text: str
    before: str
    present: str


def write(root: Path, files: Mapping[Path, str]) -> dict[str, str]:
    """Write ``files`` below ``root``; path -> what became of it. A file that differs is somebody's work, and kept."""
    done = {}
    for path, text in files.items():
        file = root / path
        if file.exists():
            same = file.read_text() == text
            done[str(path)] = "unchanged" if same else "kept: edited (it differs from what would be written)"
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        done[str(path)] = "written"
    return done


def insert(root: Path, entry: Entry) -> str:
    """Add ``entry`` to its file, unless it is there already; what became of it."""
    file = root / entry.path
    if not file.exists():
        return f"by hand, there is no such file: {entry.text.strip()}"
    text = file.read_text()
    if re.search(entry.present, text):
        return "unchanged"
    place = re.search(entry.before, text, re.DOTALL)
    if place is None:
        return f"by hand, no place for it was found: {entry.text.strip()}"
    at = place.start(1)
    file.write_text(text[:at] + entry.text + text[at:])
    return "one entry added"

"""The table of backends for the machine at hand, and in the page: ``python -m nemo_automodel.recipes.backends``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from nemo_automodel.components.models.common.capabilities import (
    FEATURES,
    TABLE,
    Capability,
    Need,
    absent,
    dtypes_in_words,
    head_dims_in_words,
    missing,
    of_field,
)

PAGE = Path("docs/backends.md")
BEGIN, END = "<!-- table: python -m nemo_automodel.recipes.backends -->", "<!-- end of table -->"

FIELDS = {"attn": "attention", "linear": "linear layers", "rms_norm": "norms", "rope_fusion": "fused RoPE"}
"""Field of `BackendConfig` -> its title."""


def here(device: torch.device) -> list[dict[str, Any]]:
    """A row for each implementation, as on this machine's ``device``.

    ``runs`` says whether it runs there, and ``why_not`` why not, with the install line where a package is missing.
    """
    return [_row(each, device) for each in TABLE]


def _row(each: Capability, device: torch.device) -> dict[str, Any]:
    gap, on = missing(each, Need(device=device)), each.on_device(device)
    why_not = absent(each) or (f"no {gap.what}" if gap is not None else None)
    return {
        "field": each.field,
        "name": each.name,
        "device": device.type,
        "what": each.what,
        "implementation": each.implementation,
        "runs": why_not is None,
        "why_not": why_not,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in on.dtypes] if on else [],
        "head_dim": head_dims_in_words(on.head_dims) if on and each.field == "attn" else None,
        "backward": on is not None and on.backward,
        "has": dict(each.has),
        "has_not": [name for name in features_of(each.field) if name not in each.has],
    }


def show(rows: Sequence[Mapping[str, Any]], device: torch.device, console: Console | None = None) -> None:
    """Print what runs on ``device`` and what it has not, and of the rest why it does not run, in lines for a shell."""
    console = console or Console(highlight=False)
    console.print(f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}", soft_wrap=True)
    for field, title in FIELDS.items():
        console.print(Text(f"\n{title} (backend.{field})", "bold"))
        for row in (each for each in rows if each["field"] == field):
            name, word, style = _value(row["name"]), *(("runs", "green") if row["runs"] else ("no", "yellow"))
            console.print(Text.assemble(f"  {name:<11} ", (f"{word:<5}", style), _said(row)), soft_wrap=True)


def _said(row: Mapping[str, Any]) -> str:
    """What it is and lacks here, or why it does not run."""
    if not row["runs"]:
        return str(row["why_not"])
    lacks = [] if row["backward"] else [f"no training on {row['device']}"]
    lacks += [f"no {FEATURES[name].title}" for name in row["has_not"]]
    return "; ".join([row["what"], ", ".join(lacks)] if lacks else [row["what"]])


def _value(name: str | bool) -> str:
    """As YAML has it."""
    return str(name).lower()


def features_of(field: str) -> list[str]:
    """Names of the features that any implementation of that field has, in the table's order."""
    return [name for name in FEATURES if any(name in each.has for each in of_field(field).values())]


def written(page: str) -> str:
    """The page with its tables made anew.

    Raises:
        ValueError: the page has no place for them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no lines {BEGIN} and {END}")
    return before + begin + "\n" + "\n".join(map(_markdown, FIELDS)) + end + after


def _markdown(field: str) -> str:
    """One implementation a column, for they are fewer than what there is to say of each."""
    rows, attention = list(of_field(field).values()), field == "attn"
    cells: dict[str, list[str]] = {
        "device": [", ".join(_kind(kind, each) for kind in each.on) for each in rows],
        "dtypes": [" / ".join(dtypes_in_words(on.dtypes) for on in each.on.values()) for each in rows],
    }
    if attention:
        cells["`attn_implementation`"] = [f"`{each.implementation}`" if each.implementation else "" for each in rows]
        cells["head_dim"] = [" / ".join(head_dims_in_words(on.head_dims) for on in each.on.values()) for each in rows]
    cells["backward"] = [" / ".join("yes" if on.backward else "no" for on in each.on.values()) for each in rows]
    cells |= {FEATURES[name].title: [each.has.get(name, "no") for each in rows] for name in features_of(field)}
    cells["package"] = [f"{each.package.name}: `{each.package.install}`" if each.package else "" for each in rows]
    lines = [f"| `backend.{field}` | {' | '.join(f'`{_value(each.name)}`' for each in rows)} |"]
    lines += ["|---" * (len(rows) + 1) + "|", f"| what | {' | '.join(each.what for each in rows)} |"]
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in cells.items() if any(values)]
    return "\n".join([f"### {FIELDS[field][0].upper()}{FIELDS[field][1:]}", "", *lines, ""])


def _kind(kind: str, each: Capability) -> str:
    compute = each.on[kind].compute
    return f"{kind} {'{}.{}'.format(*compute)}+" if compute > (0, 0) else kind


def main() -> None:
    """Write the page."""
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()

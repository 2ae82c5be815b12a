"""``automodel new``: from a ``config.json`` to the files of a family, verified, and what is left to do by hand."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import nemo_automodel
from nemo_automodel._transformers import registry
from nemo_automodel.components.models.common.pretrained import fetch
from nemo_automodel.onboard.config_fields import NotDense, refuse_if_not_dense
from nemo_automodel.onboard.describe import Family, describe
from nemo_automodel.onboard.render import docs_row, in_repository, registry_entries, stand_alone
from nemo_automodel.onboard.words import account, todo
from nemo_automodel.onboard.write import Entry, insert, write
from nemo_automodel.verify import Report, find_target, verify
from nemo_automodel.verify.table import Table

_REGISTRY = Path("nemo_automodel/_transformers/registry.py")


@dataclass(frozen=True)
class Outcome:
    """What `new` did.

    Attributes:
        family: what was found out.
        files: path -> ``"written"``, ``"unchanged"``, ``"kept: edited ..."`` or, for shared files, what was added.
        report: of the verification.
        left: what is to be done by hand.
    """

    family: Family
    files: dict[str, str]
    report: Report
    left: list[str]


def new(
    name: str,
    source: str | Path,
    *,
    like: str = "llama",
    out: Path | None = None,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Write the files of a dense family, verify them, and say what is left.

    Args:
        name: of the family's module, such as ``"qwen3"``.
        source: a ``config.json``, a folder with one, or a Hub id.
        like: the model type that it is compared with.
        out: a folder of its own; default: the repository that this library runs from.
        quick: leave the slow checks of the verification out.
        say: gets what the user reads, a line or more at a time.

    Raises:
        NotDense: the architecture is none that this tool can write.
        ValueError: a bad name or ``like``, or an architecture that is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name for a module: small letters, digits and _, such as 'qwen3'")
    root = _repository() if out is None else out
    file, config, fields = read_config(source)
    family = describe(config, fields)
    other = describe(_config_of(like), {})
    say(f"{family.reference_class.__name__}: a dense decoder")
    say(account(family, other))
    if out is None:
        _refuse_registered(family, name)
        files = write(root, in_repository(family, other, name))
        model = root / "nemo_automodel/components/models" / name / "model.py"
    else:
        files = write(root, stand_alone(family, other, name, file.read_text()))
        model = root / "model.py"
    say(f"\n{_listed(files)}\n")
    report = _verified(model, file, quick)
    shared = {}
    if out is None:
        # an implementation that is wrong must not take the place of transformers' class
        shared = {
            str(entry.path): insert(root, entry) if report.passed else "by hand: run this again once it verifies"
            for entry in entries(family, other, name)
        }
        say(f"\n{_listed(shared)}")
    left = [*todo(family), *_failures(report)]
    left += [f"{path}: {what}" for path, what in shared.items() if what.startswith("by hand")]
    items = "".join(f"\n  - {line}" for line in left) or "nothing"
    say(f"\n{report.summary()}\nleft to do by hand: {items}")
    if not report.passed:
        say(f"edit {model}, then: automodel verify {model} --config {file}")
    return Outcome(family, files | shared, report, left)


def read_config(source: str | Path) -> tuple[Path, PreTrainedConfig, dict[str, Any]]:
    """The config file, what transformers makes of it, and its fields as written.

    Raises:
        NotDense: not a dense decoder-only model, or one that transformers does not know.
        ValueError: not a config.
    """
    file = Path(source)
    if not file.is_file():
        file = fetch(source, weights=False) / "config.json"
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"{file} has no model_type: it is not the config.json of a checkpoint")
    refuse_if_not_dense(fields)
    try:
        return file, AutoConfig.from_pretrained(file), fields
    except (KeyError, ValueError, TypeError) as error:
        remote = " (auto_map: it comes with code of its own, which is not run)" if "auto_map" in fields else ""
        raise NotDense(
            f"{file}: transformers cannot read model_type={fields['model_type']!r}{remote}, so there is no reference "
            f"to compare with: {error}"
        ) from error


def entries(family: Family, like: Family, name: str) -> list[Entry]:
    """What the shared files of the repository get."""
    return [
        Entry(_REGISTRY, registry_entries(family, name), r"\n( {4}\]\n\))", rf'"{family.reference_class.__name__}"'),
        Entry(
            Path("docs/models.md"), docs_row(family, like, name), r"\n\|[^\n]*\|\n((?!\|))", rf"models/{name}/model\.py"
        ),
    ]


def _config_of(like: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(like)
    except ValueError as error:
        raise ValueError(f"--like {like}: transformers has no such model type") from error


def _repository() -> Path:
    root = Path(nemo_automodel.__file__).parent.parent
    if not (root / "pyproject.toml").is_file() or not (root / _REGISTRY).is_file():
        raise ValueError(
            f"the library is installed in {root}, which is no checkout of its repository; say --out FOLDER"
        )
    return root


def _refuse_registered(family: Family, name: str) -> None:
    architecture = family.reference_class.__name__
    module = registry.MODEL_ARCH_MAPPING.get(architecture, (None,))[0]
    if module not in (None, f"nemo_automodel.components.models.{name}.model"):
        raise ValueError(f"{architecture} is there already, in {module}: checkpoints of that architecture load as it")


def _listed(files: dict[str, str]) -> str:
    return "\n".join(f"  {path:<60} {what}" for path, what in files.items())


def _verified(model: Path, config: Path, quick: bool) -> Report:
    target = find_target(model, config)
    with Table(target) as table:
        return verify(target, quick=quick, on_start=table.start, on_result=table.add)


def _failures(report: Report) -> list[str]:
    """A line for each thing that is wrong, however many checks it fails."""
    checks: dict[str, list[str]] = {}
    for result in report.results:
        if result.outcome.passed is False:
            checks.setdefault(result.outcome.detail, []).append(f"{result.group}, {result.name}")
    more = {detail: f" (and {len(names) - 1} more)" if len(names) > 1 else "" for detail, names in checks.items()}
    return [f"{names[0]}{more[detail]}: {detail}" for detail, names in checks.items()]

"""Run the checks on a target, one after the other."""

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_automodel.verify.check import Check
from nemo_automodel.verify.checks import all_checks
from nemo_automodel.verify.checks.weights import FIRST
from nemo_automodel.verify.outcome import NotApplicable, Outcome
from nemo_automodel.verify.report import Report, Result
from nemo_automodel.verify.subject import Subject
from nemo_automodel.verify.target import Target, find_target


def verify(
    target: str | Path | Target,
    *,
    config: str | Path | None = None,
    reference: str | None = None,
    meshes: Sequence[str] = (),
    quick: bool = False,
    device: str = "cpu",
    on_start: Callable[[Check], None] = lambda check: None,
    on_result: Callable[[Result], None] = lambda result: None,
) -> Report:
    """Compare an implementation with its reference, weight by weight, module by module and end to end.

    Args:
        target: a checkpoint folder, a ``config.json``, a registered architecture or a ``model.py``; see `find_target`.
        config: for an architecture or a ``model.py``.
        reference: the class to compare with; default: transformers' of the same architecture.
        meshes: ``"fsdp=2"``, ``"tp=2"``, ``"fsdp=2,tp=2"``: each is tried on gloo ranks of this machine.
        quick: leave the slow checks out.
        device: where the models run.
        on_start: called before each check.
        on_result: called with each result as it comes.

    Raises:
        TargetError: the target is nothing that can be verified.
    """
    found = target if isinstance(target, Target) else find_target(target, config, reference)
    checks = [check for check in all_checks(found, meshes) if not (quick and check.slow)]
    results = []
    with _quiet(), Subject(found, device) as subject:
        for check in checks:
            on_start(check)
            start = time.perf_counter()
            outcome, trouble = _outcome(check, subject)
            results.append(Result(check.group, check.name, outcome, time.perf_counter() - start, trouble))
            on_result(results[-1])
            if check.name == FIRST and outcome.passed is False:
                break  # every other check would say the same
    return Report(
        target=found.name,
        implementation=f"{found.model_class.__module__}.{found.model_class.__name__}",
        reference=f"{found.reference_class.__module__}.{found.reference_class.__name__}",
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        device=_device_name(device),
        shrunk=found.changed,
        results=tuple(results),
        not_run=len(checks) - len(results),
    )


def assert_verified(target: str | Path | Target, **options: Any) -> Report:
    """For tests: `verify`, and an AssertionError that lists what failed. ``quick`` is True unless said otherwise."""
    report = verify(target, **{"quick": True, **options})
    assert report.passed, "\n".join(report.failures())
    return report


def _outcome(check: Check, subject: Subject) -> tuple[Outcome, str]:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return check.run(subject), ""
    except NotApplicable as reason:
        return Outcome(None, str(reason)), ""
    except Exception as error:  # whatever the implementation raises is a finding, and the other checks go on
        message = str(error).strip() or "no message"
        return Outcome(False, f"{type(error).__name__}: {message}"), traceback.format_exc()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and warnings about tiny models would drown the table."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logger = logging.getLogger("nemo_automodel")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _device_name(device: str) -> str:
    kind = torch.device(device)
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else str(kind)

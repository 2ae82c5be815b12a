"""Stop between two optimizer steps when asked to, so that nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nemo_automodel.recipes.exits import ExitCode


class Stopped(KeyboardInterrupt):
    """A training ended early because it was asked to, and has saved.

    Attributes:
        exit_code: `ExitCode.INTERRUPTED` after Ctrl-C, `ExitCode.TERMINATED` after SIGTERM.
    """

    def __init__(self, exit_code: ExitCode):
        super().__init__()
        self.exit_code = exit_code


class StopRequests:
    """Whether this process was asked to stop, and by what.

    Attributes:
        exit_code: of a process that stops now; where another rank was asked, not this one, as after SIGTERM.
    """

    def __init__(self) -> None:
        self.came = False
        self.exit_code = ExitCode.TERMINATED

    def __call__(self) -> bool:
        """Whether a request came."""
        return self.came

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Handle signal ``number``: remember it; a second Ctrl-C raises KeyboardInterrupt at once."""
        if self.came:
            # schedulers repeat SIGTERM while the save is under way: only a person means it
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.came = True
        self.exit_code = ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Within the block, Ctrl-C and SIGTERM are remembered; what is given tells whether one came.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread signals cannot be caught: nothing changes.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    before = {number: signal.signal(number, requests.remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Signals that ask a run to stop: Ctrl-C, a cluster's notice that the machine is wanted back, a terminal that closes."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME = 0.5  # seconds within which two signals are one: torchrun repeats a terminal's Ctrl-C, and timeout signals twice


class Abandoned(BaseException):
    """What a signal raises in work that may be dropped."""


class Interruption:
    """While the `with` block lasts, a first signal only sets `signum`, for the loop to look at between two steps; a second one
    ends the process at once.

    Args:
        quiet: do not say so.
    """

    def __init__(self, quiet: bool = False):
        self.signum, self.quiet = 0, quiet
        self.droppable = False

    def __enter__(self) -> "Interruption":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            self.before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in self.before.items():
            if handler is not signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores SIGHUP; a script's "&", SIGINT
                signal.signal(number, self.note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def note(self, signum: int, frame: object) -> None:
        """The signals' handler."""
        now = time.monotonic()
        if self.signum and now > self.noted + SAME:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.noted = signum, now
            if not self.quiet:
                with contextlib.suppress(OSError):  # the terminal may be gone; print may not be used in the middle of anything
                    os.write(2, b"\nStopping after this step; once more to stop at once.\n")
            if self.droppable:
                raise Abandoned

    @contextlib.contextmanager
    def abandoning(self, allowed: bool = True) -> Iterator[None]:
        """A block that the first signal cuts short, if allowed."""
        with contextlib.suppress(Abandoned):
            try:
                self.droppable = allowed
                yield
            finally:
                self.droppable = False

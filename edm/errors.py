"""What goes wrong outside the mathematics, said in one line to a person."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, what is allowed. The scripts print it and exit with code 2."""


class Stopped(Exception):
    """A signal has ended a run between two steps, after a checkpoint."""

    def __init__(self, signum: int, step: int):
        super().__init__(signum, step)
        self.signum, self.step = signum, step


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, if any is near, and all of them."""
    allowed = list(allowed)
    match = difflib.get_close_matches(name[:100], allowed, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Allowed: {', '.join(allowed)}"


def brief(value: object) -> str:
    """A value as an error message shows it: at most 60 characters, however large or nested it is."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    names = {None: "nothing", True: "true", False: "false"}
    text = names[value] if isinstance(value, bool | None) else SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60

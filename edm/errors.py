"""What goes wrong outside the mathematics, said in one line to a person."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. Its text is one line: what is wrong, where, what is allowed. The scripts print it and exit with code 2."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest valid one, if any is near, and all of them."""
    allowed = list(allowed)
    match = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Allowed: {', '.join(allowed)}"

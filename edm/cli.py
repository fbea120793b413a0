"""What the command-line scripts share."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable

from edm.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest valid option."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str):
        unknown = message.rpartition("unrecognized arguments: ")[2].split(" ")[0].split("=")[0]
        match = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
        hint = f"; did you mean {match[0]}?" if match else "; see --help"
        raise UserError(f"{message}{hint}")


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return value

    return parse


def seed_list(text: str) -> list[int]:
    """An argparse type: "0-3,100" -> [0, 1, 2, 3, 100]. At most a million seeds from 0 to 2^32 - 1, none of them twice."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})\s*(?:-\s*(\d{1,10})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**32:
            raise argparse.ArgumentTypeError(f"{part!r} is neither a seed nor a range; write 0-63,100 (0 to {2**32 - 1})")
        ranges.append(range(first, last + 1))
    if sum(map(len, ranges)) > 1_000_000:
        raise argparse.ArgumentTypeError("more than a million seeds; sample them in parts")
    seeds = [seed for part in ranges for seed in part]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def run(main: Callable[[], None]) -> None:
    """Call a script's main function; an error a person (or their system) can mend ends in one line, exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None

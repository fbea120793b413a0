"""Helpers that the commands share: options, and errors that end in one line."""

import argparse
import difflib
import io
import os
import re
import reprlib
import signal
import sys
from collections.abc import Callable, Iterable

import torch.distributed as dist


class UserError(Exception):
    """An error that the user can correct. Its text is one line: what is wrong, where, and what is allowed."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the nearest allowed name, if one is close, and all of them."""
    allowed = list(allowed)
    match = difflib.get_close_matches(name[:100], allowed, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Allowed: {', '.join(allowed)}"


def brief(value: object) -> str:
    """Return a value as error messages show it: at most 60 characters, however large or nested it is."""
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    names = {None: "nothing", True: "true", False: "false"}
    text = names[value] if isinstance(value, bool | None) else SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 60


def one_line(text: str) -> str:
    """Return a message as one line of at most 1,000 printable characters, even if it quotes a file from the internet."""
    text = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return text if len(text) <= 1000 else text[:997] + "..."


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and suggests the nearest option for a misspelt one."""

    def __init__(self, description: str):
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str):
        """Raise a `UserError` with argparse's message and a hint."""
        message = message.replace(", section.key=value", "")  # argparse takes optional overrides for required
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.+)\)", message):
            unknown, allowed = choice[1], re.findall(r"\w+", choice[2])
        else:
            _, is_unknown, rest = message.partition("unrecognized arguments: ")
            unknown, allowed = rest.split(" ")[0].split("=")[0], self._option_string_actions if is_unknown else ()
        match = difflib.get_close_matches(unknown, allowed, n=1)
        raise UserError(f"{message}; did you mean {match[0]}?" if match else f"{message}; see --help")


def whole_number(minimum: int, maximum: int = 1_000_000) -> Callable[[str], int]:
    """Return an argparse type that accepts a whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {minimum} to {maximum:,}")
        return value

    return parse


def seed_list(text: str) -> list[int]:
    """Convert "0-3,100" to [0, 1, 2, 3, 100] (an argparse type).

    Raises:
        argparse.ArgumentTypeError: a part is neither a seed from 0 to 2^32 - 1 nor a range of seeds, a seed is named twice, or
            there are more than a million.
    """
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


def run_script(main: Callable[[], None]) -> None:
    """Call the main function of a script and turn its errors into exit codes.

    A `UserError` prints one line and exits with code 2, Ctrl-C exits with code 130. A closed output, as in `| head`, exits
    silently with code 141, like any command that SIGPIPE ends. Characters that the terminal cannot show are escaped.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's streams are not, and take any character
            stream.reconfigure(errors="backslashreplace")
    os.environ["MPLBACKEND"] = "agg"  # commands draw into files alone, whatever is set for other programs
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by lab/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        print(end="", flush=True)  # a closed output raises here rather than while Python exits
    except (UserError, UnicodeEncodeError) as error:
        if isinstance(error, UnicodeEncodeError):  # of a path, as streams escape what they lack
            error = f"file names cannot hold {brief(error.object)} in the encoding {error.encoding}; set PYTHONUTF8=1"
        rank = int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0
        if rank == 0 or dist.is_initialized():  # before that, all ranks fail in the same way
            sys.stderr.write(f"error{f' on rank {rank}' if rank else ''}: {one_line(str(error))}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        for descriptor in (1, 2):  # Python flushes both once more when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        raise SystemExit(141) from None
    finally:
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()  # otherwise gloo's threads sometimes abort the process while it exits

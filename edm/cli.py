"""What the command-line scripts share."""

import argparse
import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from typing import TextIO

import torch.distributed as dist

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


def whole_number(minimum: int, maximum: int = 1_000_000) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum` to `maximum`."""

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
    """Call a script's main function; an error that a person (or their system) can mend ends in one line, exit code 2."""
    rank = int(os.environ.get("RANK", 0)) if dist.is_torchelastic_launched() else 0
    before, streams = signal.signal(signal.SIGTERM, terminate), (sys.stdout, sys.stderr)
    sys.stdout, sys.stderr = map(Lossy, streams)
    try:
        main()
    except (UserError, OSError) as error:
        if rank == 0 or dist.is_initialized():  # what goes wrong before the processes have met goes wrong in all of them
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.stdout, sys.stderr = streams
        for stream in filter(None, streams):
            try:
                stream.flush()
            except OSError:  # nor could it on leaving, which would change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Lossy:
    """A stream that drops what nobody can receive: no run ends because the terminal that showed its progress is gone, or
    because it was closed (None) to begin with."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def terminate(signum: int, frame: object) -> None:
    """SIGTERM leaves by way of every `finally`, like Ctrl-C; unless an error is on its way out already, which says more."""
    if isinstance(sys.exc_info()[1], UserError | RuntimeError):
        return
    with contextlib.suppress(OSError):  # print may not be used in the middle of anything
        os.write(2, b"\nTerminated.\n")
    raise SystemExit(128 + signum)


def one_line(message: str) -> str:
    """A message that a stranger's file has had a part in: at most 1,000 characters, none of which moves the cursor."""
    text = "".join(character if character.isprintable() else "?" for character in " ".join(message.split()))
    return text if len(text) <= 1000 else text[:997] + "..."


def command_to_resume(argv: list[str]) -> str:
    """The command line that goes on with the run which this one has begun."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume_from")
    parser.add_argument("--load_model_weights_from_checkpoint")
    parser.add_argument("--overwrite", action="store_true")
    kept = parser.parse_known_args(argv[1:])[1]
    program = ["python"]
    if dist.is_torchelastic_launched():
        local_size, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        program = [
            "torchrun",
            f"--nproc_per_node={local_size}",
            *([f"--nnodes={size // local_size}"] if size > local_size else []),
        ]
    return shlex.join([*program, argv[0], "--resume_from", "latest", *kept])

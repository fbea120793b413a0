"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edm.errors import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file through a temporary one beside it: fsync, then rename, so that a power cut leaves the old file or the new.

    Args:
        path: the file; its folder is made where missing.
        write: called with the open temporary file.

    Raises:
        UserError: the folder cannot be written to, or the disk is full. The old file is intact.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut (where the system lets folders be opened)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

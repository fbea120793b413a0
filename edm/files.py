"""Files that are written whole or not at all, and folders that one process holds."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from edm.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


class Hold:
    """A folder that no other process holds: made where missing, held until `release` or the process's end, however it ends, and
    cleared of what a holder that was killed has left half written.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.locked()
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        except BlockingIOError:
            raise UserError(
                f"another run is training in {folder}; wait for it, stop it, or give --output_dir another folder"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None

    def locked(self) -> BinaryIO:
        """The lock's file, open and locked."""
        while True:
            file = open(self.path, "ab")  # noqa: SIM115
            try:
                if fcntl:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.close()
                raise BlockingIOError from None
            except OSError:  # a file system without locks
                return file
            if os.path.exists(self.path) and os.path.samestat(os.fstat(file.fileno()), os.stat(self.path)):
                return file
            file.close()  # that of a holder who was just letting go

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.file.close()

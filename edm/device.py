"""Where the arithmetic runs, and in which precision."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator

import torch

from edm.errors import UserError


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the best one there is: CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: the device is unknown, or not on this machine.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name is None:
        return torch.device(available[0])
    if name not in available:
        raise UserError(f"--device: {name!r} is not on this machine; allowed: {', '.join(available)}")
    return torch.device(name)


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """The precision of the network's matrix products; float32 means no mixed precision (and no TF32 in convolutions).

    Args:
        mixed_precision: "no", "fp16", "bf16", or "auto": bf16 on GPUs whose tensor cores have it (compute capability 8.0 on;
            a T4, 7.5, only emulates it, slowly, and still reports it as supported), fp16 from 7.0 on, float32 elsewhere.

    Raises:
        UserError: fp16 on an Apple GPU.
    """
    if mixed_precision == "auto" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        mixed_precision = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "no"
    if mixed_precision == "no":  # cuDNN's default, TF32, is no float32: an image would depend on its batch
        torch.backends.cudnn.allow_tf32 = False
    if mixed_precision == "fp16" and device.type == "mps":
        raise UserError("mixed_precision: fp16 is not supported on Apple GPUs; allowed: auto, no, bf16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Matrix products in `precision` inside the block; float32 leaves everything as it is.

    Of random weights, which magnify rounding, fp16 moves D by less than 1% and its gradients by less than 3% of their size,
    bf16 by less than 6% and 12% (`tests/test_fast_paths.py`).
    """
    return contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def keep_memory() -> None:
    """Have the C library keep freed memory, until the process ends, for the next step. Left alone, glibc hands blocks as large
    as a batch's features back to the system, which clears them anew in every step: a twentieth of a training step on a CPU."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # other C libraries have no such function
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU's, or the CPU's, memory is used up."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search(r"out of memory|not enough memory|can't allocate memory", str(error)) is not None
    )


@contextlib.contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Running out of memory in the block, on a GPU or off it, becomes a `UserError` with the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(f"out of memory: {advice}{f' ({reason:.200})' * bool(reason)}") from None

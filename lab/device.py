"""The device and the precision of the arithmetic."""

import contextlib
import re
from collections.abc import Iterator

import torch

from lab.cli import UserError


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or by default the best one of this machine: CUDA, else Apple's MPS, else the CPU.

    Raises:
        UserError: this machine has no such device.
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
    """Return the precision of the network's matrix products. float32 means no mixed precision, and turns TF32 off.

    Args:
        mixed_precision: "no", "fp16", "bf16", or "auto": bf16 on GPUs of compute capability 8.0 or higher, fp16 from 7.0 on,
            float32 elsewhere. (A T4, 7.5, reports that it supports bf16, but emulates it slowly.)
        device: where the network runs.

    Raises:
        UserError: fp16 on an Apple GPU.
    """
    if mixed_precision == "auto" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        mixed_precision = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "no"
    if mixed_precision == "no":  # with TF32, the default of cuDNN, an image would depend on the batch that it is made in
        torch.backends.cudnn.allow_tf32 = False
    if mixed_precision == "fp16" and device.type == "mps":
        raise UserError("mixed_precision: fp16 is not supported on Apple GPUs; allowed: auto, no, bf16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return a context in which matrix products run in `precision`; float32 leaves everything as it is.

    With random weights, which magnify rounding, fp16 changes D by less than 1% and its gradients by less than 3% of their
    size, bf16 by less than 6% and 12%.
    """
    return contextlib.nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished all work that was queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextlib.contextmanager
def explain_device_errors(advice: str) -> Iterator[None]:
    """Turn running out of memory in the block, on a GPU or the CPU, and a failed torch.compile into a `UserError`.

    Args:
        advice: what to do when memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed, so leave out training.compile or --compile ({reason:.200})") from None
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not re.search(r"out of memory|not enough memory|can't allocate memory", str(error)):
            raise
        raise UserError(f"out of memory: {advice}{f' ({reason:.200})' * bool(reason)}") from None

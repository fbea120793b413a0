"""The device and the precision of the arithmetic."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from lab.cli import UserError

T = TypeVar("T")


def pick_device(name: str | None = None) -> torch.device:
    """Return the named device, or by default the best one of this machine: CUDA, else Apple's MPS, else the CPU.

    A numbered GPU becomes the current one. From now on float32 is float32 in every part of PyTorch: with TF32, cuDNN's default
    for convolutions, an image would depend on the batch that it is made in.

    Raises:
        UserError: this machine has no such device, or the installed PyTorch was not built for this GPU.
    """
    torch.backends.cudnn.allow_tf32 = False
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = ["cuda"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    name = available[0] if name is None else name
    if name not in available:
        raise UserError(f"--device: {name!r} is not on this machine; allowed: {', '.join(available)}")
    device = torch.device(name)
    if device.type == "cuda":
        check_kernels(device)
        if device.index is not None:
            torch.cuda.set_device(device)  # for what names no device: events, pinned memory, random numbers
    return device


def check_kernels(device: torch.device) -> None:
    """Raise a `UserError` if the installed PyTorch has no kernels for a GPU.

    sm_80 runs on compute capability 8.0 and on 8.6, but not on 9.0, and sm_90a on 9.0 alone. compute_80 is code that the driver
    compiles for any GPU from 8.0 on.
    """
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    kernels = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in built_for]
    for kind, major, minor, suffix in (match.groups() for match in kernels if match):
        target = int(major), int(minor)
        any_later = kind == "compute" and not suffix
        if target == capability or (suffix != "a" and target <= capability and (any_later or target[0] == capability[0])):
            return
    if any(kernels):  # AMD's GPUs have other names, and none are listed if CUDA is not initialized
        raise UserError(
            f"--device: this PyTorch has no kernels for the {torch.cuda.get_device_name(device)} (compute capability "
            f"{capability[0]}.{capability[1]}), but for {', '.join(built_for)}; install a release that has, or use --device cpu"
        )


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Return the precision of the network's matrix products; float32 means no mixed precision.

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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory has run out: PyTorch's own, that of a library below it, or Python's."""
    words = (
        r"out of memory|not enough memory|can(no|')t allocate memory|bad_alloc|ALLOC(ATION)?_FAILED|unable to find an engine|"
        r"could not create a (primitive|memory)|"  # oneDNN's
        r"size calculation overflowed|array is too big|pixels is too large"  # PyTorch's, NumPy's, matplotlib's
    )
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError | ValueError) and re.search(words, str(error), re.IGNORECASE) is not None
    )


def in_parts_that_fit(compute: Callable[[Sequence], T], items: Sequence) -> list[T]:
    """Return [compute(items)]. If memory runs out, halve the items until the parts fit, and return their results in order.

    Args:
        items: at least one; a list, a range or a tensor.
    """
    try:
        return [compute(items)]
    except (MemoryError, RuntimeError) as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
    middle = len(items) // 2  # outside the except block, which keeps the failed attempt's tensors alive
    return [*in_parts_that_fit(compute, items[:middle]), *in_parts_that_fit(compute, items[middle:])]


@contextlib.contextmanager
def explain_device_errors(advice: str) -> Iterator[None]:
    """Turn running out of memory in the block, on a GPU or the CPU, and a failed torch.compile into a `UserError`.

    Args:
        advice: what to do when memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed, so leave out training.compile or --compile ({reason:.200})") from None
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {advice}{f' ({reason:.200})' * bool(reason)}") from None

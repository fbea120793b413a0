"""Networks compiled by torch.compile, where that pays and works. What is computed stays the same, up to rounding."""

import time
from collections.abc import Callable

import torch
from torch import nn

from edm.device import is_out_of_memory, wait_for

LONG = 600  # seconds of work, uncompiled, from which on compiling, which takes a minute or more, is taken to pay
SMALL = 10_000_000  # parameters below which a network's kernels are done sooner than they are launched


def is_wanted(
    choice: str, device: torch.device, rehearse: Callable[[], object], times: int, decided: bool | None = None
) -> bool:
    """Whether to try: as `choice` says, or, if that is "auto", for long work on CUDA (on a CPU it gains nothing in minutes).

    Args:
        choice: "auto", "true" or "false".
        rehearse: does what is going to be done with the network.
        times: how often it will be done.
        decided: what "auto" has come to mean in this run before, if it has been started before.
    """
    if choice != "auto":
        return choice == "true"
    if device.type != "cuda":
        return False
    if decided is not None:
        return decided
    rehearse()
    wait_for(device)
    began = time.perf_counter()
    rehearse()
    wait_for(device)
    return times * (time.perf_counter() - began) >= LONG


def is_launch_bound(device: torch.device, parameters: int, accumulation: int, processes: int) -> bool:
    """Whether training should replay CUDA graphs: for small networks, and only where no gradient in a graph's own memory has to
    outlive the next replay, as it would where parts of a batch, or processes, add up theirs."""
    return device.type == "cuda" and parameters < SMALL and accumulation == 1 and processes == 1


def is_compiled(net: nn.Module) -> bool:
    return "forward" in vars(net)


def compile_network(net: nn.Module, rehearse: Callable[[], object], cuda_graphs: bool) -> bool:
    """Compile a network's forward pass, and with it the backward pass, in place; or leave it as it is, and say why in a line.

    Compiled, it computes the same function: on a CPU in float32, D and its gradients within 1e-5 of their size
    (`tests/test_fast_paths.py`).

    Args:
        rehearse: does what is going to be done with the network, for tensors of the same shapes: every other shape is compiled
            anew. CUDA graphs take three calls: they are warmed up, recorded and replayed.
        cuda_graphs: replay the whole pass as one CUDA graph, which spares the launching of its kernels one by one.

    Returns:
        Whether the network is compiled now.
    """
    if is_compiled(net):
        return True
    print("Compiling the network, which takes a minute or more ...", flush=True)
    mode = "reduce-overhead" if cuda_graphs else None
    net.forward = torch.compile(net.forward, dynamic=False, fullgraph=True, mode=mode)  # all of it, or an error
    try:
        for _ in range(3 if cuda_graphs else 1):
            rehearse()
    except Exception as error:  # the compiler, and the compilers that it calls, can raise anything
        del net.forward
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"Not compiled, which is slower and else the same: {reason:.200}")
    return is_compiled(net)

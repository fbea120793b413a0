"""Networks compiled by torch.compile, where that pays and works. What is computed stays the same, up to rounding."""

from collections.abc import Callable

import torch
from torch import nn

from edm.device import is_out_of_memory

LONG = 1000  # evaluations from which on compiling, which takes a minute or two, is taken to pay


def is_wanted(choice: str, device: torch.device, evaluations: int, decided: bool | None = None) -> bool:
    """Whether to try: as `choice` says, or, if that is "auto", for long work on CUDA (on a CPU it gains nothing in minutes).

    Args:
        choice: "auto", "true" or "false".
        evaluations: how often the network will be evaluated.
        decided: what "auto" has come to mean in this run before, if it has been started before.
    """
    if choice == "auto":
        return device.type == "cuda" and (evaluations >= LONG if decided is None else decided)
    return choice == "true"


def compile_network(net: nn.Module, rehearse: Callable[[], object], cuda_graphs: bool) -> bool:
    """Compile a network's forward pass, and with it the backward pass, in place; or leave it as it is, and say why in a line.

    Compiled, it computes the same function: in float32, D and its gradients within 1e-5 of their size
    (`tests/test_fast_paths.py`).

    Args:
        rehearse: does what is going to be done with the network, for tensors of the same shapes: every other shape is compiled
            anew. It is called three times, as CUDA graphs are warmed up, recorded and replayed.
        cuda_graphs: replay the whole pass as one CUDA graph, which spares the launching of its kernels one by one.

    Returns:
        Whether the network is compiled now.
    """
    net.forward = torch.compile(net.forward, dynamic=False, mode="reduce-overhead" if cuda_graphs else None)
    try:
        for _ in range(3):
            rehearse()
    except Exception as error:  # the compiler, and the compilers that it calls, can raise anything
        del net.forward
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        print(f"Not compiled, which is slower and else the same: {reason:.200}")
        return False
    return True

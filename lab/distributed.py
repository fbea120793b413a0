"""Several processes as one run: torchrun starts them, and each computes a shard of every batch.

Every rank makes the random draws of the whole batch and takes its shard, so results do not depend on the number of processes
(except for dropout).
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lab.cli import UserError
from lab.device import pick_device


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it; by default there is only this one.

    Args:
        rank, size: the number of this process, from 0, and the number of processes.
        local_rank, local_size: the same, among the processes of this machine.
        control: the CPU process group for everything but gradients.
        store: key-value pairs that survive a restart by torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Return whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return which of `count` items belong to this rank: consecutive ones, the same number on all ranks or one more."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def wrap(self, net: torch.nn.Module) -> torch.nn.Module:
        """Return the network as a module whose backward pass averages the gradients over all ranks."""
        return net if self.size == 1 else torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    def no_sync(self, net: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Return the context for one part of a batch: only the backward pass of the last part averages the gradients."""
        return contextlib.nullcontext() if self.size == 1 or last else net.no_sync()

    def all_gather(self, tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Return whole tensors, (count,) each, from this rank's shards of them, of one dtype and device."""
        if self.size == 1:
            return tensors
        whole = torch.zeros(len(tensors), count, dtype=tensors[0].dtype, device=tensors[0].device)
        whole[:, self.shard(count)] = torch.stack(tensors)
        dist.all_reduce(whole)
        return list(whole)

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum of `number` over all ranks."""
        if self.size > 1:
            maximum = torch.tensor(number)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.control)
            number = int(maximum)
        return number

    def common_precision(self, precision: torch.dtype) -> torch.dtype:
        """Return one precision for all ranks: float32 if any of them has it, else fp16 if any has it, else bf16.

        So a T4 and an A100 that train together both use fp16.
        """
        order = [torch.bfloat16, torch.float16, torch.float32]
        return order[self.all_reduce_max(order.index(precision))]

    def broadcast(self, compute: Callable[[], object]):
        """Call `compute` on rank 0 and return its result on all ranks. A `UserError` ends all ranks; only rank 0 reports it."""
        if self.size == 1:
            return compute()
        box = [None]
        if self.is_first:
            try:
                box = [compute()]
            except UserError as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.control)
        if isinstance(box[0], UserError):
            raise box[0] if self.is_first else SystemExit(2)
        return box[0]

    def rank_zero_first(self, compute: Callable[[], object]):
        """Call `compute` on every rank, but on rank 0 first, then on one rank of each other machine, then on all others.

        So a download happens once, even on a shared file system. A `UserError` of one rank ends all; only that rank reports it.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for now in range(3 if self.size > 1 else 1):
            error = None
            if now == turn:
                try:
                    result = compute()
                except UserError as raised:
                    error = raised
            if self.all_reduce_max(error is not None):
                raise error or SystemExit(2)
        return result

    def gather(self, value: object) -> list:
        """Return the values of all ranks, in their order, on rank 0, and an empty list on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def mark_started(self, key: str) -> None:
        """Remember, across restarts by torchrun, that a run has started."""
        if self.store:
            self.store.set(key, "yes")

    def has_started(self, key: str) -> bool:
        """Return whether `mark_started` was called, in this process or before a restart by torchrun."""
        return self.store is not None and self.store.check([key])


@contextlib.contextmanager
def distributed(device_name: str | None) -> Iterator[tuple[torch.device, World]]:
    """Join the processes that torchrun started; yields this process's device and `World`. Only rank 0 prints to stdout.

    Args:
        device_name: as in `pick_device`. Under torchrun, "cuda" is the GPU numbered like the local rank.

    Raises:
        UserError: the device is unknown, there are more processes than GPUs, or another process is lost.
    """
    device = pick_device(device_name)
    if not dist.is_torchelastic_launched():
        yield device, World()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in names)
    if device.type == "cuda":
        device = own_gpu(device_name, local_rank, local_size)
    try:
        torchrun_has_store = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # else rank 0 serves one
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=rank == 0 and not torchrun_has_store)
        attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size)
        control = dist.new_group(backend="gloo")
        with open(os.devnull, "w", errors="replace") as silence, contextlib.redirect_stdout(silence if rank else sys.stdout):
            yield device, World(rank, size, local_rank, local_size, control, dist.PrefixStore("run", store))
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])
        raise UserError(
            f"process {rank} of {size} has lost the others: one of them died, or cannot be reached; "
            f"a training run goes on from its last checkpoint with --resume_from latest ({reason:.80})"
        ) from None


def own_gpu(device_name: str | None, local_rank: int, local_size: int) -> torch.device:
    """Return the GPU of this process alone, which becomes the current one.

    Raises:
        UserError: `device_name` is one GPU for all, or there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count()
    if device_name not in (None, "cuda"):
        raise UserError(f"--device: every process needs its own GPU, so not all can use {device_name!r}; allowed: cuda, cpu")
    if local_size > count:
        raise UserError(f"torchrun: {local_size} processes are more than this machine's {count} GPUs; lower --nproc_per_node")
    return pick_device(f"cuda:{local_rank}")

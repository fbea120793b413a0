"""Several processes as one run, on PyTorch's own engine: torchrun starts them, and what belongs to a batch is divided by place.

Every process makes the random draws of the whole batch and takes its share, so their number does not change the numbers.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from edm.device import pick_device
from edm.errors import UserError


@dataclass(frozen=True)
class Processes:
    """Those of a run, seen from one of them; without arguments, a process alone.

    Args:
        rank, size: its number, from 0, and theirs.
        local_rank, local_size: the same on its machine.
        control: the group through which they agree, on the CPU.
        store: what outlives a restart by torchrun, but not torchrun itself.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things in a row are this process's: a row of their own, as long as all others, or one longer."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def wrap(self, net: torch.nn.Module) -> torch.nn.Module:
        """The network whose backward pass averages the gradients over the processes."""
        if self.size == 1:
            return net
        return torch.nn.parallel.DistributedDataParallel(net)

    def part(self, net: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around one of the parts that a batch is computed in: only the last one's backward pass averages."""
        return contextlib.nullcontext() if self.size == 1 or last else net.no_sync()

    def whole(self, mine: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Of tensors that each hold this process's `share` of `count` numbers: all of their numbers."""
        if self.size == 1:
            return mine
        numbers = torch.zeros(len(mine), count, dtype=mine[0].dtype, device=mine[0].device)
        numbers[:, self.share(count)] = torch.stack(mine)
        dist.all_reduce(numbers)
        return list(numbers)

    def highest(self, number: int) -> int:
        """Of the processes' numbers: how they agree."""
        if self.size > 1:
            box = torch.tensor(number)
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
            number = int(box)
        return number

    def from_first(self, compute: Callable[[], object]):
        """What the first process computes, in all of them. A `UserError` ends them all, the others without a word."""
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

    def in_turn(self, compute: Callable[[], object]):
        """What each computes for itself: first the first process, then the first one of each machine, then the others. A
        `UserError` of one ends them all, the others without a word."""
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for now in range(3 if self.size > 1 else 1):
            error = None
            if now == turn:
                try:
                    result = compute()
                except UserError as raised:
                    error = raised
            if self.highest(error is not None):
                raise error or SystemExit(2)
        return result

    def gather(self, value: object) -> list:
        """The processes' values, by rank, on the first; nothing on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def remember(self, key: str, number: int | None) -> None:
        """Leave a number for the time after a restart; None takes it back."""
        if self.store and number is None:
            self.store.delete_key(key)
        elif self.store:
            self.store.set(key, str(number))

    def recall(self, key: str) -> int | None:
        """The number that was left before torchrun started this command line again."""
        return int(self.store.get(key)) if self.store and self.store.check([key]) else None


@contextlib.contextmanager
def joined(device_name: str | None) -> Iterator[tuple[torch.device, Processes]]:
    """This process's device, and its place among those that torchrun started; alone without torchrun.

    Args:
        device_name: as in `pick_device`; under torchrun, "cuda" is the GPU of the process's local rank.

    Raises:
        UserError: the device is unknown, or there is none for every process; or another process is lost.
    """
    if not dist.is_torchelastic_launched():
        yield pick_device(device_name), Processes()
        return
    place = {key: int(os.environ[key.upper()]) for key in ("rank", "local_rank")}
    sizes = {"size": int(os.environ["WORLD_SIZE"]), "local_size": int(os.environ["LOCAL_WORLD_SIZE"])}
    device = pick_device(device_name)
    if device.type == "cuda":
        device = own_gpu(device_name, place["local_rank"], sizes["local_size"])
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=place["rank"] == 0 and os.environ["TORCHELASTIC_USE_AGENT_STORE"] != "True",
            timeout=timedelta(minutes=5),
        )
        notes = dist.PrefixStore("edm", store)
        attempt = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=attempt, rank=place["rank"], world_size=sizes["size"])
        control = dist.new_group(backend="gloo")
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence if place["rank"] else sys.stdout):
            yield device, Processes(**place, **sizes, control=control, store=notes)
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])
        raise UserError(
            f"process {place['rank']} of {sizes['size']} has lost the others: one of them died, or cannot be reached; "
            f"a training run goes on from its last checkpoint with --resume_from latest ({reason:.80})"
        ) from None


def own_gpu(device_name: str | None, local_rank: int, local_size: int) -> torch.device:
    """The GPU of a process's own."""
    count = torch.cuda.device_count()
    if device_name not in (None, "cuda"):
        raise UserError(
            f"--device: every process takes a GPU of its own, so {device_name!r} cannot be one for all; allowed: cuda, cpu"
        )
    if local_size > count:
        raise UserError(f"torchrun: {local_size} processes are more than this machine's {count} GPUs; lower --nproc_per_node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device

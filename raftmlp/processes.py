"""Several processes that train together, started by torchrun or SLURM; a single one is the case of one."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import UserError, first_words

if TYPE_CHECKING:
    import torch

__all__ = ["Processes", "are_connected", "end_processes", "is_first_process", "process_numbers", "start_processes"]

# where launchers say a process's number, among those of its machine and among all: as timm reads them, without torch
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
RANKS = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together: its device, its number, how many there are."""

    device: "torch.device"
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, or the only one."""
        return self.rank == 0

    def on_first(self, function: Callable, *args: Any) -> Any:
        """Return in all processes what a function returns in the first, or raise its UserError in all."""
        value = message = None
        if self.is_first:
            try:
                value = function(*args)
            except UserError as error:
                message = str(error)
        if self.world_size > 1:
            import torch

            result = [value, message]
            torch.distributed.broadcast_object_list(result)
            value, message = result
        if message is not None:
            raise UserError(message, shared=True)
        return value


def process_numbers() -> tuple[int, int]:
    """Return this process's number on its machine, and among all that a launcher started; 0 of a single one."""
    local, rank = (next((int(os.environ[n]) for n in names if n in os.environ), 0) for names in (LOCAL_RANKS, RANKS))
    return local, rank


def are_connected() -> bool:
    """Return whether this process has joined those that it trains with."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first_process() -> bool:
    """Return whether this is the first of the processes that a launcher started, or the only one."""
    return process_numbers()[1] == 0


def start_processes(device: str | None) -> Processes:
    """Join the processes that torchrun or SLURM started, if any: NCCL between GPUs, gloo between CPUs.

    Args:
        device: Name of the device; of an accelerator, each process takes one of its own. None is for the default one,
            or a CPU where that is MPS, which several processes cannot share.

    Raises:
        UserError: If there is no such device, or the processes do not connect.
    """
    import torch
    from timm.utils.distributed import init_distributed_device_so, is_distributed_env

    from .device import default_device, find_device

    if not is_distributed_env():
        return Processes(find_device(device))
    name = (device or default_device().replace("mps", "cpu")).split(":")[0]
    device = find_device(name if name == "cpu" else f"{name}:{process_numbers()[0]}")
    try:
        joined = init_distributed_device_so(device.type)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot connect: {first_words(error)}") from error
    return Processes(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])


def end_processes() -> None:
    """Wait until all processes are done: one that ends while others still work or talk to it may take them down."""
    if are_connected():
        import torch

        torch.distributed.barrier()
        time.sleep(1)  # gloo's threads need the GIL to release their last work, and abort where Python has ended
        torch.distributed.destroy_process_group()

"""Where a run takes place: devices, processes that train together, and signals that ask them to stop.

It is imported without torch, which takes seconds to load.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

try:
    import resource
except ImportError:  # Windows
    resource = None

from .errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Processes", "StopSignals", "are_connected", "default_device", "end_processes", "find_device", "is_first_process",
    "most_memory", "pins_memory", "process_numbers", "start_processes", "synchronize",
    "tf32_products",
]  # fmt: skip

# where launchers say a process's number, among those of its machine and among all: as timm reads them, without torch
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
RANKS = ("RANK", "PMI_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


# Devices


def default_device() -> str:
    """Return the type of the accelerator that torch finds (CUDA, MPS, XPU, ...), "cpu" without one."""
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def find_device(name: str | None) -> "torch.device":
    """Return the device of that name, the default one without a name; a UserError says that there is none."""
    import torch

    name = name or default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def pins_memory(device: "torch.device") -> bool:
    """Return whether images reach a device faster from pinned memory."""
    return device.type not in ("cpu", "mps")


def synchronize(device: "torch.device") -> None:
    """Wait until a device has done its work."""
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)


def most_memory(device: "torch.device") -> int | None:
    """Return the most bytes that this process has had so far: on a CPU in all, on another device of tensors.

    None where that is not known: for a CPU on Windows, and for devices that keep no record, as MPS.
    """
    import torch

    if device.type != "cpu":
        measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return measure(device) if measure else None
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def tf32_products(is_on: bool) -> Iterator[None]:
    """Let float32 products be TensorFloat-32 in this context; on a CPU that would mean something else."""
    import torch

    before = torch.get_float32_matmul_precision()
    try:
        if is_on:
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Processes


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
        """Return in all processes what a function returns in the first; all raise an error that it raises there."""
        if self.world_size == 1:
            return function(*args)
        import torch

        value = error = None
        if self.is_first:
            try:
                value = function(*args)
            except Exception as caught:  # the others would wait forever
                error = caught
        result = [value, None if error is None else str(error) or type(error).__name__]
        torch.distributed.broadcast_object_list(result)
        if result[1] is not None:
            raise UserError(result[1], shared=True) from error
        return result[0]

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of all processes' tensors, in place."""
        if self.world_size > 1:
            import torch

            torch.distributed.all_reduce(values)
        return values


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

    Of an accelerator, each process takes one of its own; without a name, a CPU where the default is MPS, which several
    processes cannot share.
    """
    import torch
    from timm.utils.distributed import init_distributed_device_so, is_distributed_env

    if not is_distributed_env():
        return Processes(find_device(device))
    name = (device or default_device().replace("mps", "cpu")).split(":")[0]
    found = find_device(name if name == "cpu" else f"{name}:{process_numbers()[0]}")
    joined = init_distributed_device_so(found.type)
    return Processes(torch.device(joined["device"]), joined["global_rank"], joined["world_size"])


def end_processes() -> None:
    """Wait until all processes are done: one that ends while others still work or talk to it may take them down."""
    if are_connected():
        import torch

        torch.distributed.barrier()
        time.sleep(1)  # gloo's threads need the GIL to release their last work, and abort where Python has ended
        torch.distributed.destroy_process_group()


# Signals


class StopSignals:
    """A context in which SIGTERM and the first Ctrl-C are noted, not obeyed; in the main thread alone.

    A second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        number: The signal that came last, None before one came.
    """

    def __init__(self):
        self.number: int | None = None
        self._handlers: dict[int, object] = {}
        self._time = 0.0

    def __enter__(self) -> "StopSignals":
        self.number = None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._handlers = {}

    def _note(self, number: int, _frame: object) -> None:
        # torchrun passes a Ctrl-C on that the terminal has sent already: two at once are one
        if self.number == signal.SIGINT == number and time.monotonic() > self._time + 2:
            raise KeyboardInterrupt
        self.number, self._time = number, time.monotonic()

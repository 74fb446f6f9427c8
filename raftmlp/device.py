"""Where a model runs, and in which precision."""

import sys
from dataclasses import dataclass

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from .errors import UserError
from .settings import Settings, option

__all__ = ["DeviceSettings", "default_device", "find_device", "most_memory", "pins_memory", "synchronize"]

AMP_DTYPES = ("bfloat16", "float16")


@dataclass(kw_only=True)
class DeviceSettings(Settings):
    """Where a model runs, and in which precision."""

    title = "run"
    device: str | None = option(
        None, "cpu, cuda, cuda:1, mps, ... (default: the accelerator that torch finds, else cpu)", metavar="NAME"
    )
    amp: bool = option(False, "mixed precision (autocast)")
    amp_dtype: str = option("bfloat16", "lower precision of --amp", choices=AMP_DTYPES)
    channels_last: bool = option(False, "channels-last memory layout")
    compile: bool = option(False, "use torch.compile")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of the precision on a device."""
        return torch.autocast(device.type, getattr(torch, self.amp_dtype), enabled=self.amp)


def default_device() -> str:
    """Return the type of the accelerator that torch finds (CUDA, MPS, XPU, ...), "cpu" without one."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; without a name the default one.

    Raises:
        UserError: If there is no such device.
    """
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device


def pins_memory(device: torch.device) -> bool:
    """Return whether images reach a device faster from pinned memory."""
    return device.type not in ("cpu", "mps")


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def most_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has had so far: on a CPU in all, on another device of tensors.

    None where that is not known: for a CPU on Windows, and for devices that keep no record, as MPS.
    """
    if device.type != "cpu":
        measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return measure(device) if measure else None
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

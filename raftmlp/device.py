"""Where a model runs."""

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from .errors import UserError

__all__ = ["default_device", "find_device", "most_memory", "pins_memory", "synchronize"]


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

"""Where a model runs, and in which precision."""

from dataclasses import dataclass

import torch

from .errors import UserError
from .settings import Settings, option

__all__ = ["DeviceSettings", "find_device"]

AMP_DTYPES = ("bfloat16", "float16")


@dataclass(kw_only=True)
class DeviceSettings(Settings):
    """Where a model runs, and in which precision."""

    title = "run"
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)", metavar="NAME")
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


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; without a name the GPU if there is one, else the CPU.

    Raises:
        UserError: If there is no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    return device

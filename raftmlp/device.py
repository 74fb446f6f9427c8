"""Where a model runs."""

import torch

from .errors import UserError

__all__ = ["find_device"]


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

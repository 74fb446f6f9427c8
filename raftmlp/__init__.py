"""RaftMLP, an MLP vision backbone, for timm: importing this package registers its models.

The console command imports it without them, and so without torch, to parse its options first; so it is where torch is
not installed, for ``raftmlp.export.onnx_client``.
"""

import os
import sys
from importlib.util import find_spec

__version__ = "0.2.0"


def _is_command() -> bool:
    """Return whether this process runs the console command: `raftmlp`, or `python -m raftmlp`.

    While Python looks for the module that -m names, ``sys.argv`` begins with "-m".
    """
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":
        words = iter(sys.orig_argv)
        return "-m" in words and next(words, "") == "raftmlp"
    return os.path.basename(program) in ("raftmlp", "raftmlp.exe")


is_command = _is_command() or find_spec("torch") is None

if not is_command:
    from .checkpoints.pretrained import list_pretrained
    from .model.layers import ChannelMixing, MultiScalePatchEmbed, RaftTokenMixing, TokenMixing
    from .model.raftmlp import RaftMLP
    from .model.resize import resize_bicubic

__all__ = [
    "ChannelMixing",
    "MultiScalePatchEmbed",
    "RaftMLP",
    "RaftTokenMixing",
    "TokenMixing",
    "list_pretrained",
    "resize_bicubic",
]

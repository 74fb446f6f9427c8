"""RaftMLP, an MLP vision backbone, for timm: importing this package registers its models.

The console command imports it without them, and so without torch, to parse its options first; so it is where torch is
not installed, for ``raftmlp.export.onnx_client``.
"""

import os
import sys
from importlib.util import find_spec

__version__ = "0.2.0"


def _is_command() -> bool:
    """Return whether this process runs the console command: `raftmlp`, or `python -m raftmlp`."""
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    return module == ["raftmlp"] or os.path.basename(sys.argv[0]) in ("raftmlp", "raftmlp.exe")


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

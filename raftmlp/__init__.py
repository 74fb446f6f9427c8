"""RaftMLP, an MLP vision backbone, for timm: importing this package registers its models.

Only a command imports it without them and without torch, to parse its options first: ``load_package`` of
``raftmlp/commands/options.py`` then imports it again, whole.
"""

import re
import sys

__version__ = "0.2.0"


def _is_parsing() -> bool:
    """Return whether a command imports this package for its options: `raftmlp COMMAND`, or Python's -m with our name.

    While Python looks for the module that -m names, ``sys.argv`` begins with "-m".
    """
    if getattr(sys.modules.get("raftmlp_cli"), "is_parsing", False):
        return True
    words = iter(sys.orig_argv if sys.argv[:1] == ["-m"] else ())
    return "-m" in words and re.fullmatch(r"raftmlp(\.commands\.\w+)?", next(words, "")) is not None


is_parsing = _is_parsing()

if not is_parsing:
    from .layers import ChannelMixing, MultiScalePatchEmbed, RaftTokenMixing, TokenMixing
    from .pretrained import list_pretrained
    from .raftmlp import RaftMLP
    from .resize import resize_bicubic

__all__ = [
    "ChannelMixing",
    "MultiScalePatchEmbed",
    "RaftMLP",
    "RaftTokenMixing",
    "TokenMixing",
    "list_pretrained",
    "resize_bicubic",
]

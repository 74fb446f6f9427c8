"""RaftMLP, an MLP vision backbone, for timm: importing this package registers its models."""

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
__version__ = "0.2.0"

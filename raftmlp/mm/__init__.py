"""RaftMLP in mmdet and mmseg: importing this package, which needs mmengine, registers the backbone."""

from ..train.muon import Muon
from .backbone import RaftMLPBackbone

__all__ = ["Muon", "RaftMLPBackbone"]

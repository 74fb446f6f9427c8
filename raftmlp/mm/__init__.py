"""RaftMLP in mmdet and mmseg: importing this package, which needs mmengine, registers the backbone."""

from .backbone import RaftMLPBackbone
from .muon import Muon

__all__ = ["Muon", "RaftMLPBackbone"]

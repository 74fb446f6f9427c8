"""RaftMLP in mmdet and mmseg: importing this package, which needs mmengine, registers the backbone."""

from .backbone import RaftMLPBackbone

__all__ = ["RaftMLPBackbone"]

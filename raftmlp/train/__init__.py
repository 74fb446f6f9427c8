"""Training of classifiers: ``Trainer`` and its settings."""

from .. import is_parsing
from .settings import TrainSettings

if not is_parsing:
    from .trainer import Trainer

__all__ = ["TrainSettings", "Trainer"]

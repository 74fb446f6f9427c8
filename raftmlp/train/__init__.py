"""Training of classifiers: ``Trainer`` and its settings."""

from .. import is_command
from .settings import TrainSettings

if not is_command:
    from .trainer import Trainer

__all__ = ["TrainSettings", "Trainer"]

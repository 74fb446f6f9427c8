"""Training of classifiers: ``Trainer`` and its settings."""

from .settings import TrainSettings
from .trainer import Trainer

__all__ = ["TrainSettings", "Trainer"]

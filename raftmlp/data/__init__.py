"""Data sets: the embedded digits and scenes, and by ``create_dataset`` all that timm reads."""

from .datasets import class_names, create_dataset
from .digits import Digits
from .transfer import INaturalist

__all__ = ["Digits", "INaturalist", "class_names", "create_dataset"]

"""Datasets: the embedded digits and scenes of them, and by ``create_dataset`` all that timm reads."""

from .. import is_command

if not is_command:
    from .datasets import INaturalist, class_names, create_dataset
    from .digits import Digits, MlxtendMnist
    from .scenes import SceneDigits

__all__ = ["Digits", "INaturalist", "MlxtendMnist", "SceneDigits", "class_names", "create_dataset"]

"""Data sets: the embedded digits and scenes of them, and by ``create_dataset`` all that timm reads."""

from .. import is_command

if not is_command:
    from .datasets import class_names, create_dataset
    from .digits import Digits
    from .mnist import MlxtendMnist
    from .scene_digits import SceneDigits
    from .transfer import INaturalist

__all__ = ["Digits", "INaturalist", "MlxtendMnist", "SceneDigits", "class_names", "create_dataset"]

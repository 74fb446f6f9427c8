"""Typed settings of models, devices, exported files and measurements of speed.

Nothing here needs torch before it is called: a command parses its options before that is loaded.
"""

import difflib
import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from .errors import UserError
from .settings import Count, NonNegative, Settings, Text, between, option, settings
from .sizes import Sides

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "DeviceSettings",
    "ExportSettings",
    "ModelSettings",
    "SpeedSettings",
    "is_folder_name",
    "known_model",
    "weights_file",
]

AMP_DTYPES = ("bfloat16", "float16")
REFERENCE = "reference:"
MODES = ("eager", "compile")
TASKS = ("inference", "training")
PRECISIONS = ("float32", "bfloat16", "float16", "amp_bfloat16", "amp_float16")  # timm's names
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
OPSET = 18
CALIBRATION_IMAGES = 256


def is_folder_name(name: str | None) -> bool:
    """Return whether timm takes the name for a folder: local-dir:FOLDER, or hf-hub:USER/NAME on the Hub."""
    return bool(name) and name.startswith(("local-dir:", "hf-hub:"))


def known_model(name: str, among: str = "") -> str:
    """Return the name if timm knows such a model.

    Args:
        name: The model, with a tag or without; local-dir:FOLDER or hf-hub:USER/NAME.
        among: A pattern that it must match.

    Raises:
        UserError: If there is none; the message names similar ones.
    """
    if is_folder_name(name) and not among:
        return name
    import timm

    known = timm.list_models(among)
    if timm.models.split_model_name_tag(name)[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or timm.list_models("raftmlp*")
        raise UserError(f"unknown model {name!r}; did you mean {' or '.join(near)}?")
    return name


def weights_file(name: str) -> str:
    """Return the file with the best weights where the name is that of a run's folder, else the name."""
    if os.path.isdir(name) and not os.path.exists(os.path.join(name, "config.json")):
        files = (os.path.join(name, f"{stem}.pth.tar") for stem in ("model_best", "last", "previous"))
        return next(filter(os.path.isfile, files), name)
    return name


@settings
class ModelSettings(Settings):
    """Which model, and its weights."""

    title = "model"
    model: Text | None = option(
        None,
        "any model of timm's list, or local-dir:FOLDER or hf-hub:USER/NAME (default: the checkpoint's, else raftmlp_s)",
        check=known_model,
        metavar="NAME",
    )
    pretrained: bool = option(False, "start from the model's pretrained weights")
    checkpoint: Annotated[Text, AfterValidator(weights_file)] | None = option(
        None,
        "start from the weights in this file, in a run's folder (its best), or in a folder for the Hugging Face Hub",
        metavar="FILE",
    )
    num_classes: Count | None = option(None, "classes (default: the data set's, else the model's)")
    in_chans: Count | None = option(None, "channels of the images: 1 or 3 (default: the model's)")
    img_size: Sides | None = option(
        None,
        "size of the images in pixels: 224, 320x480 or 320 480 (default: the model's)",
        metavar="N|HxW",
    )
    model_kwargs: dict[str, Any] = option(factory=dict, help="more arguments of the model", metavar="KEY=VALUE")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels, None where ``img_size`` is left open."""
        return (self.img_size[0], self.img_size[-1]) if self.img_size else None

    @property
    def weights(self) -> str:
        """Where the weights come from: a file or folder, "pretrained" or "random"."""
        named = self.model if is_folder_name(self.model) else "pretrained"
        return self.checkpoint or (named if self.pretrained else "random")

    def name(self, model: "nn.Module") -> str:
        """Return the name of the model that ``create_model`` made."""
        return model.pretrained_cfg["architecture"] if not self.model or is_folder_name(self.model) else self.model


@settings
class DeviceSettings(Settings):
    """Where a model runs, and in which precision."""

    title = "run"
    device: Text | None = option(
        None, "cpu, cuda, cuda:1, mps, ... (default: the accelerator that torch finds, else cpu)", metavar="NAME"
    )
    amp: bool = option(False, "mixed precision (autocast)")
    amp_dtype: Literal[AMP_DTYPES] = option("bfloat16", "lower precision of --amp")
    channels_last: bool = option(False, "channels-last memory layout")
    compile: bool = option(False, "use torch.compile")

    @property
    def memory_format(self) -> "torch.memory_format":
        """Memory format of weights and images."""
        import torch

        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: "torch.device") -> "torch.autocast":
        """Return the context of the precision on a device."""
        import torch

        return torch.autocast(device.type, getattr(torch, self.amp_dtype), enabled=self.amp)


@settings
class ExportSettings(Settings):
    """What to write."""

    title = "file"
    format: Literal["onnx", "pt2", "aoti", "torchscript", "hf"] = option("onnx", "what to write")
    batch: Annotated[Count | None, BeforeValidator(lambda value: None if value == "dynamic" else value)] = option(
        None, "images at a time: a number, or 'dynamic' (default: dynamic)", metavar="N"
    )
    dynamic_size: bool = option(
        False,
        "leave height and width free too (slower); the last map must have more than one position",
        action="store_true",
    )
    features: bool = option(False, "give the feature maps instead of logits", action="store_true")
    half: Literal["float16", "bfloat16"] | None = option(
        None,
        "weights and products in half precision; inputs and outputs stay float32",
        nargs="?",
        const="float16",
    )
    quantize: Literal["dynamic", "static"] | None = option(
        None,
        "ONNX: 8-bit weights; the scales of activations are computed at each run, or (static) taken from data",
    )
    simplify: bool = option(False, "ONNX: simplify the graph with onnxslim", action="store_true")
    opset: between(18, 23) | None = option(None, f"ONNX: version of the operators (default: {OPSET})")

    def __post_init__(self):
        excluded = ("quantize", "simplify", "opset") if self.format != "onnx" else ()
        if self.format == "hf":
            excluded += ("batch", "features", "dynamic_size")
        for name in excluded:
            if getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} does not go with --format {self.format}")
        if self.quantize and (self.half or self.features):
            raise UserError("--quantize goes with logits in float32: leave --half and --features out")

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the weights, before they are quantized."""
        import torch

        return getattr(torch, self.half or "float32")

    @property
    def precision(self) -> str:
        """Type of weights and products in words."""
        return f"int8, {self.quantize}" if self.quantize else self.half or "float32"


@settings
class SpeedSettings(Settings):
    """How speed is measured."""

    title = "how"
    batch_size: Count = option(16, "images a batch", short="-b")
    precision: Literal[PRECISIONS] = option("float32", "of the weights, or of autocast")
    channels_last: bool = option(False, "channels-last memory layout", action="store_true")
    rounds: Count = option(7, "rounds, after one of warm-up")
    min_time: NonNegative = option(0.5, "seconds a turn lasts at least", metavar="S")
    compile_mode: Literal[COMPILE_MODES] = option("default", "of torch.compile")

    @property
    def dtype(self) -> "torch.dtype":
        """Type of the numbers in products."""
        import torch

        return getattr(torch, self.precision.removeprefix("amp_"))

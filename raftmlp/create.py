"""A model of timm's list by name, or as a checkpoint describes it, with its weights loaded."""

import difflib
import logging
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from .errors import UserError, first_words
from .raftmlp import RaftMLP
from .settings import Number, Settings, option
from .sizes import as_size, check_memory
from .weights import adapt_state_dict, describe_differences, load_state_dict, read_description, shapes, summary

__all__ = ["ModelSettings", "create_model", "known_model"]

_logger = logging.getLogger(__name__)


def known_model(name: str, among: str = "") -> str:
    """Return the name if timm knows such a model.

    Args:
        name: The model, with a tag or without.
        among: A pattern that it must match.

    Raises:
        UserError: If there is none; the message names similar ones.
    """
    known = timm.list_models(among)
    if timm.models.split_model_name_tag(name)[0] not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or timm.list_models("raftmlp*")
        raise UserError(f"unknown model {name!r}; did you mean {' or '.join(near)}?")
    return name


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """Which model, and its weights."""

    title = "model"
    model: str | None = option(
        None, "any model of timm's list (default: the checkpoint's, else raftmlp_s)", type=known_model, metavar="NAME"
    )
    pretrained: bool = option(False, "start from the model's pretrained weights")
    checkpoint: str | None = option(None, "start from the weights in this file", metavar="FILE")
    num_classes: int | None = option(
        None, "classes (default: the data set's, else the model's)", type=Number(int, 1), metavar="N"
    )
    in_chans: int | None = option(
        None, "channels of the images: 1 or 3 (default: the model's)", type=Number(int, 1), metavar="N"
    )
    img_size: list[int] | None = option(
        None,
        "size of the images in pixels, one number or height and width (default: the model's)",
        type=Number(int, 1),
        nargs="+",
        metavar="N",
    )
    model_kwargs: dict[str, Any] = option(factory=dict, help="more arguments of the model", metavar="KEY=VALUE")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images in pixels, None where ``img_size`` is left open."""
        return as_size(self.img_size) if self.img_size else None

    @property
    def weights(self) -> str:
        """Where the weights come from: a file, "pretrained" or "random"."""
        return self.checkpoint or ("pretrained" if self.pretrained else "random")

    def name(self, model: nn.Module) -> str:
        """Return the name of the model that ``create_model`` made."""
        return self.model or model.pretrained_cfg["architecture"]


def create_model(
    settings: ModelSettings, to_train: bool = False, classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Return the model of the settings on the CPU, its pretrained weights or its checkpoint loaded.

    What the settings leave open is taken from the checkpoint where it says so: name, arguments, classes, trained size.

    Args:
        settings: Which model, and its weights.
        to_train: Build a RaftMLP's grid for the image size of the settings, and let a checkpoint's classifier go where
            it has another number of classes.
        classes: Number of classes where nothing else says it.
        **kwargs: More arguments of the model; those that are None are left out.

    Raises:
        UserError: If the model cannot be built or the weights do not fit.
    """
    described: dict[str, Any] = {}
    if settings.checkpoint and settings.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    if settings.checkpoint:
        described = read_description(settings.checkpoint)
    described_name = described.get("model") if described.get("model") in timm.list_models() else None
    name = known_model(settings.model or described_name or "raftmlp_s")
    if name != described_name:
        described = {}
    cfg = dict(described.get("pretrained_cfg", {}))
    arguments = dict(
        num_classes=settings.num_classes or cfg.get("num_classes") or (None if settings.pretrained else classes),
        in_chans=settings.in_chans or cfg.get("input_size", (None,))[0],
        **kwargs,
    )
    architecture = timm.models.split_model_name_tag(name)[0]
    default = timm.models.get_pretrained_cfg(architecture)
    is_ours = architecture in timm.list_models(module="raftmlp")
    if settings.size and default and (default.fixed_input_size or (is_ours and to_train)):  # others take any size
        check_memory((settings.in_chans or 3, *settings.size))
        arguments["img_size"] = settings.size
    arguments = {key: value for key, value in arguments.items() if value is not None}
    arguments = {**described.get("model_kwargs", {}), **arguments, **settings.model_kwargs}
    try:
        model = timm.create_model(name, pretrained=settings.pretrained, pretrained_cfg_overlay=cfg or None, **arguments)
    except Exception as error:  # constructors raise anything on arguments that they cannot take
        raise UserError(f"cannot make {name}: {first_words(error)}") from error
    if settings.checkpoint:
        _load(model, settings.checkpoint, to_train, described_name)
    known = model.pretrained_cfg.get("num_classes")
    if settings.pretrained and known and model.num_classes != known:
        if not to_train:
            raise UserError(
                f"the pretrained weights of {name} are for {known} classes, not {model.num_classes}: the classifier "
                f"would be a random one"
            )
        _logger.info(
            f"the classifier starts with random weights: {model.num_classes} classes, the pretrained one has {known}"
        )
    return model


def _load(model: nn.Module, path: str, may_replace_head: bool, described_name: str | None) -> None:
    """Load weights strictly; the classifier may be another task's if ``may_replace_head``, and that is logged."""
    state = load_state_dict(path)
    if isinstance(model, RaftMLP):
        state = adapt_state_dict(state, model)
    expected, note = model.state_dict(), ""
    if may_replace_head:
        classifier = model.pretrained_cfg.get("classifier") or ()
        for name in (classifier,) if isinstance(classifier, str) else classifier:
            if len(state.get(f"{name}.bias", ())) != model.num_classes:
                note = (
                    f"{path}: its classifier is missing or another task's; the model keeps its own, with random weights"
                )
                state.update({key: value for key, value in expected.items() if key.startswith(f"{name}.")})
    differences = describe_differences(shapes(state), shapes(expected))
    if differences:
        hint = ""
        if any("fc1.weight has shape" in line for line in differences):
            hint = "; if it was trained at another image size, give --model-kwargs img_size=N"
        whose = f" (it is of {described_name})" if described_name else ""
        raise UserError(f"{path}{whose} does not fit this {type(model).__name__}: {summary(differences)}{hint}")
    if note:
        _logger.info(note)
    model.load_state_dict(state)

"""A model of timm's list by name, or as a checkpoint describes it, with its weights loaded."""

import logging
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from torch import nn

from ..checkpoints.weights import (
    HUB_CONFIG,
    StateDict,
    check_types,
    describe_differences,
    load_state_dict,
    read_description,
    read_hub_config,
    shapes,
    summary,
)
from ..config import ModelSettings, is_folder_name, known_model
from ..errors import UserError, first_words
from ..sizes import check_memory
from .arguments import current_names
from .conversion import adapt_state_dict
from .raftmlp import RaftMLP

__all__ = ["create_model", "create_recorded_model"]

_logger = logging.getLogger(__name__)

ANY_WEIGHTS = ("img_size", "resizing", "drop_rate", "drop_path_rate")  # arguments that fit all weights


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
    return create_recorded_model(settings, to_train, classes, **kwargs)[0]


def create_recorded_model(
    settings: ModelSettings, to_train: bool = False, classes: int | None = None, load: bool = True, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model of ``create_model``, and the ``model_kwargs`` that make it again without its checkpoint.

    Without ``load``, its weights are random. Other arguments and errors are those of ``create_model``.
    """
    if settings.checkpoint and settings.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    described = _description(settings)
    from_folder = is_folder_name(settings.model)
    name = described["model"] if from_folder else known_model(settings.model or described.get("model") or "raftmlp_s")
    architecture = timm.models.split_model_name_tag(name)[0]
    if architecture != described.get("model"):  # what is said of another model's weights
        described = {key: described[key] for key in described.keys() & {"model"}}
    cfg = described.get("pretrained_cfg", {})
    given = _given_arguments(settings, architecture, cfg, to_train, classes)
    given |= {key: value for key, value in kwargs.items() if value is not None}
    of_file = {key: value for key, value in described.get("model_kwargs", {}).items() if key not in given}
    if from_folder and settings.pretrained:
        name = settings.model

    pretrained = settings.pretrained and load
    state = load_state_dict(settings.checkpoint) if settings.checkpoint and load else {}
    try:
        if state and architecture in timm.list_models(module="raftmlp"):
            _check_size(name, cfg, of_file, state)
        arguments = {**of_file, **given, **settings.model_kwargs}
        model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=cfg or None, **arguments)
    except Exception as error:  # constructors raise anything on arguments that they cannot take
        if isinstance(error, UserError) and str(settings.checkpoint or "") in str(error):
            raise
        source = f"{settings.checkpoint}: " if settings.checkpoint else ""
        raise UserError(f"{source}cannot make {name}: {first_words(error)}") from error
    if state:
        _load(model, state, settings, to_train, described.get("model"))
    known = model.pretrained_cfg.get("num_classes")
    if pretrained and known and model.num_classes != known:
        words = f"{model.num_classes} classes, the pretrained weights of {name} have {known}"
        if not to_train:
            raise UserError(f"{words}: the classifier would be a random one")
        _logger.info(f"the classifier starts with random weights: {words}")
    return model, current_names({**of_file, **settings.model_kwargs})


def _given_arguments(
    settings: ModelSettings, architecture: str, cfg: dict[str, Any], to_train: bool, classes: int | None
) -> dict[str, Any]:
    """Return the arguments that the settings give, beside ``model_kwargs``, and else the weights' cfg."""
    arguments = dict(
        num_classes=settings.num_classes or cfg.get("num_classes") or (None if settings.pretrained else classes),
        in_chans=settings.in_chans or cfg.get("input_size", (None,))[0],
    )
    default = timm.models.get_pretrained_cfg(architecture)
    is_trained = to_train and architecture in timm.list_models(module="raftmlp")
    if settings.size and default and (default.fixed_input_size or is_trained):  # others take any size
        check_memory((settings.in_chans or 3, *settings.size))
        arguments["img_size"] = settings.size
    return {key: value for key, value in arguments.items() if value is not None}


def _description(settings: ModelSettings) -> dict[str, Any]:
    """Return what the folder that is the model's name says of it, else the checkpoint; ``model`` is one of timm's.

    Raises:
        UserError: If it cannot be read, says what is not allowed, or the folder is of no model of timm's.
    """
    if is_folder_name(settings.model):
        described = read_hub_config(_config_file(settings.model))
    elif settings.checkpoint:
        described = read_description(settings.checkpoint)
    else:
        return {}
    architecture = timm.models.split_model_name_tag(described.pop("model", ""))[0]
    if architecture in timm.list_models():
        return {**described, "model": architecture}
    if is_folder_name(settings.model):
        raise UserError(f"{settings.model} is of a model {architecture!r}, which timm does not know")
    return described


def _config_file(name: str) -> Path:
    """Return the config.json of a folder, which is fetched where it is on the Hub."""
    source, _, folder = name.partition(":")
    if source == "local-dir":
        return Path(folder) / HUB_CONFIG
    repository, _, revision = folder.partition("@")
    try:
        return Path(hf_hub_download(repository, HUB_CONFIG, revision=revision or None))
    except Exception as error:  # errors of many kinds, of the connection and of names
        raise UserError(f"cannot fetch {name}: {first_words(error)}") from error


def _check_size(name: str, cfg: dict[str, Any], arguments: dict[str, Any], state: StateDict) -> None:
    """Refuse a checkpoint whose description makes a model far larger than its weights, before that takes the memory."""
    model = timm.create_model(name, device="meta", pretrained_cfg_overlay=cfg or None, **arguments)
    described, held = (sum(x.numel() for x in tensors) for tensors in (model.parameters(), state.values()))
    if described > 2 * held + 10**8:
        raise UserError(f"the file describes a {name} of {described:,} parameters, and holds {held:,}")


def _load(
    model: nn.Module, state: StateDict, settings: ModelSettings, may_replace_head: bool, described_name: str | None
) -> None:
    """Load weights strictly; the classifier may be another task's if ``may_replace_head``, and that is logged."""
    path = settings.checkpoint
    if isinstance(model, RaftMLP):
        state = adapt_state_dict(state, model, path)
    expected, is_replaced = model.state_dict(), False
    if may_replace_head:
        classifier = model.pretrained_cfg.get("classifier") or ()
        for name in (classifier,) if isinstance(classifier, str) else classifier:
            if getattr(state.get(f"{name}.bias"), "shape", None) != (model.num_classes,):
                is_replaced = True
                state.update({key: value for key, value in expected.items() if key.startswith(f"{name}.")})
    differences = describe_differences(shapes(state), shapes(expected))
    if differences:
        shaping = {key: value for key, value in settings.model_kwargs.items() if key not in ANY_WEIGHTS}
        hint = ""
        if shaping:
            hint = f"; was it trained with --model-kwargs {' '.join(f'{k}={v}' for k, v in shaping.items())}?"
        elif any("fc1.weight has shape" in line for line in differences):
            hint = "; if it was trained at another image size, give --model-kwargs img_size=N"
        whose = f" (it is of {described_name})" if described_name else ""
        raise UserError(f"{path}{whose} does not fit this {type(model).__name__}: {summary(differences)}{hint}")
    check_types(state, expected, path)
    if is_replaced:
        _logger.info(
            f"{path}: its classifier is missing or another task's; the model keeps its own, with random weights"
        )
    model.load_state_dict(state)

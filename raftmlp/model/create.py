"""A model of timm's list by name, or as a checkpoint describes it, with its weights loaded."""

import logging
from dataclasses import dataclass
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


@dataclass
class _Plan:
    """How a model is made.

    Attributes:
        name: What timm is asked for.
        described: What the checkpoint, or the folder that is the model's name, says of it; without the arguments that
            others replace.
        arguments: Those that the settings and the caller give, beside ``settings.model_kwargs``.
    """

    name: str
    described: dict[str, Any]
    arguments: dict[str, Any]


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
    plan = _plan(settings, to_train, classes, kwargs)
    recorded = current_names({**plan.described.get("model_kwargs", {}), **settings.model_kwargs})
    pretrained = settings.pretrained and load
    state = load_state_dict(settings.checkpoint) if settings.checkpoint and load else {}
    name, cfg = plan.name, plan.described.get("pretrained_cfg")
    arguments = {**plan.described.get("model_kwargs", {}), **plan.arguments, **settings.model_kwargs}
    try:
        if state and _is_ours(name):
            _check_size(plan, state, settings.checkpoint)
        model = timm.create_model(name, pretrained=pretrained, pretrained_cfg_overlay=cfg or None, **arguments)
    except Exception as error:  # constructors raise anything on arguments that they cannot take
        if isinstance(error, UserError) and str(settings.checkpoint or "") in str(error):
            raise
        source = f"{settings.checkpoint}: " if settings.checkpoint else ""
        reason, shaping = first_words(error), _shaping(settings.model_kwargs)
        if pretrained and shaping and "loading state_dict" in str(error):
            reason = f"its pretrained weights do not fit --model-kwargs {shaping}"
        raise UserError(f"{source}cannot make {name}: {reason}") from error
    if state:
        _load(model, state, settings, to_train, plan.described.get("model"))
    known = model.pretrained_cfg.get("num_classes")
    if pretrained and known and model.num_classes != known:
        if not to_train:
            raise UserError(
                f"the pretrained weights of {name} are for {known} classes, not {model.num_classes}: the classifier "
                f"would be a random one"
            )
        _logger.info(
            f"the classifier starts with random weights: {model.num_classes} classes, the pretrained one has {known}"
        )
    return model, recorded


def _plan(settings: ModelSettings, to_train: bool, classes: int | None, kwargs: dict[str, Any]) -> _Plan:
    if settings.checkpoint and settings.pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other")
    described = _description(settings)
    is_folder = is_folder_name(settings.model)
    name = described["model"] if is_folder else known_model(settings.model or described.get("model") or "raftmlp_s")
    architecture = timm.models.split_model_name_tag(name)[0]
    if architecture != described.get("model"):
        described = {key: described[key] for key in described.keys() & {"model"}}
    cfg = described.get("pretrained_cfg", {})
    arguments = dict(
        num_classes=settings.num_classes or cfg.get("num_classes") or (None if settings.pretrained else classes),
        in_chans=settings.in_chans or cfg.get("input_size", (None,))[0],
        **kwargs,
    )
    default = timm.models.get_pretrained_cfg(architecture)
    has_one_size = default and (default.fixed_input_size or (_is_ours(name) and to_train))  # others take any
    if settings.size and has_one_size:
        check_memory((settings.in_chans or 3, *settings.size))
        arguments["img_size"] = settings.size
    arguments = {key: value for key, value in arguments.items() if value is not None}
    rest = {key: value for key, value in described.get("model_kwargs", {}).items() if key not in arguments}
    if is_folder and settings.pretrained:
        name = settings.model
    return _Plan(name, {**described, "model_kwargs": rest}, arguments)


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


def _is_ours(name: str) -> bool:
    return timm.models.split_model_name_tag(name)[0] in timm.list_models(module="raftmlp")


def _check_size(plan: _Plan, state: StateDict, path: str) -> None:
    """Refuse a checkpoint whose description makes a model far larger than its weights, before that takes the memory."""
    cfg, arguments = plan.described.get("pretrained_cfg"), plan.described.get("model_kwargs", {})
    model = timm.create_model(plan.name, device="meta", pretrained_cfg_overlay=cfg or None, **arguments)
    described, held = (sum(x.numel() for x in tensors) for tensors in (model.parameters(), state.values()))
    if described > 2 * held + 10**8:
        raise UserError(f"{path} describes a {plan.name} of {described:,} parameters, and holds {held:,}")


def _shaping(model_kwargs: dict[str, Any]) -> str:
    """Return in words those arguments of a network that change which weights fit it; the image size is none of them."""
    shaping = " ".join(f"{key}={value}" for key, value in model_kwargs.items() if key not in ANY_WEIGHTS)
    return shaping.replace("\n", " ")


def _load(
    model: nn.Module, state: StateDict, settings: ModelSettings, may_replace_head: bool, described_name: str | None
) -> None:
    """Load weights strictly; the classifier may be another task's if ``may_replace_head``, and that is logged."""
    path, shaping = settings.checkpoint, _shaping(settings.model_kwargs)
    if isinstance(model, RaftMLP):
        state = adapt_state_dict(state, model, path)
    expected, note = model.state_dict(), ""
    if may_replace_head:
        classifier = model.pretrained_cfg.get("classifier") or ()
        for name in (classifier,) if isinstance(classifier, str) else classifier:
            if getattr(state.get(f"{name}.bias"), "shape", None) != (model.num_classes,):
                note = (
                    f"{path}: its classifier is missing or another task's; the model keeps its own, with random weights"
                )
                state.update({key: value for key, value in expected.items() if key.startswith(f"{name}.")})
    differences = describe_differences(shapes(state), shapes(expected))
    if differences:
        hint = f"; was it trained with --model-kwargs {shaping}?" if shaping else ""
        if any("fc1.weight has shape" in line for line in differences) and not shaping:
            hint = "; if it was trained at another image size, give --model-kwargs img_size=N"
        whose = f" (it is of {described_name})" if described_name else ""
        raise UserError(f"{path}{whose} does not fit this {type(model).__name__}: {summary(differences)}{hint}")
    check_types(state, expected, path)
    if note:
        _logger.info(note)
    model.load_state_dict(state)

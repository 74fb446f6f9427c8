"""Configs of mmdet and mmseg: read and changed, checked before anything runs, and the runner built from them."""

import difflib
import inspect
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIMIZERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings

from ..errors import MissingFileError, UserError, first_words
from .coco import DataError, check_coco_files
from .data import check_data, check_files


def read_config(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Return a config, changed and made to run on this machine.

    Args:
        path: The file.
        changes: New values by dotted keys, such as "optim_wrapper.optimizer.lr".
        data_dir: Folder of the data, in place of the config's data_root.
        work_dir: Folder of the run (default: the config's, else runs/CONFIG).
        launcher: What started several processes: "none", "pytorch", "slurm" or "mpi".

    Raises:
        UserError: If there is no such file, it is broken, or it has nothing that a change belongs to.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"no config at {path}")
    try:
        config = Config.fromfile(path)
        for key in changes or ():
            _check_key(config, key)
        config.merge_from_dict(dict(changes or {}))
        if any(key.split(".")[0] == "custom_imports" for key in changes or ()):  # mmengine imports those of the file
            import_modules_from_strings(**config.custom_imports)
    except UserError:
        raise
    except Exception as error:  # a config is Python
        raise UserError(f"cannot read the config {path}: {first_words(error)}") from error
    if "model" not in config or "default_scope" not in config:
        raise UserError(f"{path} is a part of a config: it has no model or no default_scope")
    if data_dir:
        old = config.get("data_root")
        if not old:
            raise UserError(f"{path} has no data_root that --data-dir could replace")
        new = os.path.join(data_dir, "") if old.endswith("/") else data_dir
        _replace(config, lambda text: new + text[len(old) :] if text.startswith(old) else text)
    if not torch.cuda.is_available():
        _replace(config, lambda text: "BN" if text == "SyncBN" else text)
    config.work_dir = work_dir or config.get("work_dir") or str(Path("runs") / path.stem)
    config.launcher = launcher
    return config


def _check_key(config: Config, key: str) -> None:
    """Refuse a dotted key whose first part neither the config nor mmengine's runner has: nothing would read it."""
    known = {*config, *inspect.signature(Runner).parameters, "custom_imports", "find_unused_parameters", "sync_bn"}
    first = key.split(".")[0]
    if first not in known:
        near = difflib.get_close_matches(first, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"--cfg-options {key}: the config has no {first!r}{hint}")


def _replace(config: Config, change: Callable[[str], str]) -> None:
    """Change every string in a config."""

    def changed(value):
        if isinstance(value, dict):
            for key in value:
                value[key] = changed(value[key])
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(changed(item) for item in value)
        return change(value) if isinstance(value, str) else value

    for key in config:
        config[key] = changed(config[key])


def drop_pretrained(config: Config) -> None:
    """Remove from a config which weights the backbone starts from; a checkpoint of the whole model has them."""
    if config.model.get("backbone"):
        config.model.backbone.pop("init_cfg", None)
    if "pretrained" in config.model:  # mmseg's older way
        config.model.pretrained = None


def build_runner(config: Config, loops: tuple[str, ...]) -> Runner:
    """Return the runner of a config that ``read_config`` returned; its processes are joined if it has several.

    The model, the loops ("train", "val", "test") and their data sets are built; the optimizer and its schedules, which
    only ``Runner.train`` builds, are tried out.

    Raises:
        UserError: If parts of the config do not fit together, or a file that it names is missing or damaged.
    """
    check_files(config, loops)
    _check_folder(Path(config.work_dir))
    init_default_scope(config.default_scope)
    if config.launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError("--launcher pytorch: start the processes with torchrun")
    part = "the model"
    try:
        if config.launcher != "none" and not torch.cuda.is_available():  # mmengine would look for GPUs
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        _check_backbone(config, load_weights="train" in loops and not config.resume)
        check_coco_files()
        runner = Runner.from_cfg(config)
        for loop in loops:
            part = f"the {loop} loop and its data ({config[f'{loop}_dataloader'].dataset.get('ann_file') or loop})"
            built = getattr(runner, f"{loop}_loop")  # mmengine builds it at this access
            evaluator, settings = getattr(built, "evaluator", None), config.get(f"{loop}_evaluator") or []
            settings = settings if isinstance(settings, list) else [settings]
            check_data(built.dataloader.dataset, runner.model, evaluator, settings)
        if "train" in loops:
            part = "the optimizer or its schedules"
            _try_schedules(runner)
    except DataError:
        raise
    except Exception as error:  # mmdet and mmseg raise anything on what they cannot build
        reason = first_words(error)
        if "need at least one array to concatenate" in reason:
            reason = "no image is left: the annotations name none of the config's classes, or there are no images"
        raise UserError(f"cannot build {part} of {config.filename}: {reason}") from error
    return runner


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written into."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "read-only" if existing.is_dir() else "a file"
        raise UserError(f"cannot write into {folder}: {existing} is {reason}")


def _check_backbone(config: Config, load_weights: bool) -> None:
    """Refuse a RaftMLP whose maps have other channels than the neck takes, or the head where there is no neck.

    Raises:
        ValueError: If it is one; if an argument of the backbone is not allowed, or, with ``load_weights``, its
            pretrained weights are missing or do not fit.
    """
    backbone = config.model.get("backbone") or {}
    if backbone.get("type") != "RaftMLP":
        return
    built = MODELS.build(backbone)
    name = "neck" if config.model.get("neck") else "decode_head"
    reader = config.model.get(name) or {}
    reader = reader[0] if isinstance(reader, list) else reader
    channels, fitting = reader.get("in_channels"), built.out_channels
    if isinstance(channels, list | tuple):
        if name == "decode_head":
            fitting = [fitting[i] for i in reader.get("in_index", range(len(fitting))) if i < len(fitting)]
        if list(channels) != fitting:
            raise UserError(
                f"model.{name}.in_channels {list(channels)} does not fit {backbone.get('arch', 'raftmlp_s')}: its maps "
                f"have {fitting} channels"
            )
    if load_weights:
        built.init_weights()


def _try_schedules(runner: Runner) -> None:
    """Build the optimizer and its schedules, and drop them again: mmengine builds them when it trains."""
    settings = runner.optim_wrapper, runner.param_schedulers
    kind = settings[0].get("optimizer", {}).get("type")
    if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:  # of a name with dots mmengine would say None
        raise UserError(f"optim_wrapper.optimizer.type {kind} is no optimizer of mmengine and no class to import")
    runner.optim_wrapper = runner.build_optim_wrapper(deepcopy(settings[0]))
    runner.build_param_scheduler(deepcopy(settings[1]))
    runner.optim_wrapper, runner.param_schedulers = settings

"""Configs of mmdet and mmseg: read and changed, and the runner built from them."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIMIZERS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils import apply_to, import_modules_from_strings

from ..errors import UserError
from .data import check_coco_files, check_data, check_data_root


def read_config(
    path: str | Path,
    changes: Mapping[str, Any] | None = None,
    data_dir: str | None = None,
    work_dir: str | None = None,
    launcher: str = "none",
) -> Config:
    """Return a config made to run on this machine, with changes by dotted keys ("optim_wrapper.optimizer.lr").

    ``data_dir`` takes the place of its data_root; the folder of the run is ``work_dir``, else the config's, else
    runs/CONFIG; ``launcher``, what started several processes, is "none", "pytorch", "slurm" or "mpi".
    """
    config, changes = Config.fromfile(path), dict(changes or {})
    known = {*config, *inspect.signature(Runner).parameters, "custom_imports", "find_unused_parameters", "sync_bn"}
    if unknown := [key for key in changes if key.split(".")[0] not in known]:
        raise UserError(f"--cfg-options {unknown[0]}: nothing reads it; the config has {', '.join(sorted(config))}")
    config.merge_from_dict(changes)
    if any(key.startswith("custom_imports") for key in changes):  # mmengine imports those of the file
        import_modules_from_strings(**config.custom_imports)
    if data_dir:
        old = config.get("data_root")
        if not old:
            raise UserError(f"{path} has no data_root that --data-dir could replace")
        new = os.path.join(data_dir, "") if old.endswith("/") else data_dir
        _replace_prefix(config, old, new)
    if not torch.cuda.is_available():
        _replace_prefix(config, "SyncBN", "BN")
    config.work_dir = work_dir or config.get("work_dir") or str(Path("runs") / Path(path).stem)
    config.launcher = launcher
    return config


def _replace_prefix(config: Config, old: str, new: str) -> None:
    for key in config:
        config[key] = apply_to(
            config[key], lambda value: isinstance(value, str) and value.startswith(old), lambda s: new + s[len(old) :]
        )


def drop_pretrained(config: Config) -> None:
    """Remove from a config which weights the backbone starts from; a checkpoint of the whole model has them."""
    if config.model.get("backbone"):
        config.model.backbone.pop("init_cfg", None)
    if "pretrained" in config.model:  # mmseg's older way
        config.model.pretrained = None


def build_runner(config: Config, loops: tuple[str, ...]) -> Runner:
    """Return a config's runner, its model, loops ("train", "val", "test") and their data built and checked.

    Its processes are joined if it has several.
    """
    check_data_root(config, loops)
    init_default_scope(config.default_scope)
    if config.launcher != "none" and not torch.cuda.is_available():  # mmengine would look for GPUs
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    if "train" in loops:
        kind = config.optim_wrapper.get("optimizer", {}).get("type")
        if isinstance(kind, str) and OPTIMIZERS.get(kind) is None:  # mmengine would say that None is not callable
            raise UserError(f"optim_wrapper.optimizer.type {kind} is no optimizer of mmengine and no class to import")
        backbone = config.model.get("backbone") or {}
        if not config.get("resume") and backbone.get("type") == "RaftMLP":
            MODELS.build(backbone).init_weights()  # to know of missing weights before the data are read
    check_coco_files()
    runner = Runner.from_cfg(config)
    for loop in loops:
        built = getattr(runner, f"{loop}_loop")  # mmengine builds it at this access
        check_data(built.dataloader.dataset, runner.model, getattr(built, "evaluator", None), f"{loop}_evaluator")
    return runner

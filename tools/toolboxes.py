"""What the scripts for mmdet and mmseg share: configs checked before they run, checkpoints read safely, whole files."""

import argparse
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from urllib.parse import urlparse

import torch
from PIL import Image
from torch import Tensor

import cli
from raftmlp.checkpoint import LogHistory, describe_differences, load_checkpoint, shapes, summary, write_bytes

try:
    import cv2
    import mmcv
    import mmdet  # noqa: F401
    import mmengine.runner.checkpoint
    import mmseg  # noqa: F401
    from mmengine.config import Config, DictAction
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.dataset import Compose
    from mmengine.fileio import LocalBackend, register_backend
    from mmengine.hooks import Hook  # noqa: F401
    from mmengine.logging import HistoryBuffer
    from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
    from mmengine.runner import CheckpointLoader, Runner
    from mmengine.structures import BaseDataElement
    from mmengine.visualization import Visualizer
except ImportError as error:
    sys.exit(cli.show_error(cli.UserError(f"mmdet and mmseg do not work here ({error}): see tools/install_mm.py")))

MODULE2PACKAGE["mmseg"] = "mmseg"  # where mmengine looks for "mmseg::" configs: OneDL's package has another name


# Options and configs


def add_config_arguments(parser: cli.Parser) -> argparse._ArgumentGroup:
    """Add the options that say which config, and what is changed in it."""
    parser.add_argument("config", metavar="CONFIG", help="a config of mmdet or mmseg, such as those in configs/")
    group = parser.add_argument_group("config")
    group.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=1e-3 model.backbone.with_cp=True",
    )
    return group


def add_run_arguments(group: argparse._ArgumentGroup, work_dir: str = "the config's, else runs/CONFIG") -> None:
    """Add the options that say where a run's files and its data are, and what started its processes.

    Args:
        group: Where to.
        work_dir: What --work-dir is by default, in words.
    """
    group.add_argument("--work-dir", metavar="DIR", help=f"folder of the run (default: {work_dir})")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the config's data_root)")
    group.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="pytorch" if "TORCHELASTIC_RUN_ID" in os.environ else "none",
        help="what started several processes; torchrun is recognised",
    )


def read_config(args: argparse.Namespace) -> Config:
    """Return the config that the options name, with their changes, made to run on this machine.

    Raises:
        UserError: If there is none, it is broken, or what is changed has no place in it.
    """
    path = Path(args.config)
    if not path.is_file():
        raise cli.UserError(f"no config at {path}")
    try:
        config = Config.fromfile(path)
        for key in args.cfg_options:
            _check_place(config, key)
        config.merge_from_dict(args.cfg_options)
    except cli.UserError:
        raise
    except Exception as error:  # a config is Python
        raise cli.UserError(f"cannot read the config {path}: {cli.first_words(error)}") from error
    if "model" not in config or "default_scope" not in config:
        raise cli.UserError(f"{path} is a part of a config: it has no model or no default_scope")
    if getattr(args, "data_dir", None):
        old = config.get("data_root")
        if not old:
            raise cli.UserError(f"{path} has no data_root that --data-dir could replace")
        new = os.path.join(args.data_dir, "") if old.endswith("/") else args.data_dir
        _replace(config, lambda text: new + text[len(old) :] if text.startswith(old) else text)
    if not torch.cuda.is_available():
        _replace(config, lambda text: "BN" if text == "SyncBN" else text)
    config.work_dir = getattr(args, "work_dir", None) or config.get("work_dir") or str(Path("runs") / path.stem)
    config.launcher = getattr(args, "launcher", "none")
    return config


def _check_place(config: Config, key: str) -> None:
    """Refuse a key that starts with what neither the config nor mmengine's runner knows: nothing would read it."""
    known = {*config, *inspect.signature(Runner).parameters, "find_unused_parameters", "sync_bn"}
    first = key.split(".")[0]
    if first not in known:
        near = difflib.get_close_matches(first, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise cli.UserError(f"--cfg-options {key}: the config has no {first!r}{hint}")


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


def forget_pretrained(config: Config) -> None:
    """Take out of a config which weights the backbone starts from: a checkpoint has them all."""
    if config.model.get("backbone"):
        config.model.backbone.pop("init_cfg", None)
    if "pretrained" in config.model:  # mmseg's older way
        config.model.pretrained = None


def build_runner(config: Config, loops: tuple[str, ...]) -> Runner:
    """Return the runner of a config, with its model and the loops ("train", "val", "test") and their data sets built.

    What only ``Runner.train`` builds, the optimiser and its schedules, is tried out too.

    Raises:
        UserError: If something in the config does not fit together, or a file that it names is missing or damaged.
    """
    _check_files(config, loops)
    _check_folder(Path(config.work_dir))
    init_default_scope(config.default_scope)
    if config.launcher == "pytorch" and "RANK" not in os.environ:
        raise cli.UserError("--launcher pytorch: start the processes with torchrun")
    part = "the model"
    try:
        if config.launcher != "none" and not torch.cuda.is_available():  # mmengine would look for GPUs
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        _check_backbone(config, fresh="train" in loops and not config.resume)
        runner = Runner.from_cfg(config)
        for loop in loops:
            part = f"the {loop} loop and its data ({config[f'{loop}_dataloader'].dataset.get('ann_file') or loop})"
            _name_damaged_files(getattr(runner, f"{loop}_loop").dataloader.dataset)  # mmengine builds it now
        if "train" in loops:
            part = "the optimiser or its schedules"
            _try_schedules(runner)
    except cli.UserError:
        raise
    except Exception as error:  # the toolboxes raise anything on what they cannot build
        reason = cli.first_words(error)
        if "need at least one array to concatenate" in reason:
            reason = "no image is left: the annotations name none of the config's classes, or there are no images"
        raise cli.UserError(f"cannot build {part} of {config.filename}: {reason}") from error
    return runner


def _try_schedules(runner: Runner) -> None:
    """Build the optimiser and its schedules, and forget them: mmengine builds them when it trains."""
    told = runner.optim_wrapper, runner.param_schedulers
    runner.optim_wrapper = runner.build_optim_wrapper(deepcopy(told[0]))
    runner.build_param_scheduler(deepcopy(told[1]))
    runner.optim_wrapper, runner.param_schedulers = told


class _DamagedFile(Exception):
    """An image or a label map cannot be read; the message is for people."""


class _Pipeline:
    """A data set's pipeline whose errors name the file that cannot be read."""

    def __init__(self, pipeline: Compose):
        self.pipeline = pipeline
        self.transforms = pipeline.transforms

    def __call__(self, data: dict) -> dict | None:
        try:
            return self.pipeline(data)
        except (cv2.error, OSError, AssertionError) as error:
            names = [data[key] for key in ("img_path", "seg_map_path") if data.get(key)]
            for name in names:
                try:
                    with Image.open(name) as image:
                        image.load()
                except OSError as reason:
                    raise _DamagedFile(f"cannot read {name}: {cli.first_words(reason)}") from error
            raise


def _name_damaged_files(dataset) -> None:
    for part in getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]:
        if part is not None:
            _name_damaged_files(part)
    if isinstance(getattr(dataset, "pipeline", None), Compose):
        dataset.pipeline = _Pipeline(dataset.pipeline)


@contextmanager
def damaged_files():
    """Turn what a data set raises on a file that it cannot read into a user error."""
    try:
        yield
    except _DamagedFile as error:  # of another process it is the last line
        raise cli.UserError(str(error).strip().splitlines()[-1].rpartition("_DamagedFile: ")[2]) from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written into."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise cli.UserError(f"cannot write into {folder}: {there} is {'read-only' if there.is_dir() else 'a file'}")


def _check_backbone(config: Config, fresh: bool) -> None:
    """Refuse a RaftMLP whose maps do not have the channels that the neck takes, or a head where there is no neck.

    Args:
        config: The config.
        fresh: Whether its weights are to be loaded, and so must be there and fit.

    Raises:
        UserError: If the channels differ; the message tells which fit.
        ValueError: If an argument of the backbone, or its weights, cannot be.
        FileNotFoundError: If its weights are missing.
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
            raise cli.UserError(
                f"model.{name}.in_channels {list(channels)} does not fit {backbone.get('arch', 'raftmlp_s')}: its maps "
                f"have {fitting} channels"
            )
    if fresh:
        built.init_weights()


def _check_files(config: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config whose files of data are missing, or whose data_root a data set does not use."""
    for loop in loops:
        dataset = config.get(f"{loop}_dataloader", {}).get("dataset", {})
        while "dataset" in dataset:  # inside of RepeatDataset and the like
            dataset = dataset["dataset"]
        root = dataset.get("data_root") or ""
        named = dict(ann_file=dataset.get("ann_file"), **(dataset.get("data_prefix") or {}))
        paths = {f"{loop}_dataloader.dataset {key}": os.path.join(root, value) for key, value in named.items() if value}
        evaluator = config.get(f"{loop}_evaluator") if loop != "train" else None
        if isinstance(evaluator, dict) and evaluator.get("ann_file"):
            paths[f"{loop}_evaluator.ann_file"] = evaluator["ann_file"]
        told = config.get("data_root")
        if told and paths and not any(path.startswith(told) for path in paths.values()):
            raise cli.UserError(
                f"the config's data_root is {told}, but {loop}_dataloader.dataset looks into "
                f"{root or next(iter(paths.values()))}: the one does not change with the other; say --data-dir"
            )
        for key, path in paths.items():
            if "://" not in path and not os.path.exists(path):
                raise cli.UserError(f"no data at {path} ({key}): name the folder with --data-dir")


# Checkpoints and files


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str | Path, map_location=None) -> dict:
    """Return a checkpoint of mmengine's, read without running code from it: what its own loader does not promise."""
    try:
        checkpoint = load_checkpoint(Path(filename).expanduser())
    except (ValueError, FileNotFoundError) as error:
        raise cli.UserError(str(error)) from error
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    for key, history in scalars.items() if isinstance(scalars, dict) else ():
        if isinstance(history, LogHistory):
            try:
                values, counts = (getattr(history, name).values.tolist() for name in ("_log_history", "_count_history"))
            except AttributeError as error:
                raise cli.UserError(f"{filename} is damaged: its log {key!r} is no list of numbers") from error
            scalars[key] = HistoryBuffer(values, counts)
    return checkpoint


@CheckpointLoader.register_scheme(prefixes=("http://", "https://"), force=True)
def load_from_http(filename: str, map_location=None, model_dir: str | None = None, progress: bool = True) -> dict:
    """Return a checkpoint of an address, fetched once into torch's own cache, and read as a file is."""
    path = Path(model_dir or Path(torch.hub.get_dir()) / "checkpoints") / Path(urlparse(filename).path).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(filename, str(path), progress=progress and cli.is_first())
        except (OSError, ValueError) as error:
            raise cli.UserError(f"cannot fetch {filename}: {cli.first_words(error)}") from error
    return load_from_local(path)


def _refuse(file, map_location=None, weights_only=None):
    raise cli.UserError("checkpoints are read from files and over http alone")


# the readers of mmengine's other addresses (torchvision://, open-mmlab://, s3://, ...) end in one of these two
mmengine.runner.checkpoint.load_from_http = load_from_http
mmengine.runner.checkpoint._safe_torch_load = _refuse


@register_backend("local", prefixes="", force=True)
class WholeFileBackend(LocalBackend):
    """mmengine's access to files, but that a checkpoint is there whole or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file, beside its place until it is whole."""
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, obj)


def checkpoints(work_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    found = [(re.fullmatch(r"(?:epoch|iter)_(\d+)\.pth", path.name), path) for path in Path(work_dir).glob("*.pth")]
    return [path for match, path in sorted(((m, p) for m, p in found if m), key=lambda f: -int(f[0][1]))]


def last_whole_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read, None if it has none; damaged ones are named.

    Raises:
        UserError: If all are damaged.
    """
    damaged = []
    for path in checkpoints(work_dir):
        try:
            load_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            cli.say(f"{error}; the one before it takes its place")
            continue
        return path
    if damaged:
        raise cli.UserError(f"no checkpoint in {work_dir} is whole: {'; '.join(damaged)}")
    return None


def find_checkpoint(path: str) -> Path:
    """Return a checkpoint: the file itself, or the last whole one in the folder of a run.

    Raises:
        UserError: If there is no such file, or the folder has none.
    """
    if Path(path).is_file():
        return Path(path)
    if not Path(path).is_dir():
        raise cli.UserError(f"no checkpoint at {path}")
    found = last_whole_checkpoint(path)
    if found is None:
        raise cli.UserError(f"no checkpoint in the folder {path}")
    return found


def check_weights(model: torch.nn.Module, checkpoint: dict, path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights if they are all that a whole detector or segmentor has, and no others.

    Raises:
        UserError: If they are not.
    """
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise cli.UserError(f"{path} holds no weights of a model of mmdet or mmseg")
    if differences := describe_differences(shapes(state), shapes(getattr(model, "module", model).state_dict())):
        raise cli.UserError(f"{path} does not fit the config's model: {summary(differences)}")
    return state


def load_weights(model: torch.nn.Module, path: Path) -> dict:
    """Load a checkpoint's weights into a whole detector or segmentor, all of them, and return the checkpoint.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    checkpoint = load_from_local(path)
    getattr(model, "module", model).load_state_dict(check_weights(model, checkpoint, path))
    return checkpoint


# Predictions


def load_model(config: Config, path: Path) -> tuple[torch.nn.Module, list[str], list | None]:
    """Return a config's model with a checkpoint's weights, the names of its classes, and their colours if it tells.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    init_default_scope(config.default_scope)
    forget_pretrained(config)
    try:
        model = MODELS.build(config.model)
    except Exception as error:
        raise cli.UserError(f"cannot build the config's model: {cli.first_words(error)}") from error
    meta = load_weights(model, path).get("meta")
    meta = meta.get("dataset_meta") if isinstance(meta, dict) else None
    classes = meta.get("classes") if isinstance(meta, dict) else None
    if not classes:
        raise cli.UserError(f"{path} does not tell its classes: it is no checkpoint of tools/train_mm.py")
    return model, list(classes), meta.get("palette")


def image_pipeline(config: Config) -> Compose:
    """Return what a config does to images before they are evaluated."""
    steps = config.test_dataloader.dataset.pipeline
    return Compose([step for step in steps if not step.type.startswith("Load") or step.type == "LoadImageFromFile"])


def build_visualizer(config: Config, classes: list[str], palette: list | None) -> Visualizer:
    """Return the toolbox's means to draw predictions."""
    visualizer = VISUALIZERS.build({**config.visualizer, "vis_backends": None, "name": "predictions"})
    visualizer.dataset_meta = dict(classes=classes, palette=palette or "random")
    return visualizer


# Results


def main_results(results: dict) -> dict[str, float]:
    """Return the results that people compare: AP over all thresholds and at 0.5, mean IoU and accuracies."""
    names = ("mAP", "mAP_50", "mIoU", "mAcc", "aAcc")
    return {key: value for key, value in results.items() if key.endswith(names)}


def results_line(results: dict) -> str:
    """Return the main results in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in main_results(results).items()) or "nothing was found"


def draw(visualizer: Visualizer, sample: BaseDataElement, path: Path, score_thr: float, truth: bool) -> None:
    """Draw the predictions for an image into a PNG file, to the right of the truth if that is wanted.

    Args:
        visualizer: The toolbox's own.
        sample: What the model says of the image, and its truth.
        path: The file.
        score_thr: Score from which on objects are drawn.
        truth: Whether to draw the truth.
    """
    image = mmcv.imread(sample.img_path, channel_order="rgb")
    if "pred_sem_seg" in sample and image[..., 0].size == 1:  # mmseg's visualizer takes its mask for a number
        mmcv.imwrite(image[..., ::-1], str(path))
        return
    kwargs = dict(pred_score_thr=score_thr) if "pred_instances" in sample else dict(with_labels=False)
    visualizer.add_datasample(path.stem, image, sample, draw_gt=truth, out_file=str(path), **kwargs)

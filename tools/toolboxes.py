"""What the scripts for mmdet and mmseg share: configs checked before they run, checkpoints read safely, whole files."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import cli
from raftmlp.checkpoint import LogHistory, describe_differences, load_checkpoint, shapes, write_bytes

try:
    import mmcv
    import mmdet  # noqa: F401
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
    """Add the options that say which config, and what is changed in it: those of ``read_config``."""
    parser.add_argument("config", metavar="CONFIG", help="a config of mmdet or mmseg, such as those in configs/")
    group = parser.add_argument_group("config")
    group.add_argument("--work-dir", metavar="DIR", help="folder of the run (default: the config's, else runs/CONFIG)")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data (default: the config's data_root)")
    group.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="change the config, for example optim_wrapper.optimizer.lr=1e-3 model.backbone.with_cp=True",
    )
    return group


def add_launcher_argument(group: argparse._ArgumentGroup) -> None:
    """Add the option that says what started several processes."""
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
    if args.data_dir:
        old = config.get("data_root")
        if not old:
            raise cli.UserError(f"{path} has no data_root that --data-dir could replace")
        new = os.path.join(args.data_dir, "") if old.endswith("/") else args.data_dir
        _replace(config, lambda text: new + text[len(old) :] if text.startswith(old) else text)
    if not torch.cuda.is_available():
        _replace(config, lambda text: "BN" if text == "SyncBN" else text)
    config.work_dir = args.work_dir or config.get("work_dir") or str(Path("runs") / path.stem)
    config.launcher = getattr(args, "launcher", "none")
    return config


def _check_place(config: Config, key: str) -> None:
    """Refuse a key that has no place: mmengine would make one, and nothing would read it."""
    *parents, _ = key.split(".")
    place = config
    for parent in parents or [key]:
        if isinstance(place, (list, tuple)) and parent.isdecimal() and int(parent) < len(place):
            place = place[int(parent)]
        elif hasattr(place, "keys") and parent in place:
            place = place[parent]
        else:
            near = difflib.get_close_matches(parent, list(place) if hasattr(place, "keys") else [], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise cli.UserError(f"--cfg-options {key}: the config has no {parent!r}{hint}")


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


def build_runner(config: Config, loops: tuple[str, ...]) -> Runner:
    """Return the runner of a config, with its model and the loops ("train", "val", "test") and their data sets built.

    Raises:
        UserError: If something in the config does not fit together, or a file that it names is missing or damaged.
    """
    _check_files(config, loops)
    init_default_scope(config.default_scope)
    if config.launcher != "none" and not torch.cuda.is_available():  # mmengine would look for GPUs
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        config.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    try:
        _check_backbone(config, fresh="train" in loops and not config.resume)
        runner = Runner.from_cfg(config)
        for loop in loops:
            getattr(runner, f"{loop}_loop")  # mmengine builds it now
    except cli.UserError:
        raise
    except Exception as error:  # the toolboxes raise anything on a config that they cannot build
        raise cli.UserError(f"cannot build what {config.filename} tells: {cli.first_words(error)}") from error
    return runner


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
    backbone = config.model.get("backbone", {})
    if backbone.get("type") != "RaftMLP":
        return
    built = MODELS.build(backbone)
    reader = "neck" if config.model.get("neck") else "decode_head"
    channels = config.model.get(reader, {}).get("in_channels")
    if isinstance(channels, (list, tuple)) and list(channels) != built.out_channels:
        raise cli.UserError(
            f"model.{reader}.in_channels {list(channels)} does not fit {backbone.get('arch', 'raftmlp_s')}: its maps "
            f"have {built.out_channels} channels"
        )
    if fresh:
        built.init_weights()


def _check_files(config: Config, loops: tuple[str, ...]) -> None:
    """Refuse a config whose files of data are missing, before anything is built."""
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
        for key, path in paths.items():
            if "://" not in path and not os.path.exists(path):
                raise cli.UserError(
                    f"no data at {path} ({key}): name the folder with --data-dir (the config's is "
                    f"{config.get('data_root') or root})"
                )


# Checkpoints and files


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_from_local(filename: str | Path, map_location=None) -> dict:
    """Return a checkpoint of mmengine's, read without running code from it: what its own loader does not promise."""
    try:
        checkpoint = load_checkpoint(Path(filename).expanduser())
    except (ValueError, FileNotFoundError) as error:
        raise cli.UserError(str(error)) from error
    scalars = checkpoint.get("message_hub", {}).get("log_scalars", {})
    for key, history in scalars.items():
        if isinstance(history, LogHistory):
            scalars[key] = HistoryBuffer(history._log_history, history._count_history, history.max_length)
    return checkpoint


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


def load_weights(model: torch.nn.Module, path: str | Path) -> dict:
    """Load a checkpoint's weights into a whole detector or segmentor, all of them, and return the checkpoint.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    checkpoint = load_from_local(path)
    state = checkpoint.get("state_dict", checkpoint)
    model = getattr(model, "module", model)
    if differences := describe_differences(shapes(state), shapes(model.state_dict())):
        more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
        raise cli.UserError(f"{path} does not fit the config's model: {'; '.join(differences[:3])}{more}")
    model.load_state_dict(state)
    return checkpoint


# Predictions


def load_model(config: Config, path: str) -> tuple[torch.nn.Module, list[str], list | None]:
    """Return a config's model with a checkpoint's weights, the names of its classes, and their colours if it tells.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    init_default_scope(config.default_scope)
    config.model.backbone.pop("init_cfg", None)  # the checkpoint has all weights
    try:
        model = MODELS.build(config.model)
    except Exception as error:
        raise cli.UserError(f"cannot build the config's model: {cli.first_words(error)}") from error
    meta = load_weights(model, path).get("meta", {}).get("dataset_meta") or {}
    classes = meta.get("classes")
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
    return ", ".join(f"{name} {value:.4g}" for name, value in main_results(results).items())


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
    kwargs = dict(pred_score_thr=score_thr) if "pred_instances" in sample else {}
    visualizer.add_datasample(path.stem, image, sample, draw_gt=truth, out_file=str(path), **kwargs)

"""The folder of a training run: what it is resumed or started from, its files, its log and curves."""

import ast
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from timm.utils import unwrap_model
from torch import nn

from ..checkpoints.weights import describe_differences, shapes, summary
from ..errors import UserError
from ..files import save_figure
from .checkpoints import check_weights, find_checkpoint, load_from_local, newest_checkpoint, trained_classes
from .coco import listed

CHECKPOINTS = ("epoch_*.pth", "iter_*.pth", "best_*.pth")
RUN_FILES = (".*.pth", "last_checkpoint", "curves.png", "[0-9]*_[0-9]*/vis_data")

_logger = logging.getLogger(__name__)


def find_resume(folder: Path, resume: str = "", overwrite: bool = False) -> Path | None:
    """Return the checkpoint that a run is resumed from, None if it starts at the beginning.

    Args:
        folder: Folder of the run.
        resume: A checkpoint or the folder of a run; "auto" is the newest one in ``folder``, if any; "" is none.
        overwrite: Whether the folder may hold a run that is not resumed.

    Raises:
        UserError: If the folder holds a run that is neither to be resumed nor removed, or no checkpoint can be read.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    if not resume:
        if any(_files(folder, CHECKPOINTS)) and not overwrite:
            raise UserError(f"{folder} holds a run: give --resume, --overwrite or another --work-dir")
        return None
    if resume != "auto":
        checkpoint = find_checkpoint(resume)
        if any(_files(folder, CHECKPOINTS)) and checkpoint.parent.resolve() != folder.resolve():
            raise UserError(f"{folder} holds another run than that of {checkpoint}: give another --work-dir")
        return checkpoint
    newest = newest_checkpoint(folder)
    if newest is None:
        _logger.info(f"no checkpoint in {folder} to resume: starting at the beginning")
    return newest


def check_resume(model: nn.Module, path: Path, config: Config, classes: Sequence[str]) -> None:
    """Refuse a checkpoint that a run cannot be resumed from, as mmengine would not; log it if it is the run's end.

    Raises:
        UserError: If it is another model's or another optimizer's, of other classes, or not of a run.
    """
    checkpoint = load_from_local(path)
    check_weights(model, checkpoint, path)
    hint = f"to start from its weights give --cfg-options load_from={path}"
    for part in ("meta", "message_hub", "optimizer", "param_schedulers"):
        if part not in checkpoint:
            raise UserError(f"{path} cannot be resumed: it has no {part}; {hint}")
    meta = checkpoint["meta"]
    if not isinstance(meta, dict):
        raise UserError(f"{path} is damaged: its meta is no dict")
    before, now = optimizer_types(meta.get("cfg")), optimizer_types(config.pretty_text)
    if before and before != now:
        names = [" and ".join(types) for types in (before, now)]
        raise UserError(f"{path} cannot be resumed: it is of a run with {names[0]}, the config has {names[1]}; {hint}")
    if (trained := trained_classes(checkpoint)) and trained != list(classes):
        raise UserError(
            f"{path} cannot be resumed: it was trained on the classes {listed(trained)}, the config has "
            f"{listed(list(classes))}; {hint}"
        )
    ends = dict(epoch=config.train_cfg.get("max_epochs"), iter=config.train_cfg.get("max_iters"))
    if any(end is not None and meta.get(unit, 0) >= end for unit, end in ends.items()):
        _logger.info(f"{path} is the end of its run: nothing is left to train")


def optimizer_types(text: object) -> list[str]:
    """Return the types of the optimizers in a config's text, which is read and not run; none where it is no config."""
    try:
        statements = ast.parse(text).body if isinstance(text, str) else []
    except SyntaxError:
        return []
    return [
        ast.unparse(argument.value).strip("'")
        for statement in statements
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "optim_wrapper"
        for keyword in ast.walk(statement)
        if isinstance(keyword, ast.keyword) and keyword.arg == "optimizer"
        for argument in getattr(keyword.value, "keywords", [])
        if argument.arg == "type"
    ]


def check_start(model: nn.Module, path: str) -> None:
    """Refuse weights to start from (load_from) of which the model takes none; what it does not take is logged.

    Raises:
        UserError: If it takes none, or the file is missing or damaged.
    """
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    expected, given = shapes(unwrap_model(model).state_dict()), shapes(checkpoint.get("state_dict", checkpoint))
    if not any(given.get(key) == shape for key, shape in expected.items()):
        raise UserError(f"load_from {path}: it has no weights of the config's model")
    if differences := describe_differences(given, expected):
        _logger.info(f"load_from {path} fits in part: {summary(differences)}; the rest of the weights is loaded")


def clear_run(folder: Path, keep: Path) -> None:
    """Remove the files of a run, and no others; those below the folder ``keep`` stay."""
    for path in _files(folder, CHECKPOINTS + RUN_FILES):
        if keep.resolve() not in path.resolve().parents:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))


# Log and results


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return a run's log over all its starts: entries with a loss, by iteration, and entries with results.

    What came after the checkpoint that a run was resumed from is replaced by what the resumed run did.
    """
    losses: dict[int, dict] = {}
    results: dict[int, dict] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the run was killed in the middle of it
                continue
            (losses if "loss" in entry else results)[entry["step"]] = entry
    return [losses[step] for step in sorted(losses)], [results[step] for step in sorted(results)]


def main_results(results: dict) -> dict[str, float]:
    """Return the results that people compare: AP over all thresholds and at 0.5, mean IoU and accuracies."""
    names = ("mAP", "mAP_50", "mIoU", "mAcc", "aAcc")
    return {key: value for key, value in results.items() if key.endswith(names)}


def results_line(results: dict) -> str:
    """Return the main results in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in main_results(results).items()) or "nothing was found"


def draw_curves(path: Path, losses: list[dict], results: list[dict], unit: str) -> None:
    """Draw what ``read_log`` returns: losses over iterations, main results over the unit of their steps."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in sorted({name for entry in losses for name in entry if "loss" in name}):
        left.plot([entry["step"] for entry in losses], [entry.get(name) for entry in losses], label=name)
    left.set(xlabel="iteration", ylabel="loss", yscale="log")
    for name in main_results(results[-1]) if results else ():
        right.plot([entry["step"] for entry in results], [entry.get(name) for entry in results], "o-", label=name)
    right.set(xlabel=unit, ylabel="result")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(figure, path)

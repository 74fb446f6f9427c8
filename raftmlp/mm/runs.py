"""The folder of a training run: what it is resumed from, its log and curves."""

import json
import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader, Runner
from timm.utils import unwrap_model
from torch import nn

from ..checkpoints.weights import shapes
from ..errors import UserError
from ..files import save_figure
from .checkpoints import check_weights, find_checkpoint, list_checkpoints, load_from_local, trained_classes
from .data import listed

CHECKPOINTS = ("epoch_*.pth", "iter_*.pth", "best_*.pth")
RUN_FILES = (*CHECKPOINTS, ".*.pth", "last_checkpoint", "curves.png", "[0-9]*_[0-9]*/vis_data")


def find_files(folder: Path, patterns: Sequence[str] = RUN_FILES) -> list[Path]:
    """Return the files of a run in a folder, no others."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def find_resume(folder: Path, resume: str = "", overwrite: bool = False) -> Path | None:
    """Return the checkpoint that a run in a folder is resumed from, None if it starts at the beginning.

    ``resume`` is a checkpoint or the folder of a run; "auto" is the newest one in ``folder``, if any; "" is none.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    holds_run = bool(find_files(folder, CHECKPOINTS))
    if holds_run and not resume and not overwrite:
        raise UserError(f"{folder} holds a run: give --resume, --overwrite or another --work-dir")
    if not resume or (resume == "auto" and not list_checkpoints(folder)):
        return None
    checkpoint = find_checkpoint(folder if resume == "auto" else resume)
    if holds_run and checkpoint.parent.resolve() != folder.resolve():
        raise UserError(f"{folder} holds another run than that of {checkpoint}: give another --work-dir")
    return checkpoint


def check_resume(runner: Runner, path: Path) -> None:
    """Refuse a checkpoint of another model, other classes or another optimizer: mmengine would take what fits."""
    checkpoint = load_from_local(path)
    check_weights(runner.model, checkpoint, path)
    trained, classes = trained_classes(checkpoint), list(runner.train_dataloader.dataset.metainfo.get("classes") or ())
    expected = runner.build_optim_wrapper(deepcopy(runner.optim_wrapper)).state_dict()
    before, now = (s.get("param_groups", [{}])[0].keys() for s in (checkpoint.get("optimizer", {}), expected))
    reason = ""
    if missing := {"meta", "message_hub", "optimizer", "param_schedulers"} - checkpoint.keys():
        reason = f"it has no {min(missing)}"
    elif trained and trained != classes:
        reason = f"it was trained on the classes {listed(trained)}, the config has {listed(classes)}"
    elif strange := sorted(before - now - {"initial_lr"}):  # a schedule adds this one
        reason = f"its optimizer, another one, has {listed(strange)}"
    if reason:
        hint = f"to start from its weights give --cfg-options load_from={path}"
        raise UserError(f"{path} cannot be resumed: {reason}; {hint}")


def check_start(model: nn.Module, path: str) -> None:
    """Refuse weights to start from (load_from) of which the model takes none: mmengine would start without them."""
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location="cpu")
    expected, given = shapes(unwrap_model(model).state_dict()), shapes(checkpoint.get("state_dict", checkpoint))
    if not expected.items() & given.items():
        raise UserError(f"load_from {path}: it has no weights of the config's model")


class RemoveHook(Hook):
    """Removes the files of the run that was in the folder, once the new one has trained a batch."""

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Remove them."""
        while self.files:
            path = self.files.pop()
            shutil.rmtree(path) if path.is_dir() else path.unlink()


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


def is_main(name: str) -> bool:
    """Return whether a result is one that people compare: AP over all thresholds and at 0.5, mean IoU, accuracies."""
    return name.endswith(("mAP", "mAP_50", "mIoU", "mAcc", "aAcc"))


def results_line(results: dict) -> str:
    """Return the main results in a line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in results.items() if is_main(name)) or "nothing was found"


def draw_curves(path: Path, losses: list[dict], results: list[dict], unit: str) -> None:
    """Draw what ``read_log`` returns: losses over iterations, main results over the unit of their steps."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, entries, xlabel in zip(figure.subplots(1, 2), (losses, results), ("iteration", unit)):
        for name in sorted({name for entry in entries for name in entry if "loss" in name or is_main(name)}):
            axis.plot([e["step"] for e in entries], [e.get(name) for e in entries], ".-", label=name)
        axis.set(xlabel=xlabel, yscale="log" if entries is losses else "linear")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    save_figure(figure, path)

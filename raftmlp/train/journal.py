"""What a run writes beside its checkpoints: log, curves, summary, and pretrained weights with their card."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag

from .. import __version__
from ..checkpoints.pretrained import checkpoint_folders
from ..checkpoints.weights import load_checkpoint, save_state_dict, unwrap
from ..errors import MissingPackageError, UserError
from ..files import save_figure, write_csv, write_json

# what a validation loss is without: settings, by their names in words
OF_TRAINING_LOSS = dict(smoothing="label smoothing", mixup="mixup", cutmix="cutmix", kd_model_name="a teacher")

__all__ = ["Journal", "export_path", "export_pretrained", "plot_curves", "summarise", "versions"]


class Journal:
    """Writes the log of a run into its folder, if this process ``writes``: log.csv, curves.png, and to trackers.

    Raises:
        MissingPackageError: If TensorBoard or Weights & Biases is asked for, and not installed.
    """

    def __init__(self, folder: Path, recipe: dict, tensorboard: bool, wandb: bool, writes: bool):
        self.folder, self.writes, self.tensorboard, self.wandb = folder, writes, None, None
        self.loss_parts = [name for key, name in OF_TRAINING_LOSS.items() if recipe[key]]
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError("--log-tensorboard needs TensorBoard: pip install tensorboard") from error
            self.tensorboard = SummaryWriter(folder / "tensorboard") if writes else None
        if wandb:
            try:
                import wandb as tracker
            except ImportError as error:
                raise MissingPackageError("--log-wandb needs Weights & Biases: pip install wandb") from error
            if writes:
                name = re.sub(r"\W+", "-", str(folder.resolve())).strip("-")
                self.wandb = tracker.init(project="raftmlp", id=name, resume="allow", dir=str(folder), config=recipe)

    def write(self, log: list[dict]) -> None:
        """Write a log, a row an epoch, into the folder."""
        if self.writes:
            write_csv(self.folder / "log.csv", log)  # rows differ in a resumed run that has other sizes than before
            plot_curves(log, self.folder / "curves.png", self.loss_parts)

    def report(self, row: dict) -> None:
        """Send the row of an epoch to TensorBoard and to Weights & Biases."""
        epoch = row["epoch"]
        figures = {key.replace("_", "/", 1): value for key, value in row.items() if key != "epoch"}
        if self.tensorboard:
            for key, value in figures.items():
                self.tensorboard.add_scalar(key, value, epoch)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(figures, step=epoch)


def plot_curves(log: list[dict], picture: Path, loss_parts: Sequence[str] = ()) -> None:
    """Draw loss and accuracy over the epochs of a log; the training loss is said to be with ``loss_parts``."""
    from matplotlib.figure import Figure  # draws into files, no screen needed
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in log]
    figure = Figure(figsize=(9, 3.4), layout="tight")
    left, right = figure.subplots(1, 2)
    training, validation = "training", "validation"
    if loss_parts:
        training, validation = f"training, with {', '.join(loss_parts)}", "validation, without"
    left.plot(epochs, [row["train_loss"] for row in log], label=training)
    left.plot(epochs, [row["eval_loss"] for row in log], label=validation)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [row["eval_top1"] for row in log], color="tab:green")
    right.set(xlabel="epoch", ylabel="validation top-1 in %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    save_figure(figure, picture)


def summarise(log: list[dict], best: dict) -> dict[str, Any]:
    """Return the figures of a finished run, of its log and the best row of it, and the versions that made it."""
    last, counts = log[-1], Counter()
    for row in log:
        counts.update({key.removeprefix("updates_"): row[key] for key in row if key.startswith("updates_")})
    return dict(
        best_epoch=best["epoch"],
        best_top1=best["eval_top1"],
        best={key: value for key, value in best.items() if key.startswith("eval_")},
        last={key: value for key, value in last.items() if key.startswith("eval_")},
        **(dict(updates_by_size=counts) if counts else {}),
        bad_images=last["bad_images"],
        seconds=round(sum(row["seconds"] for row in log), 1),
        commit=git_commit(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of what decides a run's figures."""
    return dict(raftmlp=__version__, torch=torch.__version__, timm=timm.__version__, python=platform.python_version())


def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files were changed; None outside of one."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (root / ".git").exists():
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# Pretrained weights


def export_path(model: str, tag: str, overwrite: bool = False) -> Path:
    """Return the file MODEL.TAG.safetensors in the first folder of pretrained weights, which is made.

    Another tag of the model gives way to this one.

    Raises:
        UserError: If the tag has other characters than letters, digits, - and _, or the file is there already or
            cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise UserError(f"--export {tag}: a tag is made of letters, digits, - and _")
    name, _ = split_model_name_tag(model)
    path = checkpoint_folders()[0] / f"{name}.{tag}.safetensors"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another --export, or --overwrite it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot export to {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot export to {path}: no permission")
    return path


def export_pretrained(path: Path, summary: dict) -> Path:
    """Write the best weights of a run as pretrained weights, and a JSON card of their origin; return the card."""
    checkpoint = load_checkpoint(summary["best_checkpoint"])
    cfg, kwargs = checkpoint["pretrained_cfg"], json.dumps(checkpoint["model_kwargs"])
    metadata = dict(model=checkpoint["arch"], model_kwargs=kwargs, pretrained_cfg=json.dumps(cfg))
    save_state_dict(unwrap(checkpoint), path, metadata)
    card = dict(
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
        data=checkpoint["options"]["dataset"] or "a folder of images",
        **{key: value for key, value in summary.items() if key != "best_checkpoint"},
        pretrained_cfg=cfg,
        options=checkpoint["options"],
    )
    write_json(path.with_suffix(".json"), card)
    return path.with_suffix(".json")

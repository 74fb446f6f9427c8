"""What a run tells: lines and a bar of progress, its log and curves, its summary, and exported weights with a card."""

import hashlib
import json
import logging
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..checkpoints.pretrained import checkpoint_folders
from ..checkpoints.weights import load_checkpoint, save_state_dict, unwrap
from ..data.updates import Updates
from ..device import Processes, most_memory
from ..errors import UserError
from ..files import write_csv, write_json
from ..sizes import size_name
from .settings import WARMUP_EPOCHS, TrainSettings
from .state import TrainState

__all__ = [
    "Progress", "RunLogger", "export_path", "export_pretrained", "headline", "summarize",
    "updates_in_words", "versions",
]  # fmt: skip

_logger = logging.getLogger(__name__)
# what a validation loss is without: settings, by their names in words
OF_TRAINING_LOSS = dict(smoothing="label smoothing", mixup="mixup", cutmix="cutmix", kd_model_name="a teacher")
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
SHORT = {"learning rate": "lr", "waiting for data": "waiting", "memory": ""}  # on a bar


class RunLogger:
    """Writes the log of a run into its folder, if this process ``writes``: log.csv, curves.png, and to trackers."""

    def __init__(self, folder: Path, recipe: dict, tensorboard: bool, wandb: bool, writes: bool):
        self.folder, self.writes, self.tensorboard, self.wandb = folder, writes, None, None
        self.loss_parts = [name for key, name in OF_TRAINING_LOSS.items() if recipe[key]]
        if tensorboard:  # all processes import it, and so all end where it is not installed
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(folder / "tensorboard") if writes else None
        if wandb:
            import wandb as tracker

            if writes:
                name = re.sub(r"\W+", "-", str(folder.resolve())).strip("-")
                self.wandb = tracker.init(project="raftmlp", id=name, resume="allow", dir=str(folder), config=recipe)

    def write(self, log: list[dict]) -> None:
        """Write a log, a row an epoch, into the folder."""
        from ..evaluate.plots import draw_curves  # takes half a second

        if self.writes:
            write_csv(self.folder / "log.csv", log)  # rows differ in a resumed run that has other sizes than before
            draw_curves(self.folder / "curves.png", log, self.loss_parts)

    def report(self, row: dict, best: dict, epochs: int) -> None:
        """Show the row of an epoch in a line, and send it to TensorBoard and to Weights & Biases."""
        epoch = row["epoch"]
        left = timedelta(seconds=round(row["seconds"] * (epochs - epoch)))
        _logger.info(
            f"epoch {epoch}/{epochs}: training loss {row['train_loss']:.4f}, validation loss {row['eval_loss']:.4f}, "
            f"top-1 {row['eval_top1']:.2f} % (best {best['eval_top1']:.2f} in epoch {best['epoch']}), "
            f"{row['train_images_per_second']:.0f} images/s, {left} left"
        )
        figures = {key.replace("_", "/", 1): value for key, value in row.items() if key != "epoch"}
        if self.tensorboard:
            for key, value in figures.items():
                self.tensorboard.add_scalar(key, value, epoch)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(figures, step=epoch)


class Progress:
    """The progress of an epoch of ``updates``, of so many ``images`` each; a context, after which the bar is gone.

    ``waited`` counts the seconds that went by without data. Without a terminal, lines come every ``interval`` updates.
    """

    def __init__(self, title: str, state: TrainState, updates: int, images: float, interval: int, processes: Processes):
        self.title, self.state, self.updates, self.images = title, state, updates, images
        self.interval, self.device, self.show = interval, processes.device, processes.is_first
        self.seconds_before, self.waited, self._start = state.seconds, 0.0, time.perf_counter()
        hide = None if self.show else True  # None: where there is no terminal
        counts = dict(total=updates, initial=state.update, smoothing=0.05)
        self.bar = tqdm(desc=title, bar_format=BAR, leave=False, disable=hide, **counts)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start, and those of before."""
        return self.seconds_before + time.perf_counter() - self._start

    @property
    def rate(self) -> float:
        """Images a second in the epoch so far."""
        return self.state.update * self.images / self.seconds

    def advance(self, lr: float) -> None:
        """Show that an update is done, at a learning rate."""
        update, loss, rate, memory = self.state.update, self.state.mean_loss, self.rate, most_memory(self.device)
        figures = {
            **({} if loss is None else {"loss": f"{loss:.3f}"}),
            "images/s": f"{rate:.0f}",
            "learning rate": f"{lr:.3g}",
            "waiting for data": f"{self.waited / (self.seconds - self.seconds_before):.0%}",
            **({} if memory is None else {"memory": f"{memory / 2**30:.1f} GiB"}),
        }
        self.bar.update()
        if not self.bar.disable:
            self._show_what_fits([f"{SHORT.get(key, key)} {value}".strip() for key, value in figures.items()])
        elif self.show and update % self.interval == 0:
            left = timedelta(seconds=round((self.updates - update) * self.images / rate))
            text = ", ".join(f"{key} {value}" for key, value in figures.items())
            _logger.info(f"{self.title}, update {update}/{self.updates}: {text}, {left} left of the epoch")

    def _show_what_fits(self, texts: list[str]) -> None:
        """Let the bar show those of some figures, the first ones, that leave a bar on the terminal's line."""
        width, state = self.bar.ncols, {**self.bar.format_dict, "ncols": None}  # None: a bar of ten characters
        while width and texts and len(tqdm.format_meter(**{**state, "postfix": ", ".join(texts)})) > width:
            texts = texts[:-1]
        self.bar.set_postfix_str(", ".join(texts), refresh=False)


# What a run is


def headline(settings: TrainSettings, model: nn.Module, size: tuple[int, int], images: str, work: str) -> str:
    """Return what a run is; a warm-up that the settings leave open is named where it is a short one.

    ``images`` are words for those to train and to evaluate on, ``work`` for the updates of an epoch.
    """
    parameters = sum(p.numel() for p in model.parameters())
    text = (
        f"{settings.model}, {parameters:,} parameters, {model.num_classes} classes, {size[0]}x{size[1]}: {images}\n"
        f"{settings.epochs} epochs of {work}"
    )
    if settings.warmup_epochs is None and (chosen := settings.with_schedule().warmup_epochs) < WARMUP_EPOCHS:
        text += (
            f"\nwarm-up: {chosen} of the {settings.epochs} epochs, since the recipe's or the default does not fit; "
            f"--warmup-epochs changes it"
        )
    if settings.lr_base_size:
        text += f"\nlearning rate {settings.peak_lr:.3g}: {settings.lr:.3g} at {settings.lr_base_size} images an update"
    return text


def updates_in_words(updates: Updates) -> str:
    """Return how the images of an update are shared: "256 images: 2 processes x 1 x 128 at 32x32"."""
    images = (
        f"{updates.fixed_images} images" if updates.fixed_images else f"{updates.average_images:.1f} images on average"
    )
    count = updates.shares[0].world_size
    pairs = zip(updates.shares, updates.sizes)
    batches = " or ".join(f"{share.steps} x {share.batch_size} at {size_name(size)}" for share, size in pairs)
    return f"{images}: {count} process{'es' * (count > 1)} x {batches}"


def summarize(log: list[dict], best: dict) -> dict[str, Any]:
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
    if not (root / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# Exported weights


def export_path(model: str, tag: str, overwrite: bool = False) -> Path:
    """Return the file MODEL.TAG.safetensors in the first folder of pretrained weights, which is made.

    Another tag of the model gives way to this one.

    Raises:
        UserError: If the tag has other characters than letters, digits, - and _, or the file is there already.
        OSError: If the folder cannot be written into.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", tag):
        raise UserError(f"--export {tag}: a tag is made of letters, digits, - and _")
    name, _ = split_model_name_tag(model)
    path = checkpoint_folders()[0] / f"{name}.{tag}.safetensors"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another --export, or --overwrite it")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # before the training, not after it
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

"""Training of a classifier, from a model and data sets to a folder of checkpoints, logs and a summary."""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import random_seed
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import __version__
from ..checkpoints.description import EXIF_NOTES
from ..checkpoints.weights import load_checkpoint
from ..data.augmentation import BatchAugmentation, training_transform
from ..data.datasets import class_names
from ..data.images import check_classes, data_config, evaluation_loader, image_count
from ..data.training import TrainingLoader, check_splits, seed_everything
from ..data.updates import Updates, share_batches
from ..device import Processes, StopSignals, find_device, tf32_products
from ..errors import UserError, first_words
from ..evaluate.evaluation import check_sizes, evaluate
from ..files import write_json, write_text
from ..model.create import create_recorded_model
from ..model.raftmlp import RaftMLP
from ..sizes import check_memory, parse_size
from .distillation import create_teacher, weights_sha256
from .run_folder import RunFolder
from .run_logger import Progress, RunLogger, export_path, export_pretrained, headline, summarize, updates_in_words
from .settings import MIN_LR, TrainSettings, make_recipe, without_effect
from .state import DivergedError, TrainState, changed_options, reason_not_to_resume
from .train_step import TrainStep

__all__ = ["Trainer"]

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model and evaluates it after every epoch.

    Writes into the output folder: last.pth.tar, previous.pth.tar and model_best.pth.tar (weights, averaged weights,
    optimizer), log.csv (a row an epoch), curves.png, args.yaml, and summary.json at the end.

    Args:
        settings: The settings of the run; ``from_settings`` creates the model and the data sets that they name.
        model: A classifier with timm's ``num_classes`` and ``pretrained_cfg``, which gets the data config of the run.
        train_data: Images and classes to train on.
        val_data: Images and classes to evaluate on.
        processes: This process among those that train together; None for one alone.
        command: The command that the summary names.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        train_data: Dataset,
        val_data: Dataset,
        processes: Processes | None = None,
        command: str = "",
    ):
        self.processes = processes or Processes(find_device(settings.device))
        self.device, self.command = self.processes.device, command
        settings = replace(settings, exif=settings.exif is not False)  # whatever the weights were trained with before
        settings.check_teacher()
        check_classes(train_data, model)
        config, count = data_config(settings, model, settings.size), image_count(train_data)
        self.updates = updates = plan_updates(settings, config["input_size"][-2:], count, self.processes)
        settings = replace(
            settings,
            model=settings.name(model),
            num_classes=model.num_classes,
            in_chans=config["input_size"][0],
            global_batch_size=updates.fixed_images,
        )
        self.settings = settings.with_schedule()
        cfg = training_cfg(model, config, class_names(train_data))
        model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
        self.recipe = make_recipe(self.settings)
        self.description = dict(arch=settings.model, model_kwargs=settings.model_kwargs, pretrained_cfg=cfg)
        self.folder, self.state, self.stop = RunFolder(settings.output), TrainState(), StopSignals()
        self.saved: tuple[int, int] | None = None  # the position of the last checkpoint in the folder
        shapes = [(config["input_size"][0], *size) for size in updates.sizes]
        self._create_loaders(train_data, val_data, config, shapes)
        self.updates_per_epoch = self.loader.updates_per_epoch
        largest = max(share.images for share in updates.shares)
        if not self.updates_per_epoch or largest > count:
            raise UserError(f"{count} images make no update of {largest}: choose --global-batch-size {count} or less")
        batch_sizes = [share.batch_size for share in updates.shares]
        self.augment = BatchAugmentation(settings, batch_sizes, model.num_classes, settings.smoothing, self.device)
        if settings.train_img_sizes:
            check_sizes(model, settings.model, shapes, "--train-img-sizes")
        teacher = None
        if settings.kd_model_name:
            teacher = create_teacher(settings.kd_model_name, settings.kd_checkpoint, model, shapes)
            self.recipe["kd_sha256"] = weights_sha256(teacher.state_dict())
        self.train_step = TrainStep(self.settings, model, self.updates_per_epoch, self.processes, teacher)
        images = f"{count} images to train on, {image_count(val_data)} to evaluate on"
        work = f"{self.updates_per_epoch} updates of {updates_in_words(updates)}, on {self.device}"
        self.headline = headline(settings, model, config["input_size"][-2:], images, work)

    def _create_loaders(self, train_data: Dataset, val_data: Dataset, config: dict, shapes: list[tuple]) -> None:
        """Make the loaders of images to train on, of these shapes, and of those to evaluate on."""
        settings, ranks = self.settings, dict(rank=self.processes.rank, world_size=self.processes.world_size)
        classes = check_splits(train_data, val_data, share_root=bool(settings.val_share))
        transforms = [training_transform(settings, {**config, "input_size": shape}) for shape in shapes]
        bad_images = self.folder.path / "bad_images.txt"
        self.loader = TrainingLoader(
            train_data, transforms, config, self.device, self.updates, settings, settings.seed, bad_images
        )
        self.val_loader = evaluation_loader(
            val_data, config, self.device, settings.batch_size, settings.workers, **ranks, classes=classes
        )

    @classmethod
    def from_settings(
        cls,
        settings: TrainSettings,
        processes: Processes | None = None,
        command: str = "",
        resume: str | Path | None = None,
    ) -> "Trainer":
        """Return a trainer of the model and the data sets that the settings name; random numbers are seeded.

        ``resume`` is what ``fit`` will get: a run that is resumed does not load the weights that it began with.
        """
        resumes = RunFolder(settings.output).resumes(resume)
        if resumes and settings.min_lr == MIN_LR:  # args.yaml of version 0.2 has it whatever the peak was
            settings = replace(settings, min_lr=None)
        if ignored := without_effect(settings):
            _logger.warning(f"note: without effect here: {', '.join(ignored)}")
        random_seed(settings.seed)
        settings = replace(settings, val_share=settings.choose_share())
        train_data, val_data = settings.create_splits(settings.seed)
        if settings.size:  # before the model, whose grid has that size
            batch_size = min(settings.batch_size, settings.global_batch_size or math.inf, image_count(train_data))
            check_memory((settings.in_chans or 3, *settings.size), batch_size)
        names = class_names(train_data)
        if settings.num_classes is None and names:
            settings = replace(settings, num_classes=len(names))
        rates = dict(drop_rate=settings.drop, drop_path_rate=settings.drop_path)
        model, model_kwargs = create_recorded_model(settings, to_train=True, load=not resumes, **rates)
        settings = replace(settings, model_kwargs=model_kwargs)
        return cls(settings, model, train_data, val_data, processes, command)

    # A run

    def fit(self, resume: str | Path | None = None, overwrite: bool = False) -> dict[str, Any] | None:
        """Train on to the end, and return the summary; None if SIGTERM or Ctrl-C asked to stop, after a checkpoint.

        Args:
            resume: A checkpoint file to resume from; "auto" for the last complete one in the folder, if any.
            overwrite: Whether a run that is in the folder is removed.

        Raises:
            UserError: If the run cannot be resumed so, or the loss is infinite or no number.
        """
        settings, on_first = self.settings, self.processes.on_first
        exported = export_path(settings.model, settings.export, overwrite) if settings.export else None
        try:
            checkpoint = on_first(self.folder.prepare, resume, overwrite)
            self.folder.path.mkdir(parents=True, exist_ok=True)  # on other machines, where it is no shared one
            if checkpoint:
                self.load(checkpoint)
            is_finished = on_first(self._start_folder, checkpoint, overwrite)
            trackers = settings.log_tensorboard, settings.log_wandb
            self.logger = RunLogger(self.folder.path, self.recipe, *trackers, writes=self.processes.is_first)
            _logger.info(self.headline)
            with self.stop, tf32_products(settings.tf32 and self.device.type == "cuda"):
                while self.state.epoch < settings.epochs:
                    if not self._run_epoch():
                        _logger.info(
                            f"stopped in epoch {self.state.epoch + 1} after update {self.state.update} of "
                            f"{self.updates_per_epoch}, and saved: the same command with --resume continues"
                        )
                        return None
            return on_first(self._finish, is_finished, exported)
        finally:
            self.folder.close()
            self.loader.end_workers()

    def _start_folder(self, checkpoint: Path | None, overwrite: bool) -> bool:
        """Make the folder this run's; return whether the run was finished before, whose records stay as they are."""
        if self.state.epoch >= self.settings.epochs and self.folder.summary.exists():
            return True
        if not checkpoint:
            self.loader.bad_images.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if not checkpoint or not self.folder.contains(checkpoint):
            if overwrite:
                self.folder.clear()
            if checkpoint:
                self.folder.take_best_of(checkpoint)
        write_text(self.folder.path / "args.yaml", yaml.safe_dump(asdict(self.settings), sort_keys=False))
        return False

    def _finish(self, was_finished: bool, exported: Path | None) -> dict[str, Any]:
        """Write what a finished run has; return the summary."""
        if not was_finished:
            self.logger.write(self.state.log)  # again: a kill may have come between the last checkpoint and the log
            summary = dict(
                model=self.settings.model,
                parameters=sum(p.numel() for p in self.train_step.model.parameters()),
                epochs=self.settings.epochs,
                **summarize(self.state.log, self.state.best),
                command=self.command,
                best_checkpoint=str(self.folder.best),
            )
            write_json(self.folder.summary, summary)
        summary = json.loads(self.folder.summary.read_text())
        _logger.info(
            f"best top-1 {summary['best_top1']:.2f} % in epoch {summary['best_epoch']}, {summary['seconds']} s"
        )
        _logger.info(f"in {self.folder.path}: model_best.pth.tar, last.pth.tar, log.csv, curves.png, summary.json")
        if exported:
            card = export_pretrained(exported, summary)
            _logger.info(f"exported {exported} and its card {card.name}")
        return summary

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint of this moment; random states follow from the seed and the position in the run."""
        run = dict(version=__version__, options=self.recipe, updates_per_epoch=self.updates_per_epoch)
        return {**self.description, **run, **self.state.state_dict(), **self.train_step.state_dict()}

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.train_step.load_state_dict(checkpoint)
        self.state.load_state_dict(checkpoint)
        self.train_step.start_at(self._updates_done)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint into the folder, as the last one, and as the best one too."""
        self.saved = self.state.position
        self.processes.on_first(lambda: self.folder.save(self.state_dict(), best))

    def load(self, path: Path) -> None:
        """Load a checkpoint to resume from; one that is damaged or of another run raises a UserError."""
        checkpoint = load_checkpoint(path)
        try:
            names = self.description["pretrained_cfg"].get("label_names")
            reason = reason_not_to_resume(checkpoint, self.recipe, self.updates_per_epoch, names)
            if not reason:
                self.load_state_dict(checkpoint)
        except Exception as error:  # whatever a foreign file brings about
            reason = f"is no checkpoint of such a run: {first_words(error)}"
        if reason:
            raise UserError(f"{path} {reason}")
        self.saved = self.state.position if self.folder.contains(path) else None
        if "exif" not in checkpoint.get("options", {}):  # of version 0.2, which applied no orientation: so it goes on
            self.settings = replace(self.settings, exif=False)
            self.recipe["exif"] = self.loader.pixels.exif = self.val_loader.pixels.exif = False
            self.description["pretrained_cfg"]["notes"] = (EXIF_NOTES[False],)
        if changed := changed_options(checkpoint.get("options", {}), self.recipe):
            _logger.info(f"note: not the options of before: {', '.join(changed)}")
        update = f"update {self.state.update + 1}"
        if self.state.update == self.updates_per_epoch:
            update = "which is to be evaluated"
        is_finished = self.state.epoch >= self.settings.epochs
        where = "which is finished" if is_finished else f"epoch {self.state.epoch + 1}, {update}"
        _logger.info(f"resuming from {path}, {where}")

    # An epoch

    def _run_epoch(self) -> bool:
        """Train what is left of the epoch and evaluate; return False if asked to stop, which is saved too."""
        asked = torch.tensor(float(self.stop.number is not None), device=self.device)
        if self.processes.sum(asked).item():  # one of the processes
            self.save()
            return False
        settings, state, title = self.settings, self.state, f"epoch {self.state.epoch + 1}/{self.settings.epochs}"
        images = self.updates.mean_images(state.epoch)
        progress = Progress(title, state, self.updates_per_epoch, images, settings.log_interval, self.processes)
        try:
            with progress:
                if not self._train(progress):
                    return False
            row = dict(epoch=state.epoch + 1, train_loss=state.loss_sum / self.updates_per_epoch)
            if len(self.updates.sizes) > 1:
                row |= {f"updates_{size}": count for size, count in self.updates.counts(state.epoch).items()}
            row["train_images_per_second"] = progress.rate
            row |= {f"eval_{key}": value for key, value in self.evaluate().items()}
        except DivergedError as error:
            raise UserError(self._diverged(error), shared=True) from error
        if not math.isfinite(row["eval_loss"]):
            raise UserError(
                f"the validation loss became {row['eval_loss']} in epoch {state.epoch + 1}; "
                f"{self._roll_back(state.update)}",
                shared=True,
            )
        row |= dict(lr=self.train_step.lr, bad_images=self.loader.bad_image_count, seconds=progress.seconds)
        state.end_epoch(row)
        self.save(best=state.best is row)
        self.logger.write(state.log)
        self.logger.report(row, state.best, settings.epochs)
        return True

    def _train(self, progress: Progress) -> bool:
        """Train what is left of the epoch; return False if asked to stop, which is saved too."""
        state, every, total = self.state, self.settings.save_every, self.updates_per_epoch
        self.train_step.start_at(self._updates_done)
        batches = self.loader.epoch(state.epoch, state.update)
        while state.update < total:
            self._update(batches, progress)
            stop = state.read_losses(keep=1)
            if state.update == total:
                self.train_step.distribute_statistics()
            # also before the evaluation, which may take long
            save = state.update == total or (every and state.update % every == 0)
            if save or stop:
                stop = state.read_losses() or stop
                state.seconds = progress.seconds
                self.save()
            if stop:
                return False
            progress.advance(self.train_step.lr)
        return True

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]], progress: Progress) -> None:
        """Take one step of the optimizer, on the gradient of an update's images."""
        share, scale = self.updates.share(self.state.epoch, self.state.update), 1.0
        if self.settings.variable_batch_loss_scale:
            scale = share.images / self.updates.average_images
        images = self._augmented(batches, share.steps, progress)
        loss = self.train_step.update(images, share.steps, self._updates_done + 1, scale)
        result = torch.stack([loss, torch.full_like(loss, self.stop.number is not None)])
        self.state.end_update(self.processes.sum(result), self.train_step.lr)

    @property
    def _updates_done(self) -> int:
        return self.state.epoch * self.updates_per_epoch + self.state.update

    def _augmented(
        self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, progress: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an update; what is random about each, in the model too, is seeded by its position."""
        for step in range(steps):
            start = time.perf_counter()
            images, target = next(batches)
            progress.waited += time.perf_counter() - start
            batch = step * self.processes.world_size + self.processes.rank
            seed_everything(self.settings.seed, 2, self.state.epoch, self.state.update, batch)
            yield self.augment(images, target)

    def evaluate(self) -> dict[str, float]:
        """Return the figures of the model on the validation images; of the averaged weights, if there are such."""
        model, autocast = self.train_step.eval_model, self.settings.autocast(self.device)
        together = dict(distributed=self.processes.world_size > 1, progress=self.processes.is_first)
        figures = evaluate(model, self.val_loader, self.device, autocast, **together)
        if not figures["images"]:
            raise UserError(f"none of the {figures['unread']} images to evaluate on can be read", shared=True)
        return figures

    # Rollback

    def _diverged(self, error: DivergedError) -> str:
        """Write the files of a diverged update's images; return the words for the user."""
        names = self.loader.names(self.state.epoch, error.update)
        listed = ""
        if names and self.processes.is_first:
            path = self.folder.path / "bad_batch.txt"
            write_text(path, "\n".join(names) + "\n")
            listed = f"; {path} lists its images: {names[0]} and {len(names) - 1} more"
        return (
            f"the loss became {error.loss} in epoch {self.state.epoch + 1}, update {error.update + 1} of "
            f"{self.updates_per_epoch}, at learning rate {error.lr:.3g}{listed}; {self._roll_back(error.update)}"
        )

    def _roll_back(self, update: int) -> str:
        """Let the last checkpoint be one from before the weights that this update began with; return what to do."""
        hint = "a smaller --lr or --clip-grad 1 may help"
        is_past = self.saved == (self.state.epoch, update)
        checkpoint = self.folder.roll_back(is_past) if self.processes.is_first else None
        if not checkpoint:
            return f"there is no checkpoint from before; {hint}"
        return f"--resume continues from {checkpoint}, which is from before; {hint}"


def plan_updates(settings: TrainSettings, size: tuple[int, int], images: int, processes: Processes) -> Updates:
    """Return the updates of a run on so many images, at ``size`` where the settings do not name others."""
    sizes = [parse_size(text) for text in settings.train_img_sizes or ()] or [size]
    batch_sizes = (settings.train_img_sizes and settings.train_batch_sizes) or [settings.batch_size] * len(sizes)
    ranks = processes.rank, processes.world_size
    shares = {n: share_batches(n, settings.global_batch_size, *ranks) for n in batch_sizes}
    schedule = dict(probs=settings.train_size_probs, schedule=settings.train_size_schedule, epochs=settings.epochs)
    updates = Updates(images, sizes, [shares[n] for n in batch_sizes], **schedule, seed=settings.seed)
    if settings.lr_base_size and not updates.fixed_images:
        raise UserError("--lr-base-size is for updates of one number of images: give --global-batch-size")
    return updates


def training_cfg(model: nn.Module, config: dict, names: list[str] | None) -> dict[str, Any]:
    """Return what a checkpoint says of classes and images: the part of timm's pretrained_cfg that is the run's own."""
    cfg = {key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    size = model.img_size if isinstance(model, RaftMLP) else config["input_size"][-2:]
    cfg |= dict(num_classes=model.num_classes, input_size=(config["input_size"][0], *size))
    cfg["notes"] = (EXIF_NOTES[config["exif"]],)
    return cfg | dict(label_names=names) if names and len(names) == model.num_classes else cfg

#!/usr/bin/env python
"""Train a model on a data set of images, on one device or many.

    python tools/train.py -c configs/digits/raftmlp_digits.yaml
    python tools/train.py -c configs/imagenet/raftmlp_s.yaml --data-dir imagenet
    torchrun --nproc-per-node 8 tools/train.py -c configs/imagenet/raftmlp_s.yaml --data-dir imagenet
    python tools/train.py -c configs/finetune/cifar10.yaml --checkpoint raftmlp_s.safetensors --data-dir cifar10

Writes into the output folder: last.pth.tar, previous.pth.tar and model_best.pth.tar (weights, averaged weights,
optimiser), log.csv (a line an epoch), curves.png, args.yaml, and summary.json at the end. An interrupted run goes on
with --resume, to the same numbers.
"""

import argparse
import csv
import difflib
import hashlib
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import timm
import torch
import yaml
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad, random_seed, unwrap_model
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cli
import loaders
import raftmlp
from checkpoints import RunFolder
from raftmlp.checkpoint import checkpoint_folders, load_checkpoint, save_state_dict, unwrap
from raftmlp.data import class_names
from validate import evaluate

# options that say how and where a run goes, not what comes out of it
INCIDENTAL = (
    "channels_last", "checkpoint", "compile", "config", "data_dir", "dataset_download", "device", "export",
    "log_interval", "log_tensorboard", "log_wandb", "max_bad_images", "output", "overwrite", "resume", "save_every",
    "workers",
)  # fmt: skip
# options without which a checkpoint's state does not fit
STRUCTURAL = (
    "model",
    "model_kwargs",
    "num_classes",
    "in_chans",
    "opt",
    "layer_decay",
    "filter_bias_and_bn",
    "model_ema",
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__)
    group = cli.add_model_arguments(parser)
    group.add_argument(
        "--drop", type=cli.number(float, 0, 1), default=0.0, metavar="X", help="dropout before the classifier"
    )
    group.add_argument("--drop-path", type=cli.number(float, 0, 1), default=0.0, metavar="X", help="stochastic depth")

    group = loaders.add_arguments(parser)
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to train on")
    group.add_argument(
        "--max-bad-images",
        type=cli.number(int, 0),
        default=100,
        metavar="N",
        help="end the run when more images than these cannot be read (a stream's are left out without a count)",
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--global-batch-size",
        type=cli.number(int, 1),
        metavar="N",
        help="images an update, of all processes; a process accumulates as many batches of --batch-size or less as it "
        "takes (default: one batch of --batch-size a process)",
    )
    group.add_argument(
        "--epochs", type=cli.number(int, 1), default=300, metavar="N", help="epochs to train, warm-up included"
    )
    group.add_argument("--opt", type=known_optimizer, default="adamw", metavar="NAME", help="any optimiser of timm")
    group.add_argument("--lr", type=cli.number(float, 0), default=1e-3, metavar="X", help="peak learning rate")
    group.add_argument("--weight-decay", type=cli.number(float, 0), default=0.05, metavar="X", help="weight decay")
    group.add_argument(
        "--filter-bias-and-bn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no weight decay for biases and norms",
    )
    group.add_argument(
        "--momentum", type=cli.number(float, 0), default=0.9, metavar="X", help="momentum, where the optimiser has it"
    )
    group.add_argument(
        "--layer-decay", type=cli.number(float, 0.01, 1), metavar="X", help="layer-wise decay of the learning rate"
    )
    group.add_argument("--clip-grad", type=cli.number(float, 1e-9), metavar="X", help="clip gradients, off without")
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="what --clip-grad bounds")
    group.add_argument(
        "--sched",
        choices=("cosine", "tanh", "wsd", "constant"),
        default="cosine",
        help="schedule after the warm-up, stepped every update",
    )
    group.add_argument("--warmup-epochs", type=cli.number(int, 0), default=5, metavar="N", help="epochs of warm-up")
    group.add_argument(
        "--warmup-lr", type=cli.number(float, 0), default=0.0, metavar="X", help="learning rate the warm-up starts from"
    )
    group.add_argument(
        "--min-lr", type=cli.number(float, 0), default=1e-5, metavar="X", help="learning rate at the end"
    )
    group.add_argument("--smoothing", type=cli.number(float, 0, 0.99), default=0.1, metavar="X", help="label smoothing")
    group.add_argument(
        "--model-ema",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="average the weights, and evaluate the average",
    )
    group.add_argument(
        "--model-ema-decay", type=cli.number(float, 0, 1), default=0.9998, metavar="X", help="decay of the average"
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--train-crop-mode",
        choices=("rrc", "rkrc", "rkrr", "random"),
        default="rrc",
        help="rrc: crops of random size; rkrc, rkrr: timm's; random: resized as for evaluation, then a random crop",
    )
    group.add_argument(
        "--scale", type=cli.number(float, 1e-6), nargs=2, default=[0.08, 1.0], metavar="X", help="area of random crops"
    )
    group.add_argument(
        "--ratio", type=cli.number(float, 1e-6), nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="their aspect ratio"
    )
    group.add_argument(
        "--hflip", type=cli.number(float, 0, 1), default=0.5, metavar="P", help="probability of a horizontal flip"
    )
    group.add_argument(
        "--color-jitter", type=cli.number(float, 0), default=0.4, metavar="X", help="colour jitter, off beside --aa"
    )
    group.add_argument(
        "--force-color-jitter",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="colour jitter before --aa too",
    )
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment or RandAugment, as 'rand-m9-mstd0.5'")
    group.add_argument(
        "--affine",
        type=cli.number(float, 0),
        nargs=3,
        metavar=("DEGREES", "SHIFT", "SCALE"),
        help="random rotation, shift (share of the size) and scaling (1 +- SCALE)",
    )
    group.add_argument(
        "--cutout", type=cli.number(float, 0, 1), default=0.0, metavar="P", help="probability of a black rectangle"
    )
    group.add_argument(
        "--reprob", type=cli.number(float, 0, 1), default=0.0, metavar="P", help="probability of random erasing"
    )
    group.add_argument(
        "--remode", choices=("const", "rand", "pixel"), default="const", help="what random erasing puts in"
    )
    group.add_argument("--mixup", type=cli.number(float, 0), default=0.0, metavar="ALPHA", help="mixup, off at 0")
    group.add_argument("--cutmix", type=cli.number(float, 0), default=0.0, metavar="ALPHA", help="cutmix, off at 0")
    group.add_argument(
        "--mixup-prob", type=cli.number(float, 0, 1), default=1.0, metavar="P", help="probability of mixup or cutmix"
    )
    group.add_argument(
        "--mixup-switch-prob",
        type=cli.number(float, 0, 1),
        default=0.5,
        metavar="P",
        help="probability of cutmix where both are on",
    )
    group.add_argument(
        "--mixup-then-cutmix",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="both, one after the other, on every batch",
    )

    group = parser.add_argument_group("distillation")
    group.add_argument("--kd-model-name", type=cli.known_model, metavar="NAME", help="teacher, with pretrained weights")
    group.add_argument(
        "--kd-temperature", type=cli.number(float, 1e-3), default=1.0, metavar="X", help="temperature of both softmaxes"
    )
    group.add_argument(
        "--distill-loss-weight", type=cli.number(float, 0), default=1.0, metavar="X", help="weight of the teacher"
    )
    group.add_argument(
        "--task-loss-weight", type=cli.number(float, 0), default=1.0, metavar="X", help="weight of the labels"
    )

    group = parser.add_argument_group("run")
    cli.add_device_arguments(group)
    group.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="TensorFloat-32 in float32 products, on GPUs that have it",
    )
    group.add_argument(
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass, to save memory",
    )
    group.add_argument("--seed", type=cli.number(int, 0, 2**32 - 1), default=42, metavar="N", help="random seed")
    group.add_argument("--output", default="runs/train", metavar="DIR", help="folder of this run")
    group.add_argument("--overwrite", action="store_true", help="remove a run that is in the folder already")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from this checkpoint; without FILE, or with 'auto', from the last whole one in the folder, if any",
    )
    group.add_argument(
        "--save-every",
        type=cli.number(int, 1),
        metavar="N",
        help="save after so many updates too, not only after epochs",
    )
    group.add_argument(
        "--log-interval",
        type=cli.number(int, 1),
        default=50,
        metavar="N",
        help="updates between lines of progress, where there is no terminal for a bar",
    )
    group.add_argument("--log-tensorboard", action="store_true", help="write TensorBoard's events into the folder")
    group.add_argument("--log-wandb", action="store_true", help="log to Weights & Biases")
    group.add_argument(
        "--export",
        metavar="TAG",
        help="at the end write MODEL.TAG.safetensors, the best weights, and a JSON card, where --pretrained finds them",
    )
    return parser


def known_optimizer(name: str) -> str:
    """Return the name if timm knows such an optimiser; else say which are near."""
    known = list_optimizers()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3) or ["adamw", "sgd", "lamb"]
        raise argparse.ArgumentTypeError(f"unknown optimiser {name!r}; did you mean {' or '.join(near)}?")
    return name


# What is made of the options


def share_batches(args, world_size: int) -> tuple[int, int]:
    """Return the images a batch, and the batches that a process accumulates for --global-batch-size, which is set."""
    total = args.global_batch_size or args.batch_size * world_size
    share, rest = divmod(total, world_size)
    if rest or not share:
        raise cli.UserError(f"--global-batch-size {total} cannot be shared among {world_size} processes")
    args.global_batch_size = total
    batch_size = min(share, args.batch_size)
    while share % batch_size:
        batch_size -= 1
    if batch_size < min(share, args.batch_size) / 2:
        cli.say(
            f"note: batches of {batch_size} images, not of {args.batch_size}: a process's share of an update, {share} "
            f"images, divides into no others"
        )
    return batch_size, share // batch_size


def check_split(args, train_set, val_set) -> None:
    """Refuse images that are the same for training and evaluation, or that have other classes."""
    train_names, val_names = class_names(train_set), class_names(val_set)
    if train_names and val_names and train_names != val_names:
        odd = sorted(set(train_names) ^ set(val_names))
        raise cli.UserError(
            f"the {len(train_names)} classes to train on are not the {len(val_names)} to evaluate on: {odd[:5]} "
            f"{'and others ' if len(odd) > 5 else ''}belong to one of them only"
        )
    if args.dataset in ("", "folder", "tar"):
        train_root, val_root = (Path(part.reader.root).resolve() for part in (train_set, val_set))
        if train_root == val_root or train_root in val_root.parents or val_root in train_root.parents:
            raise cli.UserError(
                f"images to train on in {train_root} and to evaluate on in {val_root} overlap: put them into "
                f"train/ and val/ of the data folder, or name the sub-folders with --train-split and --val-split"
            )


def image_facts(model, settings: dict, names: list[str] | None) -> dict:
    """Return what a checkpoint tells of classes and images: timm's pretrained_cfg, the part that is the run's own."""
    facts = {key: settings[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    size = model.img_size if isinstance(model, raftmlp.RaftMLP) else settings["input_size"][-2:]
    facts |= dict(num_classes=model.num_classes, input_size=(model.in_chans, *size))
    return facts | dict(label_names=names) if names and len(names) == model.num_classes else facts


def create_task(args, model, soft_targets: bool, device: torch.device):
    """Return timm's training task: classification, with a teacher if there is one."""
    loss = SoftTargetCrossEntropy() if soft_targets else LabelSmoothingCrossEntropy(args.smoothing)
    if not args.kd_model_name:
        return ClassificationTask(model, loss, device=device, verbose=False)
    try:
        teacher = timm.create_model(args.kd_model_name, pretrained=True, in_chans=model.in_chans)
    except (ValueError, FileNotFoundError, RuntimeError, OSError) as error:
        raise cli.UserError(f"cannot make the teacher {args.kd_model_name}: {cli.first_words(error)}") from error
    if teacher.num_classes != model.num_classes:
        raise cli.UserError(
            f"the teacher {args.kd_model_name} tells {teacher.num_classes} classes apart, the model {model.num_classes}"
        )
    return LogitDistillationTask(
        model,
        teacher.to(device).requires_grad_(False),
        loss,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
        temperature=args.kd_temperature,
        device=device,
        verbose=False,
    )


def create_optimisation(args, model, updates_per_epoch: int):
    """Return the optimiser and the schedule of the options: a warm-up, then --sched over the other epochs."""
    if args.warmup_epochs >= args.epochs:
        raise cli.UserError(f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    with cli.user_errors(ValueError, AssertionError, RuntimeError, TypeError):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), filter_bias_and_bn=args.filter_bias_and_bn)
        schedule = scheduler_kwargs(args) | dict(
            num_epochs=args.epochs - args.warmup_epochs, warmup_prefix=True, step_on_epochs=False, decay_epochs=None
        )
        scheduler, _ = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates_per_epoch)
    return optimizer, scheduler


def prepare_folder(args, folder: RunFolder) -> Path | None:
    """Keep other runs out of the folder; return the checkpoint to go on from, if any."""
    goes_on = args.resume == "auto" or (args.resume and folder.has(Path(args.resume)))
    if folder.holds_run() and not goes_on and not args.overwrite:
        raise cli.UserError(
            f"{folder.path} holds a run: go on with --resume, name another folder with --output, or --overwrite it"
        )
    if args.resume and args.resume != "auto" and not Path(args.resume).is_file():
        hint = f"; to go on in that folder: --output {args.resume} --resume" if Path(args.resume).is_dir() else ""
        raise cli.UserError(f"no checkpoint to resume from at {args.resume}{hint}")
    folder.open()
    if args.resume == "auto":
        path = folder.find()
        if not path:
            cli.say(f"no checkpoint in {folder.path} yet: starting at the beginning")
        return path
    return Path(args.resume) if args.resume else None


def start_folder(args, folder: RunFolder, path: Path | None) -> None:
    """Make the folder this run's, which goes on from a checkpoint of its own, from another folder's, or from none."""
    if not path or not folder.has(path):
        if args.overwrite:
            folder.clear()
        if path:
            folder.adopt(path)
    options = {key: value for key, value in vars(args).items() if key not in ("config", "overwrite", "resume")}
    cli.write_whole(folder.path / "args.yaml", yaml.safe_dump(options, sort_keys=False))


# The run


class Training:
    """A run: how an update and an epoch go, how it is saved and put back.

    Args:
        args: The options.
        processes: This process among the others.
        task: timm's task around the model.
        optimizer, scheduler: timm's.
        loader, augment: What makes batches to train on.
        val_loader: Batches to evaluate on.
        folder: Where it is saved.
        description: What a checkpoint tells of its model: arch, model_kwargs, pretrained_cfg.
    """

    def __init__(self, args, processes, task, optimizer, scheduler, loader, augment, val_loader, folder, description):
        self.args, self.processes, self.task, self.folder, self.description = args, processes, task, folder, description
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loader, self.augment, self.val_loader = loader, augment, val_loader
        self.device, self.world_size = processes.device, processes.world_size
        self.model = unwrap_model(task.get_trainable_module())
        self.scaler = NativeScaler(self.device.type) if args.amp and args.amp_dtype == "float16" else None
        self.updates_per_epoch = loader.updates_per_epoch
        self.epoch = self.update = 0  # where the run is: epochs done, updates done in the running one
        self.loss_sum = 0.0  # of the running epoch's updates
        self.log: list[dict] = []  # a row an epoch
        self.fresh: list[tuple] = []  # updates whose loss was not looked at: (loss and stop wish, update, lr)
        self.saved: tuple[int, int] | None = None  # the place of the last checkpoint
        self.signal: int | None = None  # that asked to stop

    @property
    def best(self) -> dict:
        """The log's row of the best top-1; of equals, the one of the lowest loss."""
        return max(self.log, key=lambda row: (row["eval_top1"], -row["eval_loss"]))

    def stop_on_signals(self) -> None:
        """From now on SIGTERM and the first Ctrl-C let the running update end, and save."""

        asked = time.monotonic()

        def ask(number, _frame):
            nonlocal asked
            # torchrun passes a Ctrl-C on that the terminal has sent already: two at once are one
            if self.signal == signal.SIGINT == number and time.monotonic() > asked + 2:
                raise KeyboardInterrupt
            self.signal, asked = number, time.monotonic()

        signal.signal(signal.SIGTERM, ask)
        signal.signal(signal.SIGINT, ask)

    def asked_to_stop(self) -> bool:
        """Return whether one of the processes was asked to stop."""
        wish = torch.tensor(float(self.signal is not None), device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(wish)
        return wish.item() > 0

    # Saving

    def save(self, best: bool = False) -> None:
        """Write a checkpoint of this moment.

        Random states are not in it: they are functions of the seed and of the place in the run.
        """
        self.saved = (self.epoch, self.update)
        self.processes.on_first(self._save, best)

    def _save(self, best: bool) -> None:
        state = dict(
            **self.description,
            version=raftmlp.__version__,
            options=recipe(self.args),
            epoch=self.epoch,
            update=self.update,
            updates_per_epoch=self.updates_per_epoch,
            loss_sum=self.loss_sum,
            log=self.log,
            state_dict=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )
        if self.args.model_ema:
            state["state_dict_ema"] = self.task.get_trainable_module(ema=True).module.state_dict()
        if self.scaler:
            state["amp_scaler"] = self.scaler.state_dict()
        self.folder.save(state, best)

    def load(self, path: Path) -> None:
        """Put a checkpoint's state back.

        Raises:
            UserError: If it is damaged, or of a run that this one cannot go on.
        """
        with cli.user_errors(ValueError, FileNotFoundError):
            state = load_checkpoint(path)
        if "optimizer" not in state:
            raise cli.UserError(f"{path} holds weights only: --checkpoint starts a new run from them")
        before, now = state.get("options", {}), recipe(self.args)
        for key in STRUCTURAL:
            if key in before and before[key] != now[key]:
                raise cli.UserError(
                    f"{path} is of a run with --{key.replace('_', '-')} {before[key]}, not {now[key]}: it cannot go on "
                    f"so (--checkpoint starts a new run from its weights)"
                )
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["state_dict"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.args.model_ema:
                self.task.get_trainable_module(ema=True).module.load_state_dict(state["state_dict_ema"])
            if self.scaler and "amp_scaler" in state:
                self.scaler.load_state_dict(state["amp_scaler"])
            self.epoch, self.update, self.loss_sum = state["epoch"], state["update"], state["loss_sum"]
            self.log = list(state["log"])
            self.saved = (self.epoch, self.update) if self.folder.has(path) else None
        except Exception as error:  # whatever a foreign file brings about
            raise cli.UserError(f"cannot resume from {path}: {cli.first_words(error)}") from error
        for key in ("global_batch_size", "seed"):
            if self.update and before.get(key) != now[key]:
                raise cli.UserError(
                    f"{path} is of the middle of an epoch with --{key.replace('_', '-')} {before.get(key)}: "
                    f"{now[key]} cannot go on from there"
                )
        if self.update and state.get("updates_per_epoch") != self.updates_per_epoch:
            raise cli.UserError(
                f"{path} is of the middle of an epoch of {state.get('updates_per_epoch')} updates, of which this data "
                f"makes {self.updates_per_epoch}"
            )
        if self.epoch + (self.update > 0) > self.args.epochs:
            raise cli.UserError(
                f"{path} is of epoch {self.epoch + (self.update > 0)}, --epochs says {self.args.epochs}"
            )
        for group, options in zip(self.optimizer.param_groups, hyperparameters):
            group.update(options)
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
        if changed:
            cli.say(f"note: not the options of before: {', '.join(changed)}")

    # Training

    def run_epoch(self) -> dict | None:
        """Train what is left of the epoch and evaluate; return the log's new row, None if asked to stop and saved."""
        if self.asked_to_stop():
            self.save()
            return None
        args, first, start = self.args, self.update, time.perf_counter()
        self.waited = 0.0
        self.task.train()
        done = self.epoch * self.updates_per_epoch + first
        for updates in (done - 1, done):  # the rate of the last update, for the log, and that of the next
            self.lr = self.optimizer.param_groups[0]["lr"]
            self.scheduler.step_update(max(0, updates))
        batches = self.loader.epoch(self.epoch, first)
        with tqdm(
            total=self.updates_per_epoch,
            initial=first,
            desc=f"epoch {self.epoch + 1}/{args.epochs}",
            unit="update",
            leave=False,
            disable=None if self.processes.is_first else True,
        ) as bar:
            while self.update < self.updates_per_epoch:
                self.train_update(batches)
                self.update += 1
                bar.update()
                stop = self.look_at_losses(keep=1)
                save = args.save_every and self.update % args.save_every == 0
                save = save or self.update == self.updates_per_epoch  # the evaluation may take long
                if save or stop:
                    stop = self.look_at_losses() or stop
                if save or stop:
                    self.save()
                if stop:
                    return None
                seconds = time.perf_counter() - start
                rate = (self.update - first) * args.global_batch_size / seconds
                facts = self.progress(rate, seconds)
                bar.set_postfix(facts, refresh=False)
                if bar.disable and self.update % args.log_interval == 0:
                    left = (self.updates_per_epoch - self.update) * args.global_batch_size / rate
                    facts = ", ".join(f"{key} {value}" for key, value in facts.items())
                    cli.say(
                        f"epoch {self.epoch + 1}/{args.epochs}, update {self.update}/{self.updates_per_epoch}: "
                        f"{facts}, {timedelta(seconds=round(left))} left of the epoch"
                    )
        row = dict(epoch=self.epoch + 1, train_loss=self.loss_sum / self.updates_per_epoch)
        row["train_images_per_second"] = (self.update - first) * args.global_batch_size / (time.perf_counter() - start)
        row |= {f"eval_{key}": value for key, value in self.evaluate().items()}
        if not math.isfinite(row["eval_loss"]):
            raise cli.UserError(
                f"the validation loss became {row['eval_loss']} in epoch {self.epoch + 1}; {self.go_back(self.update)}",
                shared=True,
            )
        row |= dict(lr=self.lr, bad_images=self.loader.bad_image_count)
        row["seconds"] = time.perf_counter() - start
        self.log.append(row)
        self.epoch, self.update, self.loss_sum = self.epoch + 1, 0, 0.0
        return row

    def train_update(self, batches: Iterator) -> None:
        """Take one step of the optimiser, on the gradient of --global-batch-size images."""
        args, steps = self.args, self.loader.steps
        found = torch.zeros(2, device=self.device)  # the mean loss; whether a process was asked to stop
        for step in range(steps):
            start = time.perf_counter()
            images, target = next(batches)
            self.waited += time.perf_counter() - start
            batch = step * self.world_size + self.processes.rank
            loaders.seed_everything(args.seed, 2, self.epoch, self.update, batch)
            images, target = self.augment(images, target)
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            is_last = step == steps - 1
            with nullcontext() if is_last else self.task.no_sync():
                with cli.autocast(args, self.device):
                    loss = self.task(images, target)["loss"] / steps
                self.step_back(loss, is_last)
            found[0] += loss.detach() / self.world_size
        updates = self.epoch * self.updates_per_epoch + self.update + 1
        if args.model_ema:
            self.task.update_ema(step=updates)
        found[1] = float(self.signal is not None)
        if self.world_size > 1:
            torch.distributed.all_reduce(found)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.fresh.append((found, self.update, self.lr))
        self.scheduler.step_update(updates)

    def step_back(self, loss: torch.Tensor, is_last: bool) -> None:
        """Add a batch's gradient; after an update's last batch let the optimiser step."""
        args, parameters = self.args, self.model.parameters()
        if self.scaler:
            clip = dict(clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters)
            self.scaler(loss, self.optimizer, **clip, need_update=is_last)
        else:
            loss.backward()
            if is_last:
                if args.clip_grad is not None:
                    dispatch_clip_grad(parameters, args.clip_grad, mode=args.clip_mode)
                self.optimizer.step()
        if is_last:
            self.optimizer.zero_grad()

    def look_at_losses(self, keep: int = 0) -> bool:
        """Add up the losses of updates, but for the latest ``keep``; return whether a process was asked to stop.

        To look one update late lets a GPU work on meanwhile.

        Raises:
            UserError: If a loss is infinite or no number.
        """
        stop = False
        while len(self.fresh) > keep:
            found, update, lr = self.fresh.pop(0)
            loss, wish = found.tolist()
            if not math.isfinite(loss):
                raise cli.UserError(self.tell_bad_loss(loss, update, lr), shared=True)
            self.loss_sum += loss
            stop = stop or wish > 0
        return stop

    def tell_bad_loss(self, loss: float, update: int, lr: float) -> str:
        """Write the files of an update's images; return what to say."""
        names = self.loader.names(self.epoch, update)
        listed = ""
        if names and self.processes.is_first:
            path = self.folder.path / "bad_batch.txt"
            cli.write_whole(path, "\n".join(names) + "\n")
            listed = f"; {path} lists its images: {names[0]} and {len(names) - 1} more"
        return (
            f"the loss became {loss} in epoch {self.epoch + 1}, update {update + 1} of {self.updates_per_epoch}, at "
            f"learning rate {lr:.3g}{listed}; {self.go_back(update)}"
        )

    def go_back(self, update: int) -> str:
        """Let the last checkpoint be one of before the weights that this update began with; return what to say."""
        hint = "a smaller --lr or --clip-grad 1 may help"
        kept = self.folder.go_back(self.saved == (self.epoch, update)) if self.processes.is_first else None
        if not kept:
            return f"there is no checkpoint of before; {hint}"
        return f"--resume goes on from {kept}, which is of before; {hint}"

    def progress(self, rate: float, seconds: float) -> dict[str, str]:
        """Return what the bar shows: loss, images/s, share of the time that waits for data, memory."""
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        seen = max(1, self.update - len(self.fresh))
        return {
            "loss": f"{self.loss_sum / seen:.3f}",
            "images/s": f"{rate:.0f}",
            "waiting for data": f"{self.waited / seconds:.0%}",
            "memory": f"{memory / 2**30:.1f} GiB",
        }

    def evaluate(self) -> dict:
        """Return the figures of the model on the validation images; of the average, if there is one."""
        model = self.task.get_eval_model(ema=self.args.model_ema)
        model = model.module if isinstance(model, DistributedDataParallel) else model
        context = cli.autocast(self.args, self.device)
        figures = evaluate(model, self.val_loader, self.device, context, distributed=self.world_size > 1)
        if not figures["images"]:
            raise cli.UserError(f"none of the {figures['unread']} images to evaluate on can be read", shared=True)
        return figures


def recipe(args) -> dict:
    """Return the options that decide what comes out of a run."""
    options = {key: value for key, value in vars(args).items() if key not in INCIDENTAL}
    return json.loads(json.dumps(options, default=str))  # plain data, which compares


# What is written beside the checkpoints


class Journal:
    """Writes the log where the options say: log.csv and curves.png, TensorBoard, Weights & Biases.

    Args:
        args: The options.
        folder: The run's folder.
        writes: Whether this process does it.
    """

    def __init__(self, args, folder: Path, writes: bool):
        self.folder, self.writes, self.tensorboard, self.wandb = folder, writes, None, None
        if args.log_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise cli.UserError("--log-tensorboard needs TensorBoard: pip install tensorboard") from error
            self.tensorboard = SummaryWriter(folder / "tensorboard") if writes else None
        if args.log_wandb:
            try:
                import wandb
            except ImportError as error:
                raise cli.UserError("--log-wandb needs Weights & Biases: pip install wandb") from error
            if writes:
                name = re.sub(r"\W+", "-", str(folder.resolve())).strip("-")
                self.wandb = wandb.init(
                    project="raftmlp", id=name, resume="allow", dir=str(folder), config=recipe(args)
                )

    def write(self, log: list[dict]) -> None:
        """Write the log into the folder."""
        if not self.writes:
            return
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=log[-1], lineterminator="\n")
        table.writeheader()
        table.writerows(log)
        cli.write_whole(self.folder / "log.csv", text.getvalue())
        plot_curves(log, self.folder / "curves.png")

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


def plot_curves(log: list[dict], picture: Path) -> None:
    """Draw loss and accuracy over the epochs of a log."""
    from matplotlib.figure import Figure  # draws into files, no screen needed

    epochs = [row["epoch"] for row in log]
    figure = Figure(figsize=(9, 3.4), layout="tight")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in log], label="training")
    left.plot(epochs, [row["eval_loss"] for row in log], label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [row["eval_top1"] for row in log], color="tab:green")
    right.set(xlabel="epoch", ylabel="validation top-1 in %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    cli.save_figure(figure, picture)


def summarise(args, training: Training) -> dict:
    """Return the facts about a finished run."""
    best, last = training.best, training.log[-1]
    versions = {module.__name__: module.__version__ for module in (raftmlp, torch, timm)}
    return dict(
        model=args.model,
        parameters=sum(p.numel() for p in training.model.parameters()),
        epochs=args.epochs,
        best_epoch=best["epoch"],
        best_top1=best["eval_top1"],
        best={key: value for key, value in best.items() if key.startswith("eval_")},
        last={key: value for key, value in last.items() if key.startswith("eval_")},
        bad_images=last["bad_images"],
        seconds=round(sum(row["seconds"] for row in training.log), 1),
        command=shlex.join(["python", *sys.argv]),
        commit=git_commit(),
        versions=versions | dict(python=platform.python_version()),
        best_checkpoint=str(training.folder.best),
    )


def git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if files were changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def export_path(args) -> Path | None:
    """Return where --export writes; refuse a file that is there already."""
    if not args.export:
        return None
    if not re.fullmatch(r"[A-Za-z0-9_-]+", args.export):
        raise cli.UserError(f"--export {args.export}: a tag is made of letters, digits, - and _")
    path = checkpoint_folders()[0] / f"{args.model}.{args.export}.safetensors"
    if path.exists() and not args.overwrite:
        raise cli.UserError(f"{path} exists: choose another --export, or --overwrite it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UserError(f"cannot export to {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise cli.UserError(f"cannot export to {path}: no permission")
    return path


def export(path: Path, summary: dict) -> None:
    """Write the best weights as pretrained weights, and the card that tells where they come from."""
    checkpoint = load_checkpoint(summary["best_checkpoint"])
    cfg = checkpoint["pretrained_cfg"]
    save_state_dict(unwrap(checkpoint), path, dict(model=checkpoint["arch"], pretrained_cfg=json.dumps(cfg)))
    card = dict(
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        bytes=path.stat().st_size,
        data=checkpoint["options"]["dataset"] or "a folder of images",
        **{key: value for key, value in summary.items() if key != "best_checkpoint"},
        pretrained_cfg=cfg,
        options=checkpoint["options"],
    )
    cli.write_whole(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    cli.say(f"exported {path} and its card {path.with_suffix('.json').name}")


def main() -> None:
    args = build_parser().parse_args()
    processes = cli.start_processes(args.device)
    device, place = processes.device, dict(rank=processes.rank, world_size=processes.world_size)
    random_seed(args.seed)
    batch_size, steps = share_batches(args, processes.world_size)
    if args.tf32 and device.type == "cuda":  # on a CPU it would mean something else
        torch.set_float32_matmul_precision("high")

    # data and model
    train_set = loaders.create_data(args, args.train_split, is_training=True)
    val_set = loaders.create_data(args, args.val_split)
    check_split(args, train_set, val_set)
    names = class_names(train_set)
    if args.num_classes is None and names:
        args.num_classes = len(names)
    model = cli.create_model(args, to_train=True, drop_rate=args.drop, drop_path_rate=args.drop_path).to(device)
    args.num_classes, args.in_chans = model.num_classes, model.in_chans
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    loaders.check_classes(train_set, model)
    settings = loaders.image_settings(args, model)
    facts = image_facts(model, settings, names)
    model.pretrained_cfg = {**model.pretrained_cfg, **facts}

    # optimisation
    folder = RunFolder(args.output)
    loader = loaders.TrainingLoader(
        args, train_set, settings, device, batch_size, steps, **place, bad_images=folder.path / "bad_images.txt"
    )
    if not loader.updates_per_epoch:
        raise cli.UserError(
            f"{loaders.count(train_set)} images make no update of {args.global_batch_size}: choose --global-batch-size "
            f"{loaders.count(train_set)} or less"
        )
    val_loader = loaders.evaluation_loader(args, val_set, settings, device, **place)
    augment = loaders.BatchAugmentation(args, batch_size, model.num_classes, device)
    task = create_task(args, model, augment.makes_soft_targets, device)
    optimizer, scheduler = create_optimisation(args, model, loader.updates_per_epoch)
    if args.model_ema:
        task.setup_ema(args.model_ema_decay, use_warmup=True)
    if args.compile:
        task.compile()
        task.compile_ema()
    if processes.world_size > 1:
        task.prepare_distributed([device] if device.type == "cuda" else None)

    # the run's folder, and where it goes on
    exported = export_path(args)
    description = dict(arch=args.model, model_kwargs=args.model_kwargs, pretrained_cfg=facts)
    training = Training(args, processes, task, optimizer, scheduler, loader, augment, val_loader, folder, description)
    path = processes.on_first(prepare_folder, args, folder)
    folder.path.mkdir(parents=True, exist_ok=True)  # on other machines, where it is no shared one
    if path:
        training.load(path)
        where = f"epoch {training.epoch + 1}, update {training.update + 1}"
        if training.update == loader.updates_per_epoch:
            where = f"epoch {training.epoch + 1}, which is to be evaluated"
        cli.say(f"going on from {path}, {where if training.epoch < args.epochs else 'which is finished'}")
    summary_file = folder.path / "summary.json"
    finished = training.epoch >= args.epochs and summary_file.exists()
    if not finished:  # else its records stay as they are
        processes.on_first(start_folder, args, folder, path)
    journal = Journal(args, folder.path, writes=processes.is_first)

    height, width = settings["input_size"][-2:]
    count = sum(p.numel() for p in model.parameters())
    cli.say(
        f"{args.model}, {count:,} parameters, {model.num_classes} classes, {height}x{width}: "
        f"{loaders.count(train_set)} images to train on, {loaders.count(val_set)} to evaluate on\n"
        f"{args.epochs} epochs of {loader.updates_per_epoch} updates of {args.global_batch_size} images: "
        f"{processes.world_size} process{'es' * (processes.world_size > 1)} x {steps} x {batch_size}, on {device}"
    )
    training.stop_on_signals()
    while training.epoch < args.epochs:
        row = training.run_epoch()
        if row is None:
            cli.say(
                f"stopped in epoch {training.epoch + 1} after update {training.update} of {loader.updates_per_epoch}, "
                f"and saved: the same command with --resume goes on"
            )
            cli.end_together()
            sys.exit(130 if training.signal == signal.SIGINT else 0)
        training.save(best=training.best is row)
        journal.write(training.log)
        journal.report(row)
        left = timedelta(seconds=round(row["seconds"] * (args.epochs - training.epoch)))
        cli.say(
            f"epoch {training.epoch}/{args.epochs}: training loss {row['train_loss']:.4f}, validation loss "
            f"{row['eval_loss']:.4f}, top-1 {row['eval_top1']:.2f} % (best {training.best['eval_top1']:.2f} in epoch "
            f"{training.best['epoch']}), {row['train_images_per_second']:.0f} images/s, {left} left"
        )

    if processes.is_first:
        if not finished:
            journal.write(training.log)  # again: a kill may have come between the last checkpoint and the log
            cli.write_whole(summary_file, json.dumps(summarise(args, training), indent=2) + "\n")
        summary = json.loads(summary_file.read_text())
        cli.say(f"best top-1 {summary['best_top1']:.2f} % in epoch {summary['best_epoch']}, {summary['seconds']} s")
        cli.say(f"in {folder.path}: model_best.pth.tar, last.pth.tar, log.csv, curves.png, summary.json")
        if exported:
            export(exported, summary)
    cli.end_together()


if __name__ == "__main__":
    cli.run(main)

#!/usr/bin/env python
"""Train a model on a data set of images.

    python tools/train.py -c configs/digits/raftmlp_digits.yaml
    python tools/train.py --model raftmlp_s --data-dir imagenet --epochs 300 --output runs/raftmlp_s

Writes into the output folder: last.pth.tar and model_best.pth.tar (weights, averaged weights, optimiser), log.csv (a
line an epoch), curves.png, args.yaml, and summary.json at the end.
"""

import argparse
import csv
import json
import math
import time
from datetime import timedelta
from pathlib import Path

import matplotlib
import timm
import torch
import yaml
from timm.data import Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, dispatch_clip_grad, random_seed, update_summary
from timm.utils.summary import trim_summary
from torchvision.transforms import Compose, InterpolationMode, RandomAffine
from tqdm import tqdm

import cli
import raftmlp
from raftmlp.data import class_names
from validate import evaluate

matplotlib.use("Agg")  # files only, no screen needed


RUN_FILES = ("*.pth.tar", "args.yaml", "curves.png", "log.csv", "summary.json")


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    group = cli.add_model_arguments(parser)
    group.add_argument(
        "--drop", type=cli.number(float, 0, 1), default=0.0, metavar="X", help="dropout before the classifier"
    )
    group.add_argument("--drop-path", type=cli.number(float, 0, 1), default=0.0, metavar="X", help="stochastic depth")
    group.add_argument(
        "--grad-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass, to save memory",
    )

    group = cli.add_data_arguments(parser)
    group.add_argument("--train-split", default="train", metavar="NAME", help="split to train on")

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--epochs", type=cli.number(int, 1), default=300, metavar="N", help="epochs to train, warm-up included"
    )
    group.add_argument("--opt", default="adamw", metavar="NAME", help="any optimiser of timm")
    group.add_argument("--lr", type=cli.number(float, 0), default=1e-3, metavar="X", help="peak learning rate")
    group.add_argument("--weight-decay", type=cli.number(float, 0), default=0.05, metavar="X", help="weight decay")
    group.add_argument(
        "--momentum", type=cli.number(float, 0), default=0.9, metavar="X", help="momentum, where the optimiser has it"
    )
    group.add_argument(
        "--layer-decay", type=cli.number(float, 0), metavar="X", help="layer-wise decay of the learning rate"
    )
    group.add_argument("--clip-grad", type=cli.number(float, 0), metavar="X", help="clip gradients to this norm")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="any schedule of timm, stepped every update")
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
        "--scale", type=cli.number(float, 1e-6), nargs=2, default=[0.08, 1.0], metavar="X", help="area of random crops"
    )
    group.add_argument(
        "--ratio", type=cli.number(float, 1e-6), nargs=2, default=[3 / 4, 4 / 3], metavar="X", help="their aspect ratio"
    )
    group.add_argument(
        "--hflip", type=cli.number(float, 0, 1), default=0.5, metavar="P", help="probability of a horizontal flip"
    )
    group.add_argument(
        "--color-jitter", type=cli.number(float, 0), default=0.4, metavar="X", help="strength of colour jitter"
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
        "--reprob", type=cli.number(float, 0, 1), default=0.0, metavar="P", help="probability of random erasing"
    )
    group.add_argument("--mixup", type=cli.number(float, 0), default=0.0, metavar="ALPHA", help="mixup, off at 0")
    group.add_argument("--cutmix", type=cli.number(float, 0), default=0.0, metavar="ALPHA", help="cutmix, off at 0")

    group = parser.add_argument_group("run")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 autocast")
    group.add_argument("--seed", type=cli.number(int, 0), default=42, metavar="N", help="random seed")
    group.add_argument("--output", default="runs/train", metavar="DIR", help="folder of this run")
    group.add_argument("--overwrite", action="store_true", help="remove a run that is in the folder already")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from this checkpoint, or from the last one in the folder",
    )
    group.add_argument(
        "--checkpoint-hist", type=cli.number(int, 1), default=1, metavar="N", help="best checkpoints to keep"
    )
    return parser


def trained_size(args) -> tuple[int, int] | None:
    """Return the image size a RaftMLP is built for; other models are not told."""
    ours = timm.models.split_model_name_tag(args.model)[0] in timm.list_models(module="raftmlp")
    return cli.image_size(args.img_size) if ours else None


def prepare_output(args) -> Path:
    """Make the run's folder; refuse to write over a run that nobody gave up."""
    output = Path(args.output)
    goes_on = args.resume == "auto" or (args.resume and Path(args.resume).parent.resolve() == output.resolve())
    if (output / "last.pth.tar").exists() and not goes_on:
        if not args.overwrite:
            raise cli.UserError(
                f"{output} holds a run: go on with --resume, name another folder with --output, or --overwrite it"
            )
        for pattern in RUN_FILES:
            for path in output.glob(pattern):
                path.unlink()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.UserError(f"cannot write into {output}: {error.strerror}") from error
    return output


def check_split(train_set, val_set) -> None:
    """Refuse folders of images that are the same for training and evaluation, or that name other classes."""
    train_names, val_names = class_names(train_set), class_names(val_set)
    if train_names and val_names and train_names != val_names:
        raise cli.UserError(
            f"the classes to train on, {train_names[:5]} ..., are not those to evaluate on, {val_names[:5]} ..."
        )
    roots = [getattr(getattr(part, "reader", None), "root", None) for part in (train_set, val_set)]
    if None not in roots:
        train_root, val_root = (Path(root).resolve() for root in roots)
        if train_root == val_root or train_root in val_root.parents or val_root in train_root.parents:
            raise cli.UserError(
                f"images to train on in {train_root} and to evaluate on in {val_root} overlap: put them into "
                f"train/ and val/ of the data folder, or name the sub-folders with --train-split and --val-split"
            )


def training_loader(args, dataset, settings: dict, device: torch.device):
    """Return the loader of shuffled, augmented batches."""
    try:
        loader = create_loader(
            dataset,
            input_size=settings["input_size"],
            batch_size=args.batch_size,
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            re_prob=args.reprob,
            interpolation=settings["interpolation"],
            mean=settings["mean"],
            std=settings["std"],
            num_workers=args.workers,
            device=device,
            pin_memory=device.type == "cuda",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise cli.UserError(
            f"timm makes no augmentation of these options, --aa {args.aa!r} perhaps: {error!r}"
        ) from error
    if args.affine:
        degrees, shift, scale = args.affine
        if shift > 1 or scale >= 1:
            raise cli.UserError(f"--affine takes a SHIFT up to 1 and a SCALE below 1, not {shift} and {scale}")
        affine = RandomAffine(degrees, (shift, shift), (1 - scale, 1 + scale), interpolation=InterpolationMode.BILINEAR)
        dataset.transform = Compose([affine, dataset.transform])
    return loader


def train_one_epoch(epoch, model, loader, loss_fn, optimizer, scheduler, ema, mixup, args, device) -> dict[str, float]:
    """Train one pass over the loader; return the mean loss and the rate."""
    model.train()
    losses = AverageMeter()
    updates = epoch * len(loader)
    start = time.perf_counter()
    bar = tqdm(loader, desc=f"epoch {epoch + 1}/{args.epochs}", unit="batch", leave=False, disable=None)
    for images, target in bar:
        images, target = images.to(device), target.to(device)
        if mixup:
            images, target = mixup(images, target)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            loss = loss_fn(model(images), target)
        losses.update(loss.item(), len(images))
        if not math.isfinite(losses.val):
            lr = optimizer.param_groups[0]["lr"]
            raise cli.UserError(
                f"the loss became {losses.val} in epoch {epoch + 1}, update {updates + 1}, at learning rate {lr:.3g}; "
                f"the checkpoints in {args.output} are of before. A smaller --lr or --clip-grad 1 may help"
            )
        optimizer.zero_grad()
        loss.backward()
        if args.clip_grad:
            dispatch_clip_grad(model.parameters(), args.clip_grad)
        optimizer.step()
        updates += 1
        if ema:
            ema.update(model, step=updates)
        scheduler.step_update(updates)
        rate = losses.count / (time.perf_counter() - start)
        bar.set_postfix(loss=f"{losses.avg:.3f}", images_per_s=f"{rate:.0f}", refresh=False)
    return dict(loss=losses.avg, images_per_second=losses.count / (time.perf_counter() - start))


def resume(path: Path, model, optimizer, ema, saver) -> int:
    """Put a checkpoint's state back; return the epoch to go on with."""
    if not path.is_file():
        raise cli.UserError(f"no checkpoint to resume from at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        if ema:
            ema.module.load_state_dict(state["state_dict_ema"])
        if path.parent.resolve() == Path(saver.checkpoint_dir).resolve():  # the best ones so far are here too
            saver.load_state_dict(state["saver"])
    except Exception as error:  # whatever a damaged or foreign file brings about
        raise cli.UserError(f"cannot resume from {path}: {cli.first_words(error)}") from error
    return state["epoch"] + 1


def plot_curves(log: Path, picture: Path) -> None:
    """Draw loss and accuracy over the epochs of a log."""
    from matplotlib import pyplot as plt

    with log.open() as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) + 1 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    left.plot(epochs, [float(row["train_loss"]) for row in rows], label="training")
    left.plot(epochs, [float(row["eval_loss"]) for row in rows], label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
    right.plot(epochs, [float(row["eval_top1"]) for row in rows], color="tab:green")
    right.set(xlabel="epoch", ylabel="validation top-1 in %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    cli.save_figure(figure, picture)
    plt.close(figure)


def main() -> None:
    args = build_parser().parse_args()
    device = cli.find_device(args.device)
    random_seed(args.seed)

    # data and model
    train_set = cli.create_data(args, args.train_split, is_training=True)
    val_set = cli.create_data(args, args.val_split)
    check_split(train_set, val_set)
    if args.num_classes is None and (names := class_names(train_set)):
        args.num_classes = len(names)
    model = cli.create_model(
        args, fresh_head=True, drop_rate=args.drop, drop_path_rate=args.drop_path, img_size=trained_size(args)
    ).to(device)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    cli.check_classes(train_set, model)
    settings = cli.image_settings(args, model)
    train_loader = training_loader(args, train_set, settings, device)
    val_loader = cli.evaluation_loader(args, val_set, settings, device)
    if not len(train_loader):
        raise cli.UserError(
            f"{len(train_set)} images make no batch of {args.batch_size}: choose a smaller --batch-size"
        )

    # optimisation
    with cli.user_errors(ValueError, AssertionError, RuntimeError):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
        schedule = scheduler_kwargs(args) | dict(step_on_epochs=False, warmup_prefix=False)
        scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=len(train_loader))
    ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True) if args.model_ema else None
    mixup = None
    if args.mixup > 0 or args.cutmix > 0:
        if args.batch_size % 2:
            raise cli.UserError(
                f"mixup and cutmix pair the images of a batch: --batch-size {args.batch_size} must be even"
            )
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=model.num_classes)
    loss_fn = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing)

    # the run's folder
    output = prepare_output(args)
    log = output / "log.csv"
    saver = CheckpointSaver(
        model, optimizer, model_ema=ema, checkpoint_dir=str(output), max_history=args.checkpoint_hist
    )
    first_epoch = 0
    if args.resume:
        path = output / "last.pth.tar" if args.resume == "auto" else Path(args.resume)
        first_epoch = resume(path, model, optimizer, ema, saver)
        print(f"going on from {path}, epoch {first_epoch + 1}")
    options = {key: value for key, value in vars(args).items() if key not in ("config", "overwrite", "resume")}
    cli.write_whole(output / "args.yaml", yaml.safe_dump(options, sort_keys=False))
    trim_summary(str(log), first_epoch)
    scheduler.step_update(first_epoch * len(train_loader))

    count = sum(p.numel() for p in model.parameters())
    height, width = settings["input_size"][-2:]
    print(
        f"{args.model}, {count:,} parameters, {model.num_classes} classes, {height}x{width}: {len(train_set)} images "
        f"to train on, {len(val_set)} to evaluate on, {epochs} epochs of {len(train_loader)} updates on {device}"
    )
    start, metrics = time.perf_counter(), {}
    for epoch in range(first_epoch, epochs):
        trained = train_one_epoch(epoch, model, train_loader, loss_fn, optimizer, scheduler, ema, mixup, args, device)
        metrics = evaluate(ema.module if ema else model, val_loader, device, args.amp)
        update_summary(epoch, trained, metrics, str(log), lr=optimizer.param_groups[0]["lr"])
        best, best_epoch = saver.save_checkpoint(epoch, metric=metrics["top1"])
        seconds = time.perf_counter() - start
        left = timedelta(seconds=round(seconds / (epoch + 1 - first_epoch) * (epochs - epoch - 1)))
        print(
            f"epoch {epoch + 1}/{epochs}: training loss {trained['loss']:.4f}, validation loss {metrics['loss']:.4f}, "
            f"top-1 {metrics['top1']:.2f} % (best {best:.2f} in epoch {best_epoch + 1}), "
            f"{trained['images_per_second']:.0f} images/s, {left} left",
            flush=True,
        )
    if not metrics:
        raise cli.UserError(f"nothing to do: the checkpoint is of epoch {first_epoch}, --epochs says {epochs}")

    plot_curves(log, output / "curves.png")
    summary = dict(
        model=args.model,
        parameters=count,
        epochs=epochs,
        best_epoch=saver.best_epoch + 1,
        best_top1=saver.best_metric,
        last={f"eval_{key}": value for key, value in metrics.items()},
        seconds=round(time.perf_counter() - start, 1),
        versions=dict(raftmlp=raftmlp.__version__, torch=torch.__version__, timm=timm.__version__),
        best_checkpoint=str(output / "model_best.pth.tar"),
    )
    cli.write_whole(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"best top-1 {saver.best_metric:.2f} % in epoch {saver.best_epoch + 1}, {summary['seconds']} s")
    print(f"in {output}: model_best.pth.tar, last.pth.tar, log.csv, curves.png, summary.json")


if __name__ == "__main__":
    cli.run(main)

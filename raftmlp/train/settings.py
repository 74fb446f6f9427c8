"""The settings of training, and the recipe: the ones among them that decide the result of a run."""

import difflib
import json
import math
from dataclasses import asdict, fields, replace
from typing import Annotated, Literal

from pydantic import AfterValidator

from ..config import DeviceSettings, ModelSettings, known_model, weights_file
from ..data.settings import AugmentationSettings, ImageSettings, TrainingDataSettings
from ..data.updates import SizeSettings
from ..errors import UserError
from ..settings import Count, NonNegative, Settings, Share, Text, between, option, settings

__all__ = ["TrainSettings", "make_recipe", "without_effect"]

# settings that say how and where a run goes, and do not change its result
NOT_IN_RECIPE = (
    "channels_last", "checkpoint", "compile", "data_dir", "dataset_download", "device", "export", "kd_checkpoint",
    "log_interval", "log_tensorboard", "log_wandb", "max_bad_images", "output", "save_every", "workers",
)  # fmt: skip
# beginnings of names that timm lists
UNUSABLE_OPTIMIZERS = {
    "adahessian": "it needs second-order gradients",
    "kron": "it compiles its steps, which takes minutes",
}


def known_optimizer(name: str) -> str:
    """Return the name if timm has such an optimizer.

    Raises:
        UserError: If there is none, and the message names similar ones, or if it cannot be used.
    """
    for start, reason in UNUSABLE_OPTIMIZERS.items():
        if name.lower().startswith(start):
            raise UserError(f"the optimizer {name} cannot be used: {reason}")
    from timm.optim import list_optimizers

    known = list_optimizers()
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=3) or ["adamw", "sgd", "lamb"]
        raise UserError(f"unknown optimizer {name!r}; did you mean {' or '.join(near)}?")
    return name


def has_momentum(name: str) -> bool:
    """Return whether an optimizer of timm has a momentum."""
    from timm.optim import get_optimizer_info

    return get_optimizer_info(name).has_momentum


WARMUP_EPOCHS, MIN_LR = 5, 1e-5  # where they fit


@settings
class TrainingModelSettings(ModelSettings):
    """Which model to train, and its regularization."""

    title = "model"
    drop: Share = option(0.0, "dropout before the classifier")
    drop_path: Share = option(0.0, "stochastic depth")


@settings
class OptimizationSettings(Settings):
    """Optimizer, schedule, loss and averaged weights."""

    title = "optimization"
    global_batch_size: Count | None = option(
        None,
        "images an update, of all processes; a process accumulates as many batches of --batch-size or less as it takes "
        "(default: one batch of --batch-size a process)",
    )
    epochs: Count = option(300, "epochs to train, warm-up included")
    opt: Text = option("adamw", "any optimizer of timm", check=known_optimizer, metavar="NAME")
    lr: NonNegative = option(1e-3, "peak learning rate")
    lr_base_size: Count | None = option(
        None, "images an update that --lr is for: with others it changes with the root of their number"
    )
    weight_decay: NonNegative = option(0.05, "weight decay")
    filter_bias_and_bn: bool = option(True, "no weight decay for biases and norms")
    momentum: NonNegative = option(0.9, "momentum, where the optimizer has it")
    layer_decay: between(0.01, 1) | None = option(None, "layer-wise decay of the learning rate")
    clip_grad: between(1e-9) | None = option(None, "clip gradients, off without")
    clip_mode: Literal["norm", "value", "agc"] = option("norm", "what --clip-grad bounds")
    sched: Literal["cosine", "tanh", "wsd", "constant"] = option(
        "cosine", "schedule after the warm-up, stepped every update"
    )
    warmup_epochs: between(0) | None = option(
        None,
        f"epochs of warm-up (default: {WARMUP_EPOCHS}, or a third of --epochs if these are {WARMUP_EPOCHS} or fewer)",
    )
    warmup_lr: NonNegative = option(0.0, "learning rate that the warm-up starts from")
    min_lr: NonNegative | None = option(
        None, f"learning rate at the end (default: {MIN_LR:g}, or the peak where that is lower)"
    )
    smoothing: between(0.0, 0.99) = option(0.1, "label smoothing")
    model_ema: bool = option(False, "average the weights, and evaluate the average")
    model_ema_decay: Share = option(0.9998, "decay of the average")
    dist_bn: Literal["broadcast", "reduce", ""] = option(
        "reduce",
        "statistics of BatchNorm that several processes evaluate and save: their mean (reduce), the first one's "
        "(broadcast), or each its own ('')",
    )

    @property
    def peak_lr(self) -> float:
        """The peak learning rate at the images of an update, which are known here."""
        return self.lr * math.sqrt(self.global_batch_size / self.lr_base_size) if self.lr_base_size else self.lr

    def with_schedule(self) -> "OptimizationSettings":
        """Return the settings with the ``warmup_epochs`` and the ``min_lr`` that were left open.

        Raises:
            UserError: If a warm-up that is given does not fit into the epochs, or a learning rate is above the peak.
        """
        warmup, min_lr, peak = self.warmup_epochs, self.min_lr, self.peak_lr
        if warmup is None:
            warmup = WARMUP_EPOCHS if self.epochs > WARMUP_EPOCHS else self.epochs // 3
        if warmup >= self.epochs:
            hint = f"give --warmup-epochs {self.epochs // 3}"
            raise UserError(
                f"--warmup-epochs {warmup} must be less than --epochs {self.epochs}: {hint}, or more epochs"
            )
        rates = dict(warmup_lr=self.warmup_lr if warmup else 0.0, min_lr=min_lr if self.sched != "constant" else 0.0)
        for name, rate in rates.items():
            if rate is not None and rate > peak:
                option = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{option} {rate:g} is above the peak learning rate {peak:g}: give {option} {peak:g} or less, or a "
                    f"larger --lr"
                )
        return replace(self, warmup_epochs=warmup, min_lr=min(MIN_LR, peak) if min_lr is None else min_lr)


@settings
class DistillationSettings(Settings):
    """A teacher, and how much it counts."""

    title = "distillation"
    kd_model_name: Text | None = option(
        None, "teacher: any model of timm's list, of the same classes", check=known_model, metavar="NAME"
    )
    kd_checkpoint: Annotated[Text, AfterValidator(weights_file)] | None = option(
        None,
        "its weights, a file or folder as for --checkpoint (default: its pretrained ones)",
        metavar="FILE",
    )
    kd_loss_type: Literal["kl", "hard"] = option(
        "kl", "kl: its probabilities are the targets; hard: its best class, as DeiT's"
    )
    kd_temperature: between(1e-3) = option(1.0, "temperature of both softmaxes of kl")
    distill_loss_weight: NonNegative = option(1.0, "weight of the teacher")
    task_loss_weight: NonNegative = option(1.0, "weight of the labels")

    def check_teacher(self) -> None:
        """Refuse options of a teacher where there is none.

        Raises:
            UserError: If there is one that is not at its default.
        """
        given = [entry.name for entry in fields(DistillationSettings) if getattr(self, entry.name) != entry.default]
        if given and not self.kd_model_name:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{options} needs a teacher: name it with --kd-model-name")


@settings
class RunSettings(DeviceSettings):
    """Where a run goes, and what it writes."""

    title = "run"
    tf32: bool = option(True, "TensorFloat-32 in float32 products, on GPUs that have it")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass, to save memory")
    seed: between(0, 2**32 - 1) = option(42, "random seed")
    output: Text = option("runs/train", "folder of this run", metavar="DIR")
    save_every: Count | None = option(None, "save after so many updates too, not only after epochs")
    log_interval: Count = option(50, "updates between lines of progress, where there is no terminal for a bar")
    log_tensorboard: bool = option(False, "write TensorBoard's events into the folder", action="store_true")
    log_wandb: bool = option(False, "log to Weights & Biases", action="store_true")
    export: Text | None = option(
        None,
        "at the end write MODEL.TAG.safetensors, the best weights, and a JSON card, where --pretrained finds them",
        metavar="TAG",
    )


@settings
class TrainSettings(  # the fields come in the order of the bases from the last to the first
    RunSettings,
    DistillationSettings,
    AugmentationSettings,
    SizeSettings,
    OptimizationSettings,
    ImageSettings,
    TrainingDataSettings,
    TrainingModelSettings,
):
    """All settings of a training run, with timm's names."""


# what an option needs to have an effect: a condition, and its words
NEEDS = {
    "scale": (lambda s: s.train_crop_mode != "random", "--train-crop-mode other than random"),
    "color_jitter": (lambda s: not s.aa or s.force_color_jitter, "--force-color-jitter beside --aa"),
    "force_color_jitter": (lambda s: s.aa, "--aa"),
    "remode": (lambda s: s.reprob, "--reprob"),
    "mixup_prob": (lambda s: s.makes_soft_targets and not s.mixup_then_cutmix, "--mixup or --cutmix, one at a time"),
    "mixup_switch_prob": (lambda s: s.mixup and s.cutmix and not s.mixup_then_cutmix, "--mixup and --cutmix in turn"),
    "mixup_then_cutmix": (lambda s: s.makes_soft_targets, "--mixup and --cutmix"),
    "train_batch_sizes": (lambda s: s.train_img_sizes, "--train-img-sizes"),
    "val_split": (lambda s: not s.val_share, "no --val-share"),
    "variable_batch_loss_scale": (
        lambda s: s.train_img_sizes and s.train_batch_sizes and not s.global_batch_size,
        "--train-img-sizes and --train-batch-sizes, without --global-batch-size",
    ),
    "clip_mode": (lambda s: s.clip_grad, "--clip-grad"),
    "model_ema_decay": (lambda s: s.model_ema, "--model-ema"),
    "warmup_lr": (lambda s: s.warmup_epochs != 0, "--warmup-epochs"),
    "min_lr": (lambda s: s.sched != "constant", "a --sched other than constant"),
    "kd_temperature": (lambda s: s.kd_loss_type == "kl", "--kd-loss-type kl"),
    "amp_dtype": (lambda s: s.amp, "--amp"),
    "dataset_download": (lambda s: s.dataset.startswith("torch/"), "--dataset torch/NAME"),
    "momentum": (lambda s: has_momentum(s.opt), "an --opt that has it"),
}
NEEDS["ratio"] = NEEDS["scale"]
NEEDS["train_size_probs"] = NEEDS["train_size_schedule"] = NEEDS["train_batch_sizes"]


def without_effect(settings: TrainSettings) -> list[str]:
    """Return the options that are not at their default and have no effect here, each with what it needs."""
    defaults = {entry.name: entry.default for entry in fields(settings)}
    return [
        f"--{name.replace('_', '-')} (needs {words})"
        for name, (condition, words) in NEEDS.items()
        if getattr(settings, name) != defaults[name] and not condition(settings)
    ]


def make_recipe(settings: TrainSettings) -> dict:
    """Return the settings that decide the result of a run, as plain data that can be compared."""
    options = {key: value for key, value in asdict(settings).items() if key not in NOT_IN_RECIPE}
    return json.loads(json.dumps(options, default=str))

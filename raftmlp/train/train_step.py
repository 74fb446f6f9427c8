"""A step of training: what an update does to a model."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import timm.optim
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..device import Processes
from .distillation import DistillationTask
from .muon import Muon
from .settings import TrainSettings

__all__ = ["TrainStep", "create_optimization"]


def create_optimization(
    settings: TrainSettings, model: nn.Module, updates_per_epoch: int
) -> tuple[Optimizer, Scheduler]:
    """Return timm's optimizer and its schedule: a warm-up, then ``sched`` over the other epochs."""
    settings = settings.with_schedule()
    options = optimizer_kwargs(settings) | dict(lr=settings.peak_lr, filter_bias_and_bn=settings.filter_bias_and_bn)
    optimizer = create_optimizer_v2(model, **options)
    if isinstance(optimizer, timm.optim.Muon):
        optimizer.__class__ = Muon  # its subclass, which timm's names do not lead to
    schedule = scheduler_kwargs(settings) | dict(
        num_epochs=settings.epochs - settings.warmup_epochs,
        warmup_prefix=True,
        step_on_epochs=False,
        decay_epochs=None,
        updates_per_epoch=updates_per_epoch,
    )
    return optimizer, create_scheduler_v2(optimizer, **schedule)[0]


class TrainStep:
    """timm's task of a model and its loss, with optimizer and schedule, averaged weights and gradient scaler.

    The model is moved to the device. Its targets are classes (B,), those of a run that mixes images shares of classes
    (B, num_classes). A teacher, see ``create_teacher``, is no part of the state. ``lr`` is the learning rate of the
    last update.
    """

    def __init__(
        self,
        settings: TrainSettings,
        model: nn.Module,
        updates_per_epoch: int,
        processes: Processes,
        teacher: nn.Module | None = None,
    ):
        self.settings, self.world_size = settings, processes.world_size
        self.device = device = processes.device
        model.to(device, memory_format=settings.memory_format)
        if settings.grad_checkpointing:
            model.set_grad_checkpointing()
        is_soft = settings.makes_soft_targets
        loss = SoftTargetCrossEntropy() if is_soft else LabelSmoothingCrossEntropy(settings.smoothing)
        if teacher:
            self.task = DistillationTask(
                model,
                teacher.to(device, memory_format=settings.memory_format),
                loss,
                loss_type=settings.kd_loss_type,
                temperature=settings.kd_temperature,
                distill_loss_weight=settings.distill_loss_weight,
                task_loss_weight=settings.task_loss_weight,
                device=device,
            )
        else:
            self.task = ClassificationTask(model, loss, device=device, verbose=False)
        self.optimizer, self.scheduler = create_optimization(settings, model, updates_per_epoch)
        if settings.model_ema:
            self.task.setup_ema(settings.model_ema_decay, use_warmup=True)
        if settings.compile:
            self.task.compile()
            self.task.compile_ema()
        if self.world_size > 1:
            self.task.prepare_distributed([device] if device.type != "cpu" else None)
        self.model = unwrap_model(self.task.get_trainable_module())
        scales = settings.amp and settings.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scales)  # calls the optimizer alone where it is not
        self.lr = self.optimizer.param_groups[0]["lr"]

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate: of the averaged weights, if there are such."""
        model = self.task.get_eval_model(ema=self.settings.model_ema)
        return model.module if isinstance(model, DistributedDataParallel) else model

    def start_at(self, updates: int) -> None:
        """Prepare for the update after so many of the run."""
        self.task.train()
        self.scheduler.step_update(max(0, updates - 1))
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(updates)

    def update(
        self, batches: Iterable[tuple[Tensor, Tensor]], steps: int, number: int, loss_scale: float = 1.0
    ) -> Tensor:
        """Take one step of the optimizer on the mean gradient of ``steps`` batches, images (B, C, H, W) and targets.

        ``number`` counts the updates of the run, this one too; ``loss_scale`` multiplies the gradient. Returns this
        process's share of the mean loss, which is not scaled.
        """
        settings, total = self.settings, torch.zeros((), device=self.device)
        for step, (images, target) in enumerate(batches, 1):
            images = images.contiguous(memory_format=settings.memory_format)
            with nullcontext() if step == steps else self.task.no_sync():
                with settings.autocast(self.device):
                    loss = self.task(images, target)["loss"] / steps
                self.scaler.scale(loss * loss_scale).backward()
            total += loss.detach() / self.world_size
        if settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), settings.clip_grad, mode=settings.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.task.update_ema(step=number)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(number)
        return total

    def distribute_statistics(self) -> None:
        """Give all processes the same statistics of BatchNorm, as ``dist_bn`` says, at the end of an epoch.

        Those of the averaged model are the first process's, which is the one that saves: the others' are lost when a
        run is resumed in the middle of an epoch, so a mean would depend on that.
        """
        if self.world_size > 1 and self.settings.dist_bn:
            distribute_bn(self.model, self.world_size, reduce=self.settings.dist_bn == "reduce")
            if self.settings.model_ema:
                distribute_bn(unwrap_model(self.task.get_trainable_module(ema=True)), self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, averaged weights, and the state of optimizer and gradient scaler."""
        state = dict(self.task.get_checkpoint_state(), optimizer=self.optimizer.state_dict())
        state |= self.task.get_checkpoint_state(ema=True)
        if self.scaler.is_enabled():
            state["amp_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the optimizer's hyperparameters stay those of the settings."""
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.task.load_checkpoint_state(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, hyperparameters):
            group.update(values)
        if self.settings.model_ema:
            self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        if self.scaler.is_enabled() and "amp_scaler" in state:
            self.scaler.load_state_dict(state["amp_scaler"])

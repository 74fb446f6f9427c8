"""A model in training: what an update does to it."""

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
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..errors import UserError, first_words
from ..processes import Processes
from .distillation import DistillationTask
from .muon import Muon
from .settings import OptimizationSettings, TrainSettings, known_optimizer

__all__ = ["Learner", "create_optimisation"]


def create_optimisation(
    settings: OptimizationSettings, model: nn.Module, updates_per_epoch: int
) -> tuple[Optimizer, Scheduler]:
    """Return the optimiser and the schedule: a warm-up, then ``sched`` over the other epochs.

    Raises:
        UserError: If the settings do not fit each other, or timm does not take them or the optimiser cannot be used.
    """
    settings = settings.with_schedule()
    known_optimizer(settings.opt)
    schedule = scheduler_kwargs(settings) | dict(
        num_epochs=settings.epochs - settings.warmup_epochs,
        warmup_prefix=True,
        step_on_epochs=False,
        decay_epochs=None,
        updates_per_epoch=updates_per_epoch,
    )
    try:
        optimizer = create_optimizer_v2(
            model,
            **optimizer_kwargs(settings) | dict(lr=settings.peak_lr),
            filter_bias_and_bn=settings.filter_bias_and_bn,
        )
        if isinstance(optimizer, timm.optim.Muon):
            optimizer.__class__ = Muon  # its subclass, which timm's names do not lead to
        scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    except (ValueError, AssertionError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(f"--opt {settings.opt}, --sched {settings.sched}: {first_words(error)}") from error
    return optimizer, scheduler


class Learner:
    """A model with its loss, optimiser and schedule, averaged weights and gradient scaler where there are such.

    The model is moved to the device. Its targets are classes (B,), those of a run that mixes images shares of classes
    (B, num_classes). A teacher, see ``create_teacher``, is no part of the state. ``lr`` is the learning rate of the
    last update.

    Raises:
        UserError: If the settings do not fit each other.
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
            teacher.to(memory_format=settings.memory_format)
            self.task = DistillationTask(
                model,
                teacher,
                loss,
                loss_type=settings.kd_loss_type,
                temperature=settings.kd_temperature,
                distill_weight=settings.distill_loss_weight,
                task_weight=settings.task_loss_weight,
                device=device,
            )
        else:
            self.task = ClassificationTask(model, loss, device=device, verbose=False)
        self.optimizer, self.scheduler = create_optimisation(settings, model, updates_per_epoch)
        if settings.model_ema:
            self.task.setup_ema(settings.model_ema_decay, use_warmup=True)
        if settings.compile:
            self.task.compile()
            self.task.compile_ema()
        if self.world_size > 1:
            self.task.prepare_distributed([device] if device.type != "cpu" else None)
        self.model = unwrap_model(self.task.get_trainable_module())
        self.scaler = NativeScaler(device.type) if settings.amp and settings.amp_dtype == "float16" else None
        self.lr = self.optimizer.param_groups[0]["lr"]

    @property
    def averaged_model(self) -> nn.Module:
        """The model of the averaged weights."""
        return self.task.get_trainable_module(ema=True).module

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
        """Take one step of the optimiser on the mean gradient of ``steps`` batches, images (B, C, H, W) and targets.

        ``number`` counts the updates of the run, this one too; ``loss_scale`` multiplies the gradient. Returns this
        process's share of the mean loss, which is not scaled.
        """
        total = torch.zeros((), device=self.device)
        for step, (images, target) in enumerate(batches, 1):
            images = images.contiguous(memory_format=self.settings.memory_format)
            is_last = step == steps
            with nullcontext() if is_last else self.task.no_sync():
                with self.settings.autocast(self.device):
                    loss = self.task(images, target)["loss"] / steps
                self._backward(loss * loss_scale, is_last)
            total += loss.detach() / self.world_size
        if self.settings.model_ema:
            self.task.update_ema(step=number)
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(number)
        return total

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a batch's gradient; after an update's last batch let the optimiser step."""
        clip_grad, mode, parameters = self.settings.clip_grad, self.settings.clip_mode, self.model.parameters()
        if self.scaler:
            clip = dict(clip_grad=clip_grad, clip_mode=mode, parameters=parameters)
            self.scaler(loss, self.optimizer, **clip, need_update=is_last)
        else:
            loss.backward()
            if is_last:
                if clip_grad is not None:
                    dispatch_clip_grad(parameters, clip_grad, mode=mode)
                self.optimizer.step()
        if is_last:
            self.optimizer.zero_grad()

    def distribute_statistics(self) -> None:
        """Give all processes the same statistics of BatchNorm, as ``dist_bn`` says, at the end of an epoch.

        Those of the averaged model are the first process's, which is the one that saves: the others' are lost when a
        run is resumed in the middle of an epoch, so a mean would depend on that.
        """
        if self.world_size > 1 and self.settings.dist_bn:
            distribute_bn(self.model, self.world_size, reduce=self.settings.dist_bn == "reduce")
            if self.settings.model_ema:
                distribute_bn(self.averaged_model, self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return weights, averaged weights, and the state of optimiser and gradient scaler."""
        state = dict(state_dict=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        if self.settings.model_ema:
            state["state_dict_ema"] = self.averaged_model.state_dict()
        if self.scaler:
            state["amp_scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the optimiser's hyperparameters stay those of the settings."""
        hyperparameters = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, hyperparameters):
            group.update(values)
        if self.settings.model_ema:
            self.averaged_model.load_state_dict(state["state_dict_ema"])
        if self.scaler and "amp_scaler" in state:
            self.scaler.load_state_dict(state["amp_scaler"])

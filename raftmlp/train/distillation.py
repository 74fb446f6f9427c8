"""A teacher of a model in training, and the loss with it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask
from torch import Tensor, nn

from ..config import ModelSettings
from ..data.images import data_config
from ..data.settings import ImageSettings
from ..errors import UserError
from ..evaluate.evaluation import check_sizes
from ..model.create import create_model

__all__ = ["DistillationTask", "create_teacher", "weights_sha256"]


@torch.no_grad()
def create_teacher(
    name: str, checkpoint: str | None, student: nn.Module, shapes: Sequence[tuple[int, int, int]]
) -> nn.Module:
    """Return a teacher on the CPU, in eval mode and without gradients; its pretrained_cfg has its own mean and std.

    Args:
        name: Any model of timm's.
        checkpoint: The file of its weights; None takes timm's pretrained ones.
        student: Its channels and classes are the teacher's.
        shapes: The images (C, H, W) that it must take.
    """
    settings = ModelSettings(model=name, pretrained=not checkpoint, checkpoint=checkpoint, in_chans=student.in_chans)
    teacher = create_model(settings, classes=student.num_classes).eval().requires_grad_(False)
    if teacher.num_classes != student.num_classes:
        raise UserError(f"the teacher {name} has {teacher.num_classes} classes, the model {student.num_classes}")
    config = data_config(ImageSettings(), teacher)
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    check_sizes(teacher, name, shapes, "the teacher")
    return teacher


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of weights: of their keys, types, shapes and bytes, in the order of the keys."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class DistillationTask(LogitDistillationTask):
    """timm's task of a student with a teacher, with hard labels too, and in float32 beside half precision.

    The loss is ``task_loss_weight`` times that of the labels plus ``distill_loss_weight`` times the teacher's: for
    "kl", temperature ** 2 times the divergence of the student's softmax from the teacher's, both at the temperature;
    for "hard", the cross entropy to the teacher's best classes, as DeiT's (arXiv 2012.12877). Both are means over the
    images. The teacher gets the student's images, normalized with its own mean and std.

    Args:
        *args: Student, teacher and the loss of the labels, as timm's.
        loss_type: "kl" or "hard".
        **kwargs: More of timm's.
    """

    def __init__(self, *args: Any, loss_type: str = "kl", **kwargs: Any):
        super().__init__(*args, verbose=False, **kwargs)
        self.loss_type = loss_type  # timm's knows kl alone

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return loss, task_loss, kd_loss and the output (B, classes) of images (B, C, H, W) and targets."""
        output = self.trainable_module(input)
        task_loss = self.criterion(output, target)
        with torch.no_grad():
            taught = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std)).float()
        if self.loss_type == "hard":
            kd_loss = F.cross_entropy(output.float(), taught.argmax(1))
        else:
            log_probs = F.log_softmax(output.float() / self.temperature, 1)
            log_taught = F.log_softmax(taught / self.temperature, 1)
            kd_loss = F.kl_div(log_probs, log_taught, reduction="batchmean", log_target=True) * self.temperature**2
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return dict(loss=loss, output=output, task_loss=task_loss, kd_loss=kd_loss)

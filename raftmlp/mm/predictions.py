"""Predictions of trained detectors and segmentors: of single images, and drawn beside the truth in an evaluation."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from PIL import Image
from tqdm import tqdm

from ..device import is_first_process
from ..errors import UserError, first_words
from ..files import save_figure
from .checkpoints import load_weights, trained_classes
from .configs import drop_pretrained
from .data import check_heads


class Predictor:
    """A trained detector or segmentor that predicts single images.

    Args:
        config: The config that it was trained with.
        checkpoint: Its weights.
        device: Where it runs.

    Attributes:
        classes: Names of the classes.

    Raises:
        UserError: If the model cannot be built, or the checkpoint is missing, damaged, another model's or no training
            run's.
    """

    def __init__(self, config: Config, checkpoint: Path, device: torch.device):
        init_default_scope(config.default_scope)
        drop_pretrained(config)
        try:
            model = MODELS.build(config.model)
        except Exception as error:
            raise UserError(f"cannot build the config's model: {first_words(error)}") from error
        content = load_weights(model, checkpoint)
        self.model, self.classes = model.to(device).eval(), trained_classes(content)
        if not self.classes:
            raise UserError(f"{checkpoint} does not name its classes: it is no checkpoint of raftmlp train-mm")
        check_heads(model, self.classes, f"the checkpoint {checkpoint}")
        steps = config.test_dataloader.dataset.pipeline
        steps = [step for step in steps if not step.type.startswith("Load") or step.type == "LoadImageFromFile"]
        self.pipeline = Compose(steps)
        self.visualizer = VISUALIZERS.build({**config.visualizer, "vis_backends": None, "name": "predictions"})
        palette = content["meta"]["dataset_meta"].get("palette") or "random"
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    @torch.inference_mode()
    def __call__(self, file: Path) -> BaseDataElement:
        """Return an image's data sample, with ``pred_instances`` or ``pred_sem_seg``, on the CPU.

        Raises:
            UserError: If the image cannot be read.
        """
        try:
            data = self.pipeline(dict(img_path=str(file), img_id=0))
        except Exception as error:  # the readers of images raise anything on bytes that are no image
            raise UserError(f"cannot read {file}: {first_words(error)}") from error
        return self.model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0].cpu()


def objects(sample: BaseDataElement, classes: Sequence[str], score_thr: float) -> Iterator[dict]:
    """Yield the objects in an image, most certain first: class, score, box as left, top, right and bottom in pixels."""
    instances = sample.pred_instances
    for label, score, box in zip(instances.labels.tolist(), instances.scores.tolist(), instances.bboxes.tolist()):
        if score >= score_thr:
            yield dict(name=classes[label], score=score, box=box)


def label_map(sample: BaseDataElement, classes: Sequence[str]) -> np.ndarray:
    """Return the class of every pixel, (H, W) of 8 bits, or 16 for more than 256 classes."""
    return sample.pred_sem_seg.data[0].numpy().astype("uint16" if len(classes) > 256 else "uint8")


def draw(visualizer: Visualizer, sample: BaseDataElement, path: Path, score_thr: float, truth: bool) -> None:
    """Draw an image with its predictions, objects from a score on, into a PNG file; its truth to the left if wanted."""
    image = mmcv.imread(sample.img_path, channel_order="rgb")
    if "pred_sem_seg" in sample and image[..., 0].size == 1:  # mmseg's visualizer takes its mask for a number
        mmcv.imwrite(image[..., ::-1], str(path))
        return
    kwargs = dict(pred_score_thr=score_thr) if "pred_instances" in sample else dict(with_labels=False)
    visualizer.add_datasample(path.stem, image, sample, draw_gt=truth, out_file=str(path), **kwargs)


# Evaluation


class DrawHook(Hook):
    """Draws the first images of an evaluation, or all, into files in ``drawn``: truth left and predictions right."""

    def __init__(self, folder: Path, limit: int | None, score_thr: float):
        self.folder, self.limit, self.score_thr = folder, limit, score_thr
        self.drawn: list[Path] = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Draw the images of a batch."""
        for sample in outputs[: None if self.limit is None else self.limit - len(self.drawn)]:
            path = self.folder / f"{Path(sample.img_path).stem}.png"
            if path in self.drawn:  # an image of the same name in another folder
                path = path.with_stem(f"{path.stem}_{len(self.drawn)}")
            draw(runner.visualizer, sample, path, self.score_thr, truth=True)
            self.drawn.append(path)


class ProgressHook(Hook):
    """Shows the progress of an evaluation; of several processes, that of the first."""

    def before_test(self, runner) -> None:
        """Open the bar."""
        hidden = None if is_first_process() else True
        self.bar = tqdm(total=len(runner.test_dataloader), desc="evaluating", unit="batch", disable=hidden)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Count a batch."""
        self.bar.update()

    def after_test(self, runner) -> None:
        """Close the bar."""
        self.bar.close()


def draw_overview(path: Path, images: Sequence[Path], title: str, columns: int = 4) -> None:
    """Draw several image files into one picture."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(14, 1.9 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images):
        with Image.open(image) as opened:
            axis.imshow(opened)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)

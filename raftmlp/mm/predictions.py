"""Predictions of trained detectors and segmentors: of single images, and drawn beside the truth in an evaluation."""

from collections.abc import Sequence
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

from ..errors import UserError, first_words
from ..files import save_figure
from .checkpoints import load_weights, trained_classes
from .configs import drop_pretrained


class Predictor:
    """A trained detector or segmentor that predicts single images.

    The toolboxes' own inferencers load weights that fit in part, and name COCO's or Cityscapes' classes if a checkpoint
    has none.
    """

    def __init__(self, config: Config, checkpoint: Path, device: torch.device):
        init_default_scope(config.default_scope)
        drop_pretrained(config)
        model = MODELS.build(config.model)
        content = load_weights(model, checkpoint)
        self.model, self.classes = model.to(device).eval(), trained_classes(content)
        if not self.classes:
            raise UserError(f"{checkpoint} does not name its classes: it is no checkpoint of raftmlp train-mm")
        steps = config.test_dataloader.dataset.pipeline
        self.pipeline = Compose([s for s in steps if not s.type.startswith("Load") or s.type == "LoadImageFromFile"])
        self.visualizer = VISUALIZERS.build({**config.visualizer, "vis_backends": None, "name": "predictions"})
        palette = content["meta"]["dataset_meta"].get("palette") or "random"
        self.visualizer.dataset_meta = dict(classes=self.classes, palette=palette)

    @torch.inference_mode()
    def __call__(self, file: Path) -> BaseDataElement:
        """Return an image's data sample, with ``pred_instances`` or ``pred_sem_seg``, on the CPU."""
        try:
            data = self.pipeline(dict(img_path=str(file), img_id=0))
        except Exception as error:  # the readers of images raise anything on bytes that are no image
            raise UserError(f"cannot read {file}: {first_words(error)}") from error
        return self.model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0].cpu()

    def write(self, sample: BaseDataElement, path: Path, score_thr: float) -> tuple[dict, str]:
        """Write an image's files, whose names begin with a path's; returns its entry in the results, and its words.

        Objects are from a score on, most certain first; boxes are left, top, right and bottom in pixels.
        """
        picture = path.with_name(f"{path.name}.png")
        draw(self.visualizer, sample, picture, score_thr, truth=False)
        if "pred_instances" in sample:
            found = sample.pred_instances
            rows = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
            objects = [dict(name=self.classes[i], score=p, box=box) for i, p, box in rows if p >= score_thr]
            words = ", ".join(f"{o['name']} {o['score']:.2f}" for o in objects) or "nothing found"
            return dict(picture=picture.name, objects=objects), words
        labels = sample.pred_sem_seg.data[0].numpy().astype("uint16" if len(self.classes) > 256 else "uint8")
        label_map = path.with_name(f"{path.name}_labels.png")
        Image.fromarray(labels).save(label_map)
        words = ", ".join(self.classes[label] for label in np.unique(labels))
        return dict(picture=picture.name, label_map=label_map.name), words


def draw(visualizer: Visualizer, sample: BaseDataElement, path: Path, score_thr: float, truth: bool) -> None:
    """Draw an image with its predictions, objects from a score on, into a PNG file; its truth to the left if wanted."""
    image = mmcv.imread(sample.img_path, channel_order="rgb")
    if "pred_sem_seg" in sample and image[..., 0].size == 1:  # mmseg's visualizer takes its mask for a number
        mmcv.imwrite(image[..., ::-1], str(path))
        return
    kwargs = dict(pred_score_thr=score_thr) if "pred_instances" in sample else dict(with_labels=False)
    visualizer.add_datasample(path.stem, image, sample, draw_gt=truth, out_file=str(path), **kwargs)


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


def draw_overview(path: Path, images: Sequence[Path], title: str, columns: int = 4) -> None:
    """Draw several image files into one picture."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(14, 1.9 * rows + 0.4), layout="constrained")
    for number, image in enumerate(images, start=1):
        axis = figure.add_subplot(rows, columns, number)
        axis.imshow(mmcv.imread(image, channel_order="rgb"))
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)

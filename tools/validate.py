#!/usr/bin/env python
"""Evaluate a model on a data set: top-1, top-5, loss, images per second.

    python tools/validate.py --model raftmlp_digits --pretrained --dataset digits
    python tools/validate.py --model raftmlp_s --checkpoint raftmlp_s.pth --data-dir imagenet

Prints one line, and writes JSON and a picture where they are asked for.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from timm.utils import AverageMeter, accuracy
from torch import Tensor
from tqdm import tqdm

import cli
from raftmlp.data import class_names

matplotlib.use("Agg")  # files only, no screen needed


def build_parser() -> cli.Parser:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    cli.add_model_arguments(parser)
    cli.add_data_arguments(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 autocast")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--results-file", type=cli.output_file((".json",)), metavar="FILE", help="write the figures, a .json file"
    )
    group.add_argument(
        "--picture",
        type=cli.output_file((".png", ".jpg", ".pdf", ".svg")),
        metavar="FILE",
        help="draw images with their predictions, the wrong ones marked",
    )
    return parser


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: Iterable,
    device: torch.device,
    amp: bool = False,
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """Return a model's figures over a loader: loss, top1 and top5 in percent, images, images_per_second.

    Args:
        model: Any classifier; it is put into eval mode.
        loader: Batches of normalised images (B, C, H, W) and class indices (B,).
        device: Where the model is.
        amp: Run the model under bfloat16 autocast.
        on_batch: Called with every batch's images, classes and probabilities (B, num_classes).
    """
    model.eval()
    loss, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    start = time.perf_counter()
    for images, target in tqdm(loader, desc="evaluating", unit="batch", leave=False, disable=None):
        images, target = images.to(device), target.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        logits = logits.float()
        hit1, hit5 = accuracy(logits, target, topk=(1, 5))
        loss.update(F.cross_entropy(logits, target).item(), len(target))
        top1.update(hit1.item(), len(target))
        top5.update(hit5.item(), len(target))
        if on_batch:
            on_batch(images, target, logits.softmax(1))
    rate = top1.count / (time.perf_counter() - start)
    return dict(loss=loss.avg, top1=top1.avg, top5=top5.avg, images=top1.count, images_per_second=rate)


class Gallery:
    """Collects images with their predictions, wrong ones first, and draws them."""

    def __init__(self, mean: Iterable[float], std: Iterable[float], names: list[str] | None, limit: int = 40):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.names, self.limit = names, limit
        self.right: list[tuple] = []
        self.wrong: list[tuple] = []

    def add(self, images: Tensor, target: Tensor, probabilities: Tensor) -> None:
        """Look at a batch, as ``evaluate`` hands it out."""
        chance, predicted = probabilities.max(1)
        for image, truth, guess, share in zip(images.cpu(), target.tolist(), predicted.tolist(), chance.tolist()):
            kept = self.right if truth == guess else self.wrong
            if len(kept) < self.limit:
                kept.append(((image * self.std + self.mean).clamp(0, 1).permute(1, 2, 0).numpy(), truth, guess, share))

    def draw(self, path: Path, title: str) -> None:
        """Write the picture."""
        from matplotlib import pyplot as plt

        shown = (self.wrong + self.right)[: self.limit]
        columns = 8
        rows = max(1, -(-len(shown) // columns))
        figure, axes = plt.subplots(rows, columns, figsize=(columns * 1.25, rows * 1.45 + 0.5), squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        for axis, (image, truth, guess, share) in zip(axes.flat, shown):
            axis.imshow(image)
            label = f"{self._name(guess)}  {share:.0%}"
            if guess == truth:
                axis.set_title(label, fontsize=8, color="tab:green")
            else:
                axis.set_title(f"{label}\nis {self._name(truth)}", fontsize=8, color="tab:red", weight="bold")
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()
        cli.save_figure(figure, path)
        plt.close(figure)

    def _name(self, index: int) -> str:
        return self.names[index] if self.names and index < len(self.names) else str(index)


def main() -> None:
    args = build_parser().parse_args()
    device = cli.find_device(args.device)
    dataset = cli.create_data(args, args.val_split)
    names = class_names(dataset)
    if names and not args.pretrained and args.num_classes is None:
        args.num_classes = len(names)
    model = cli.create_model(args).to(device)
    settings = cli.image_settings(args, model)
    cli.check_classes(dataset, model)

    if not args.pretrained and not args.checkpoint:
        print("note: neither --pretrained nor --checkpoint is given, the weights are random", file=sys.stderr)

    gallery = Gallery(settings["mean"], settings["std"], names) if args.picture else None
    loader = cli.evaluation_loader(args, dataset, settings, device)
    result = evaluate(model, loader, device, args.amp, gallery and gallery.add)
    result = dict(model=args.model, img_size=settings["input_size"][-2:], **result)

    print(
        f"{args.model}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} "
        f"over {result['images']} images, {result['images_per_second']:.0f} images/s on {device}"
    )
    if args.results_file:
        cli.write_whole(args.results_file, json.dumps(result, indent=2) + "\n")
        print(f"figures: {args.results_file}")
    if gallery:
        right = round(result["top1"] * result["images"] / 100)
        gallery.draw(args.picture, f"{args.model}: {right} of {result['images']} right, the wrong ones first")
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    cli.run(main)

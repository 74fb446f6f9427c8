#!/usr/bin/env python
"""Evaluate a trained detector of mmdet or segmentor of mmseg, and draw its predictions beside the truth.

python tools/test_mm.py configs/detection/mask_rcnn_raftmlp_digits.py runs/mask_rcnn_raftmlp_digits --show-dir shown
torchrun --nproc-per-node 8 tools/test_mm.py CONFIG CHECKPOINT
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import cli
import toolboxes
from reports import PICTURES

IN_PICTURE, COLUMNS = 16, 4


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s CONFIG CHECKPOINT [OPTION ...]", yaml_config=False, description=__doc__)
    toolboxes.add_run_arguments(
        toolboxes.add_config_arguments(parser),
        "test in the folder of the run, if CHECKPOINT is one, else in runs/CONFIG",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run: its last")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--results-file", type=cli.output_file((".json",)), metavar="FILE", help="write the results, a .json file"
    )
    group.add_argument(
        "--show-dir",
        type=cli.output_folder,
        metavar="DIR",
        help="draw every image into this folder, truth left and predictions right",
    )
    group.add_argument(
        "--picture",
        type=cli.output_file(PICTURES),
        metavar="FILE",
        help=f"draw the first {IN_PICTURE} images (of the first process) in the same way into one picture",
    )
    group.add_argument(
        "--score-thr", type=cli.number(float, 0, 1), default=0.3, metavar="P", help="draw objects from this score on"
    )
    return parser


class DrawHook(toolboxes.Hook):
    """Draws images of an evaluation, truth left and predictions right.

    Args:
        folder: Where to.
        limit: How many; None for all.
        score_thr: Score from which on objects are drawn.
    """

    def __init__(self, folder: Path, limit: int | None, score_thr: float):
        self.folder, self.limit, self.score_thr = folder, limit, score_thr
        self.drawn: list[Path] = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Draw the images of a batch."""
        for sample in outputs[: None if self.limit is None else self.limit - len(self.drawn)]:
            path = self.folder / f"{Path(sample.img_path).stem}.png"
            if path in self.drawn:  # an image of the same name in another folder
                path = path.with_stem(f"{path.stem}_{len(self.drawn)}")
            toolboxes.draw(runner.visualizer, sample, path, self.score_thr, truth=True)
            self.drawn.append(path)


class BarHook(toolboxes.Hook):
    """Shows how far an evaluation is."""

    def before_test(self, runner) -> None:
        """Begin."""
        hidden = None if cli.is_first() else True
        self.bar = tqdm(total=len(runner.test_dataloader), desc="evaluating", unit="batch", disable=hidden)

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Count a batch."""
        self.bar.update()

    def after_test(self, runner) -> None:
        """End."""
        self.bar.close()


def draw_picture(path: Path, images: list[Path], title: str) -> None:
    """Write a picture of images."""
    figure = Figure(figsize=(14, 1.9 * -(-len(images) // COLUMNS) + 0.4), layout="constrained")
    axes = figure.subplots(-(-len(images) // COLUMNS), COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images):
        with Image.open(image) as opened:
            axis.imshow(opened)
    figure.suptitle(title, fontsize=10)
    cli.save_figure(figure, path)


def report(args: argparse.Namespace, checkpoint: Path, results: dict, drawn: list) -> None:
    """Write what the options ask for, and say it."""
    line = toolboxes.results_line(results)
    if args.picture:
        draw_picture(args.picture, drawn[:IN_PICTURE], f"truth and prediction; {line}")
    cli.say(f"{checkpoint}: {line}")
    if args.results_file:
        figures = {key: None if math.isnan(value) else float(f"{value:.6g}") for key, value in results.items()}
        content = dict(config=args.config, checkpoint=str(checkpoint), **figures)
        cli.write_whole(args.results_file, json.dumps(content, indent=2) + "\n")
    for name, place in (("results", args.results_file), ("picture", args.picture), ("pictures", args.show_dir)):
        if place:
            cli.say(f"{name}: {place}")


def main() -> None:
    args = build_parser().parse_args()
    config = toolboxes.read_config(args)
    checkpoint = toolboxes.find_checkpoint(args.checkpoint)
    config.load_from, config.resume = None, False
    toolboxes.forget_pretrained(config)
    if not args.work_dir:  # in a folder of its own: the run's record of its config stays
        run = args.checkpoint if Path(args.checkpoint).is_dir() else config.work_dir
        config.work_dir = str(Path(run) / "test")
    runner = toolboxes.build_runner(config, ("test",))
    toolboxes.load_weights(runner.model, checkpoint)
    runner.register_hook(BarHook())

    with tempfile.TemporaryDirectory() as temporary:
        hook = None
        if args.show_dir or (args.picture and cli.is_first()):
            hook = DrawHook(args.show_dir or Path(temporary), None if args.show_dir else IN_PICTURE, args.score_thr)
            runner.register_hook(hook)
        with toolboxes.damaged_files():
            results = runner.test()
        if cli.is_first():
            report(args, checkpoint, results, hook.drawn if hook else [])
    cli.end_together()


if __name__ == "__main__":
    cli.run(main)

#!/usr/bin/env python
"""Train a detector of mmdet or a segmentor of mmseg, as a config tells, and evaluate it.

    python tools/train_mm.py configs/detection/mask_rcnn_raftmlp_s_fpn_1x_coco.py --data-dir coco
    torchrun --nproc-per-node 8 tools/train_mm.py configs/segmentation/fpn_raftmlp_s_40k_ade20k.py --amp

An interrupted run goes on from its last whole checkpoint with --resume.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure

import cli
import toolboxes
from raftmlp.checkpoint import describe_differences, shapes, summary

CHECKPOINTS = ("epoch_*.pth", "iter_*.pth", "best_*.pth")
RUN_FILES = ("last_checkpoint", "curves.png", "[0-9]*_[0-9]*/vis_data")


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s CONFIG [OPTION ...]", yaml_config=False, description=__doc__)
    toolboxes.add_run_arguments(toolboxes.add_config_arguments(parser))
    group = parser.add_argument_group("run")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="FILE",
        help="go on from this checkpoint, or without a name from the last whole one in the folder of the run, if any",
    )
    group.add_argument("--overwrite", action="store_true", help="remove the run that is in the folder")
    group.add_argument("--amp", action="store_true", help="mixed precision; needs a GPU")
    group.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch in use")
    return parser


def find_run(args: argparse.Namespace, config: toolboxes.Config) -> Path | None:
    """Return the checkpoint that a run goes on from, None if it starts at the beginning.

    Raises:
        UserError: If the folder holds a run, and nothing was said of it; if there is no whole checkpoint.
    """
    folder = Path(config.work_dir)
    resume = args.resume or ("auto" if config.get("resume") else "")
    if resume and args.overwrite:
        raise cli.UserError("--resume and --overwrite exclude each other")
    if not resume:
        if any(path for pattern in CHECKPOINTS for path in folder.glob(pattern)) and not args.overwrite:
            raise cli.UserError(f"{folder} holds a run: say --resume, --overwrite or another --work-dir")
        return None
    if resume != "auto":
        return toolboxes.find_checkpoint(resume)
    found = toolboxes.last_whole_checkpoint(folder)
    if found is None:
        cli.say(f"no checkpoint in {folder} to resume: starting at the beginning")
    return found


def check_run(model: torch.nn.Module, path: Path, config: toolboxes.Config) -> None:
    """Refuse to go on from a checkpoint of another model, or from one that is not of a run; mmengine would try.

    If it is the end of its run, say so.

    Raises:
        UserError: If it is one.
    """
    checkpoint = toolboxes.load_from_local(path)
    toolboxes.check_weights(model, checkpoint, path)
    for part in ("meta", "message_hub", "optimizer", "param_schedulers"):
        if part not in checkpoint:
            hint = f"to start from its weights say --cfg-options load_from={path}"
            raise cli.UserError(f"{path} cannot be resumed: it has no {part}; {hint}")
    if not isinstance(checkpoint["meta"], dict):
        raise cli.UserError(f"{path} is damaged: its meta is no dict")
    ends = dict(epoch=config.train_cfg.get("max_epochs"), iter=config.train_cfg.get("max_iters"))
    if any(end is not None and checkpoint["meta"].get(unit, 0) >= end for unit, end in ends.items()):
        cli.say(f"{path} is the end of its run: nothing is left to train")


def check_start(model: torch.nn.Module, path: str) -> None:
    """Say which of the weights to start from (load_from) the model does not take; refuse them if they are none of its.

    Raises:
        UserError: If the file is missing, damaged or of another model.
    """
    checkpoint = toolboxes.CheckpointLoader.load_checkpoint(path, map_location="cpu")
    own, given = shapes(getattr(model, "module", model).state_dict()), shapes(checkpoint.get("state_dict", checkpoint))
    if not any(given.get(key) == shape for key, shape in own.items()):
        raise cli.UserError(f"load_from {path}: it has no weights of the config's model")
    if differences := describe_differences(given, own):
        cli.say(f"load_from {path} fits in part: {summary(differences)}; the rest of the weights is taken")


def clear(folder: Path, keep: Path) -> None:
    """Remove the files of a run, and no others; what is in the folder to keep stays."""
    for pattern in (*CHECKPOINTS, *RUN_FILES):
        for path in folder.glob(pattern):
            if keep.resolve() not in path.resolve().parents:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_log(folder: Path) -> tuple[list[dict], list[dict]]:
    """Return a run's log, of all its parts: entries with a loss, by iteration, and entries with results.

    A part that was resumed takes the place of what an earlier one did after its checkpoint.
    """
    losses: dict[int, dict] = {}
    results: dict[int, dict] = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the run was killed in the middle of it
                continue
            (losses if "loss" in entry else results)[entry["step"]] = entry
    return [losses[step] for step in sorted(losses)], [results[step] for step in sorted(results)]


def draw_curves(path: Path, losses: list[dict], results: list[dict], unit: str) -> None:
    """Draw the losses over iterations, and the results over what they are counted in."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in sorted({name for entry in losses for name in entry if "loss" in name}):
        left.plot([entry["step"] for entry in losses], [entry.get(name) for entry in losses], label=name)
    left.set(xlabel="iteration", ylabel="loss", yscale="log")
    for name in toolboxes.main_results(results[-1]) if results else ():
        right.plot([entry["step"] for entry in results], [entry.get(name) for entry in results], "o-", label=name)
    right.set(xlabel=unit, ylabel="result")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    cli.save_figure(figure, path)


def report(folder: Path, config: toolboxes.Config, log_dir: str) -> None:
    """Draw a run's curves, and say what came out of it and where it is."""
    losses, results = read_log(folder)
    by_epoch = config.train_cfg.get("by_epoch", config.train_cfg.get("type") == "EpochBasedTrainLoop")
    draw_curves(folder / "curves.png", losses, results, "epoch" if by_epoch else "iteration")
    if results:
        cli.say(toolboxes.results_line(results[-1]))
    saved = next(iter(toolboxes.checkpoints(folder)), "none")
    cli.say(f"checkpoint: {saved}; log: {log_dir}; curves: {folder / 'curves.png'}")


def main() -> None:
    args = build_parser().parse_args()
    config = toolboxes.read_config(args)
    if args.amp:
        if not torch.cuda.is_available():
            raise cli.UserError("--amp needs a GPU: mmengine's mixed precision does not run on a CPU")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise cli.UserError(
                "--auto-scale-lr: the config does not tell the batch of its learning rate (auto_scale_lr)"
            )
        config.auto_scale_lr.enable = True
    last = find_run(args, config)
    config.resume = last is not None
    if last:
        config.load_from = str(last)
        toolboxes.forget_pretrained(config)

    runner = toolboxes.build_runner(config, ("train", "val"))
    folder = Path(config.work_dir)
    if last:
        check_run(runner.model, last, config)
    else:
        if config.get("load_from"):
            check_start(runner.model, config.load_from)
        if cli.is_first():
            clear(folder, keep=Path(runner.log_dir))
    with toolboxes.damaged_files():
        runner.train()

    if cli.is_first():
        report(folder, config, runner.log_dir)
    cli.end_together()


if __name__ == "__main__":
    cli.run(main)

"""Train a detector of mmdet or a segmentor of mmseg by a config, and evaluate it.

    raftmlp train-mm detection/mask_rcnn_raftmlp_s_fpn_1x_coco --data-dir coco
    torchrun --nproc-per-node 8 -m raftmlp train-mm segmentation/fpn_raftmlp_s_40k_ade20k --amp

With --resume an interrupted run continues from its newest readable checkpoint.
"""

from pathlib import Path

from ..device import end_processes, is_first_process
from ..errors import shared_errors
from .console import say
from .mm_options import add_config_options, load_config
from .options import Parser


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG [OPTION ...]", yaml_config=False, description=__doc__)
    add_config_options(parser, "the config's, else runs/CONFIG")
    add = parser.group("run").add_argument
    add(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="FILE",
        help="continue from this checkpoint, or without a name from the newest one in the folder of the run, if any",
    )
    add("--overwrite", action="store_true", help="remove the run that is in the folder")
    add("--amp", action="store_true", help="mixed precision; needs a GPU")
    add("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch in use")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args)
    from ..mm import runs
    from ..mm.checkpoints import list_checkpoints
    from ..mm.configs import build_runner, drop_pretrained

    if args.amp:
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        config.merge_from_dict({"auto_scale_lr.enable": True})
    folder = Path(config.work_dir)
    last = runs.find_resume(folder, args.resume or ("auto" if config.get("resume") else ""), args.overwrite)
    old = [] if last else runs.find_files(folder)
    config.resume = last is not None
    if last:
        config.load_from = str(last)
        drop_pretrained(config)

    with shared_errors():
        runner = build_runner(config, ("train", "val"))
        if last:
            runs.check_resume(runner, last)
        elif config.get("load_from"):
            runs.check_start(runner.model, config.load_from)
    if is_first_process():
        runner.register_hook(runs.RemoveHook(old))
    runner.train()

    if is_first_process():
        losses, results = runs.read_log(folder)
        by_epoch = config.train_cfg.get("by_epoch", config.train_cfg.get("type") == "EpochBasedTrainLoop")
        runs.draw_curves(folder / "curves.png", losses, results, "epoch" if by_epoch else "iteration")
        saved = next(iter(list_checkpoints(folder)), "none")
        say(runs.results_line(results[-1]) if results else "not evaluated")
        say(f"checkpoint: {saved}; log: {runner.log_dir}; curves: {folder / 'curves.png'}")
    end_processes()

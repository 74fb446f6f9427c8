"""Train a detector of mmdet or a segmentor of mmseg by a config, and evaluate it.

    raftmlp train-mm detection/mask_rcnn_raftmlp_s_fpn_1x_coco --data-dir coco
    torchrun --nproc-per-node 8 -m raftmlp train-mm segmentation/fpn_raftmlp_s_40k_ade20k --amp

With --resume an interrupted run continues from its newest readable checkpoint.
"""

from pathlib import Path

from ..device import end_processes, is_first_process
from ..errors import UserError, shared_errors
from .config_files import find_config
from .console import say
from .launcher import load_package
from .mm_options import add_run_options, check_packages, config_changes
from .options import Parser


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG [OPTION ...]", yaml_config=False, description=__doc__)
    add_run_options(parser, "the config's, else runs/CONFIG")
    group = parser.group("run")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        default="",
        metavar="FILE",
        help="continue from this checkpoint, or without a name from the newest one in the folder of the run, if any",
    )
    group.add_argument("--overwrite", action="store_true", help="remove the run that is in the folder")
    group.add_argument("--amp", action="store_true", help="mixed precision; needs a GPU")
    group.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate to the batch in use")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    path = find_config(args.config, ".py")
    load_package()
    check_packages()
    import torch

    from ..mm import runs
    from ..mm.checkpoints import list_checkpoints, patch_mmengine
    from ..mm.configs import build_runner, drop_pretrained, read_config
    from ..mm.data import data_errors

    patch_mmengine()
    changes = config_changes(args.cfg_options)
    config = read_config(path, changes, args.data_dir, args.work_dir, args.launcher)
    if args.amp:
        if not torch.cuda.is_available():
            raise UserError("--amp needs a GPU: mmengine's mixed precision does not run on a CPU")
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    if args.auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise UserError("--auto-scale-lr: the config does not say the batch size of its learning rate")
        config.auto_scale_lr.enable = True
    folder = Path(config.work_dir)
    last = runs.find_resume(folder, args.resume or ("auto" if config.get("resume") else ""), args.overwrite)
    config.resume = last is not None
    if last:
        config.load_from = str(last)
        drop_pretrained(config)

    with shared_errors():
        runner = build_runner(config, ("train", "val"))
        if last:
            runs.check_resume(runner.model, last, config, runner.train_dataloader.dataset.metainfo.get("classes") or ())
        elif config.get("load_from"):
            runs.check_start(runner.model, config.load_from)
    if is_first_process() and not last:
        runs.clear_run(folder, keep=Path(runner.log_dir))
    with data_errors():
        runner.train()

    if is_first_process():
        losses, results = runs.read_log(folder)
        by_epoch = config.train_cfg.get("by_epoch", config.train_cfg.get("type") == "EpochBasedTrainLoop")
        runs.draw_curves(folder / "curves.png", losses, results, "epoch" if by_epoch else "iteration")
        if results:
            say(runs.results_line(results[-1]))
        saved = next(iter(list_checkpoints(folder)), "none")
        say(f"checkpoint: {saved}; log: {runner.log_dir}; curves: {folder / 'curves.png'}")
    end_processes()

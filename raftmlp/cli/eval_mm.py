"""Evaluate a trained detector of mmdet or segmentor of mmseg, and draw its predictions beside the truth.

    raftmlp eval-mm detection/mask_rcnn_raftmlp_digits runs/mask_rcnn_raftmlp_digits --show-dir shown
    torchrun --nproc-per-node 8 -m raftmlp eval-mm CONFIG CHECKPOINT

The results are those of the config's test_evaluator.
"""

import logging
import math
import tempfile
from pathlib import Path

from ..device import end_processes, is_first_process
from ..errors import shared_errors
from ..files import write_json
from .config_files import find_config
from .console import say
from .launcher import load_package
from .mm_options import add_checkpoint_options, add_run_options, check_packages, config_changes
from .options import PICTURES, Parser, option_type, output_file, output_folder

IN_PICTURE = 16

_logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG CHECKPOINT [OPTION ...]", yaml_config=False, description=__doc__)
    add_run_options(parser, "test in the folder of the run, if CHECKPOINT is one, else in runs/CONFIG")
    group = add_checkpoint_options(parser)
    group.add_argument("--results-file", type=output_file(".json"), metavar="FILE", help="write the results as JSON")
    group.add_argument(
        "--show-dir",
        type=option_type(output_folder),
        metavar="DIR",
        help="draw every image into this folder, truth left and predictions right",
    )
    group.add_argument(
        "--picture",
        type=output_file(*PICTURES),
        metavar="FILE",
        help=f"draw the first {IN_PICTURE} images (of the first process) in the same way into one picture",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    path = find_config(args.config, ".py")
    load_package()
    check_packages()
    from ..mm.checkpoints import find_checkpoint, load_weights, patch_mmengine, trained_classes
    from ..mm.coco import listed
    from ..mm.configs import build_runner, drop_pretrained, read_config
    from ..mm.data import data_errors
    from ..mm.predictions import DrawHook, ProgressHook, draw_overview
    from ..mm.runs import results_line

    patch_mmengine()
    changes = config_changes(args.cfg_options)
    config = read_config(path, changes, args.data_dir, args.work_dir, args.launcher)
    checkpoint = find_checkpoint(args.checkpoint)
    config.load_from, config.resume = None, False
    drop_pretrained(config)
    if not args.work_dir:  # a folder of its own: the run's copy of its config stays
        config.work_dir = str(Path(args.checkpoint if Path(args.checkpoint).is_dir() else config.work_dir) / "test")
    with shared_errors():
        runner = build_runner(config, ("test",))
        trained = trained_classes(load_weights(runner.model, checkpoint))
    classes = list(runner.test_dataloader.dataset.metainfo.get("classes") or ())
    if trained and trained != classes:
        _logger.warning(f"{checkpoint} was trained on the classes {listed(trained)}, the config has {listed(classes)}")
    runner.register_hook(ProgressHook())

    with tempfile.TemporaryDirectory() as temporary:
        limit = None if args.show_dir else IN_PICTURE
        hook = DrawHook(args.show_dir or Path(temporary), limit, args.score_thr)
        if args.show_dir or (args.picture and is_first_process()):
            runner.register_hook(hook)
        with data_errors():
            results = runner.test()
        if args.picture and is_first_process():
            draw_overview(args.picture, hook.drawn[:IN_PICTURE], f"truth and prediction; {results_line(results)}")
    say(f"{checkpoint}: {results_line(results)}")
    if args.results_file and is_first_process():
        figures = {key: None if math.isnan(value) else float(f"{value:.6g}") for key, value in results.items()}
        content = dict(config=args.config, checkpoint=str(checkpoint), **figures)
        write_json(args.results_file, content)
    for name, path in (("results", args.results_file), ("picture", args.picture), ("pictures", args.show_dir)):
        if path:
            say(f"{name}: {path}")
    end_processes()

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
from .console import say
from .mm_options import add_checkpoint_options, add_config_options, load_config
from .options import PICTURES, Parser, option_type, output_file, output_folder

IN_PICTURE = 16

_logger = logging.getLogger(__name__)


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG CHECKPOINT [OPTION ...]", yaml_config=False, description=__doc__)
    add_config_options(parser, "test in the folder of the run, if CHECKPOINT is one, else in runs/CONFIG")
    add_checkpoint_options(parser)
    add, folder = parser.group("output").add_argument, option_type(output_folder)
    add("--results-file", type=output_file(".json"), metavar="FILE", help="write the results as JSON")
    words = "draw every image into this folder, truth left and predictions right"
    add("--show-dir", type=folder, metavar="DIR", help=words)
    words = f"draw the first {IN_PICTURE} images (of the first process) in the same way into one picture"
    add("--picture", type=output_file(*PICTURES), metavar="FILE", help=words)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args)
    from ..mm.checkpoints import find_checkpoint, load_weights, trained_classes
    from ..mm.configs import build_runner, drop_pretrained
    from ..mm.data import listed
    from ..mm.predictions import DrawHook, draw_overview
    from ..mm.runs import results_line

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

    with tempfile.TemporaryDirectory() as temporary:
        hook = DrawHook(args.show_dir or Path(temporary), None if args.show_dir else IN_PICTURE, args.score_thr)
        if args.show_dir or (args.picture and is_first_process()):
            runner.register_hook(hook)
        results = runner.test()
        if args.picture and is_first_process():
            draw_overview(args.picture, hook.drawn[:IN_PICTURE], f"truth and prediction; {results_line(results)}")
    say(f"{checkpoint}: {results_line(results)}")
    if args.results_file and is_first_process():
        figures = {key: None if math.isnan(value) else float(f"{value:.6g}") for key, value in results.items()}
        write_json(args.results_file, dict(config=args.config, checkpoint=str(checkpoint), **figures))
    for name, path in (("results", args.results_file), ("picture", args.picture), ("pictures", args.show_dir)):
        if path:
            say(f"{name}: {path}")
    end_processes()

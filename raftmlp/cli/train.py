"""Train a model on a data set of images, on one device or many.

    raftmlp train -c digits/raftmlp_digits
    raftmlp train -c imagenet/raftmlp_s --data-dir imagenet
    raftmlp train -c finetune/cifar10 --checkpoint raftmlp_s.safetensors --data-dir cifar10
    torchrun --nproc-per-node 8 -m raftmlp train -c imagenet/raftmlp_s --data-dir imagenet

Writes into the output folder: last.pth.tar, previous.pth.tar and model_best.pth.tar (weights, averaged weights,
optimizer), log.csv (a row an epoch), curves.png, args.yaml, and summary.json at the end. An interrupted run is resumed
with --resume, and ends with the same numbers.
"""

import signal

from ..device import StopSignals, end_processes, start_processes
from ..train.settings import TrainSettings
from .console import command_line
from .options import Parser


def build_parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_settings(TrainSettings)
    group = parser.group("run")
    group.add_argument("--overwrite", action="store_true", help="remove a run that is in the folder already")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="resume from this checkpoint; without FILE, or with 'auto', from the last complete one in the folder, if "
        "there is one",
    )
    return parser


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.epochs != parser.get_default("epochs") and args.warmup_epochs == parser.get_default("warmup_epochs"):
        if args.epochs <= (args.warmup_epochs or 0):  # a recipe's warm-up, for more epochs than are asked for
            args.warmup_epochs = None
    settings = TrainSettings.select(vars(args))
    parser.load_and_check(args)
    from ..train.trainer import Trainer

    trainer = Trainer.from_settings(settings, start_processes(settings.device), command_line(), args.resume)
    summary = trainer.fit(args.resume, args.overwrite)
    with StopSignals():  # a launcher may send its signal once more
        end_processes()
    return 0 if summary or trainer.stop.number != signal.SIGINT else 130

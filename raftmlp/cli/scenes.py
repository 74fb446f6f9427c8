"""Write scenes of handwritten digits on photographs, for mmdet (COCO) and mmseg (label maps).

    raftmlp scenes runs/scenes --train 4000 --val 200

Nothing is downloaded: digits and photographs come with scikit-learn and scikit-image.
"""

from ..settings import between
from .console import say
from .launcher import load_package
from .options import Parser, option_type


def build_parser() -> Parser:
    parser = Parser("%(prog)s OUT [OPTION ...]", yaml_config=False, description=__doc__)
    parser.add_argument("out", metavar="OUT", help="the folder; it must not hold anything else")
    for name, minimum, default, text in (
        ("--train", 1, 400, "scenes to train on"),
        ("--val", 1, 100, "scenes to evaluate on"),
        ("--size", 32, 256, "height and width in pixels"),
        ("--seed", 0, 0, "random seed: another one makes other scenes"),
    ):
        parser.add_argument(name, type=option_type(between(minimum)), default=default, metavar="N", help=text)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    load_package()
    from ..data.scenes import write_scenes

    is_new = write_scenes(args.out, args.train, args.val, args.size, args.seed)
    say(f"{args.train} + {args.val} scenes {'are' if is_new else 'were already'} in {args.out}")

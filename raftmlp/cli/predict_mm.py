"""Find objects in images with a detector of mmdet, or segment them with a segmentor of mmseg.

    raftmlp predict-mm CONFIG CHECKPOINT photo.jpg photos/ --out predictions

Each image is drawn with its boxes and masks, or its classes. Detections also go into predictions.json, and the class of
each pixel into PNG files, numbered as the classes in it. An image that cannot be read is named and left out; the exit
status is then 2.
"""

import sys

from tqdm import tqdm

from ..config import DeviceSettings
from ..data.find import find_images
from ..errors import UserError
from ..files import write_json
from .console import say
from .mm_options import add_checkpoint_options, add_config_options, load_config
from .options import Parser, option_type, output_folder


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG CHECKPOINT IMAGE ... [OPTION ...]", yaml_config=False, description=__doc__)
    add_config_options(parser)
    add_checkpoint_options(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder (all below it) or a pattern")
    parser.add_settings(DeviceSettings, leave_out=("amp", "amp_dtype", "channels_last", "compile"))
    add, folder = parser.group("output").add_argument, option_type(output_folder)
    add("--out", type=folder, default="predictions", metavar="DIR", help="folder to write into")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    config = load_config(args)
    from ..device import find_device
    from ..mm.checkpoints import find_checkpoint
    from ..mm.predictions import Predictor

    files = find_images(args.images)
    predictor = Predictor(config, find_checkpoint(args.checkpoint), find_device(args.device))
    entries = []
    for number, file in enumerate(tqdm(files, desc="predicting", unit=" images", disable=len(files) == 1 or None)):
        try:
            sample = predictor(file)
        except UserError as error:
            tqdm.write(str(error), file=sys.stderr)
            continue
        entry, words = predictor.write(sample, args.out / f"{number:05}_{file.stem}", args.score_thr)
        say(f"{file}: {words}")
        entries.append(dict(file=str(file), **entry))
    write_json(args.out / "predictions.json", dict(classes=predictor.classes, images=entries))
    say(f"pictures and predictions.json: {args.out}")
    if len(entries) < len(files):
        raise UserError(f"{len(files) - len(entries)} of {len(files)} images could not be read")

"""Find objects in images with a detector of mmdet, or segment them with a segmentor of mmseg.

    raftmlp predict-mm CONFIG CHECKPOINT photo.jpg photos/ --out predictions

Each image is drawn with its boxes and masks, or its classes. Detections also go into predictions.json, and the class of
each pixel into PNG files, numbered as the classes in it. An image that cannot be read is named and left out; the exit
status is then 2.
"""

import sys

from PIL import Image
from tqdm import tqdm

from ..config import DeviceSettings
from ..data.find import find_images
from ..errors import UserError
from ..files import write_json
from .config_files import find_config
from .console import say
from .launcher import load_package
from .mm_options import add_checkpoint_options, add_config_options, check_packages, config_changes
from .options import Parser, option_type, output_folder


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG CHECKPOINT IMAGE ... [OPTION ...]", yaml_config=False, description=__doc__)
    add_config_options(parser)
    output = add_checkpoint_options(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder (all below it) or a pattern")
    parser.add_settings(DeviceSettings, leave_out=("amp", "amp_dtype", "channels_last", "compile"))
    output.add_argument(
        "--out", type=option_type(output_folder), default="predictions", metavar="DIR", help="folder to write into"
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    path = find_config(args.config, ".py")
    load_package()
    check_packages()
    from ..device import find_device
    from ..mm.checkpoints import find_checkpoint, patch_mmengine
    from ..mm.configs import read_config
    from ..mm.predictions import Predictor, draw, label_map, objects

    patch_mmengine()
    config = read_config(path, config_changes(args.cfg_options))
    files = find_images(args.images)
    device = find_device(args.device)
    predictor = Predictor(config, find_checkpoint(args.checkpoint), device)
    classes = predictor.classes

    entries = []
    hidden = None if len(files) > 1 else True
    for number, file in enumerate(tqdm(files, desc="predicting", unit=" images", disable=hidden)):
        try:
            sample = predictor(file)
        except UserError as error:
            tqdm.write(str(error), file=sys.stderr)
            continue
        name = f"{number:05}_{file.stem}"
        draw(predictor.visualizer, sample, args.out / f"{name}.png", args.score_thr, truth=False)
        entry = dict(file=str(file), picture=f"{name}.png")
        if "pred_instances" in sample:
            entry["objects"] = list(objects(sample, classes, args.score_thr))
            words = ", ".join(f"{o['name']} {o['score']:.2f}" for o in entry["objects"]) or "nothing found"
        else:
            labels = label_map(sample, classes)
            entry["label_map"] = f"{name}_labels.png"
            Image.fromarray(labels).save(args.out / entry["label_map"])
            words = ", ".join(classes[label] for label in sorted(set(labels.flat)))
        say(f"{file}: {words}")
        entries.append(entry)
    write_json(args.out / "predictions.json", dict(classes=classes, images=entries))
    say(f"pictures and predictions.json: {args.out}")
    if len(entries) < len(files):
        raise UserError(f"{len(files) - len(entries)} of {len(files)} images could not be read")

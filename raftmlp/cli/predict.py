"""Classify images: the most probable classes with their names, as a table, as JSON and as a picture.

    raftmlp predict digit.png --model raftmlp_digits --pretrained
    raftmlp predict photos/ 'more/*.jpg' --checkpoint runs/mine/model_best.pth.tar --topk 3 --picture out.png

Images that cannot be read are named and left out; the exit status is then 2.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from ..config import DeviceSettings, ModelSettings
from ..data.find import find_images
from ..data.settings import ImageSettings
from ..errors import UserError
from ..settings import Count, between
from ..sizes import check_memory
from .console import say
from .options import PICTURES, Parser, option_type, output_file
from .predict_onnx import report, show

MAX_IMAGES = 16  # of the picture


def build_parser() -> Parser:
    parser = Parser("%(prog)s IMAGE ... [OPTION ...]", description=__doc__)
    parser.group("images").add_argument(
        "images", nargs="*", metavar="IMAGE", help="an image, a folder (all below it) or a pattern; put these first"
    )
    parser.add_settings(ImageSettings, ModelSettings, DeviceSettings)
    group, count = parser.group("run"), option_type(Count)
    group.add_argument("-b", "--batch-size", type=count, default=32, metavar="N", help="batch size")
    workers = "processes that load images if there are several batches; 0 to load them in this one"
    jobs = dict(type=option_type(between(0)), default=min(8, os.cpu_count() or 1), metavar="N")
    group.add_argument("-j", "--workers", **jobs, help=workers)
    group, file = parser.group("output"), dict(metavar="FILE")
    group.add_argument("--topk", type=count, default=5, metavar="K", help="classes per image")
    names = "text file, one name per line (default: the model's, ImageNet's, numbers)"
    group.add_argument("--class-names", **file, help=names)
    group.add_argument("--results-file", type=output_file(".json"), **file, help="write the predictions, a .json file")
    picture = f"draw the first {MAX_IMAGES} images, as the model sees them, with their first classes"
    group.add_argument("--picture", type=output_file(*PICTURES), **file, help=picture)
    saliency = "in the picture, color what the first class depends on: where a gray square makes it less probable"
    group.add_argument("--saliency", action=argparse.BooleanOptionalAction, default=False, help=saliency)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    options = vars(args)
    if args.saliency and not args.picture:
        raise UserError("--saliency colors the picture: name its file with --picture")
    files = find_images(args.images)
    parser.load_and_check(args)
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from ..device import find_device
    from ..evaluate.evaluation import prepare_model, warn_of_random_weights
    from ..evaluate.labels import model_class_names, read_class_names
    from ..evaluate.prediction import ImageFiles, class_probabilities, draw_predictions, occlusion_map, predict

    device = find_device(args.device)
    prepared = prepare_model(ModelSettings.select(options), ImageSettings.select(options))
    warn_of_random_weights([prepared])
    model, execution = prepared.model, DeviceSettings.select(options)
    names = read_class_names(args.class_names, model.num_classes) if args.class_names else model_class_names(model)

    model = model.to(device, memory_format=execution.memory_format)
    if args.compile:
        model = torch.compile(model)
    classify = partial(class_probabilities, model=model, device=device, autocast=execution.autocast(device))
    check_memory(prepared.config["input_size"], min(args.batch_size, len(files)))
    workers = args.workers if len(files) > args.batch_size else 0
    loader = DataLoader(ImageFiles(files, prepared.config), args.batch_size, num_workers=workers)

    width = max(len(str(file)) for file in files)
    results, shown = [], []
    for result, image in predict(loader, classify, names, min(args.topk, len(names))):
        show(result, width)
        results.append(result)
        if args.picture and "error" not in result and len(shown) < MAX_IMAGES:
            shown.append((result, image))

    if shown:
        maps = []
        if args.saliency:
            for result, image in tqdm(shown, desc="drawing saliency", unit=" images", leave=False, disable=None):
                maps.append(occlusion_map(image, result["predictions"][0]["class"], classify, args.batch_size))
        title = f"{prepared.name}, weights: {Path(prepared.weights).name}"
        draw_predictions(args.picture, title, shown, maps, prepared.config)
        say(f"picture: {args.picture}, {len(shown)} of {len(files)} images")
    report(results, args.results_file, dict(model=prepared.name, weights=prepared.weights, settings=prepared.config))

#!/usr/bin/env python
"""Find objects in images with a detector of mmdet, or label their pixels with a segmentor of mmseg.

    python tools/predict_mm.py CONFIG CHECKPOINT photo.jpg photos/ --out predictions

Each image is drawn with its boxes and masks, or its label map. Detections also go into predictions.json, label maps
into PNG files, numbered as the classes in it. An image that cannot be read is named and passed over; the exit status
is then 2.
"""

import json
import sys
from collections.abc import Iterator

import torch
from PIL import Image
from tqdm import tqdm

import cli
import toolboxes
from predict_onnx import find_images


def build_parser() -> cli.Parser:
    parser = cli.Parser("%(prog)s CONFIG CHECKPOINT IMAGE ... [OPTION ...]", yaml_config=False, description=__doc__)
    toolboxes.add_config_arguments(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run: its last")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="an image, a folder (all below it) or a pattern")
    group = parser.add_argument_group("run")
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out", type=cli.output_folder, default="predictions", metavar="DIR", help="folder to write into"
    )
    group.add_argument(
        "--score-thr", type=cli.number(float, 0, 1), default=0.3, metavar="P", help="tell objects from this score on"
    )
    return parser


def objects(sample: toolboxes.BaseDataElement, classes: list[str], score_thr: float) -> Iterator[dict]:
    """Yield the objects of an image, most certain first: class, score, box as left, top, right and bottom in pixels."""
    found = sample.pred_instances
    for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist()):
        if score >= score_thr:
            yield dict(name=classes[label], score=score, box=box)


def main() -> None:
    args = build_parser().parse_args()
    config = toolboxes.read_config(args)
    with cli.user_errors(ValueError):
        files = find_images(args.images)
    device = cli.find_device(args.device)
    model, classes, palette = toolboxes.load_model(config, toolboxes.find_checkpoint(args.checkpoint))
    model = model.to(device).eval()
    pipeline = toolboxes.image_pipeline(config)
    visualizer = toolboxes.build_visualizer(config, classes, palette)

    entries, unread = [], 0
    for number, file in enumerate(
        tqdm(files, desc="predicting", unit="image", disable=None if len(files) > 1 else True)
    ):
        try:
            data = pipeline(dict(img_path=str(file), img_id=0))
        except Exception as error:  # the readers of images raise anything on bytes that are no image
            tqdm.write(f"cannot read {file}: {cli.first_words(error)}", file=sys.stderr)
            unread += 1
            continue
        with torch.inference_mode():
            data = dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]])
            sample = model.test_step(data)[0].cpu()
        name = f"{number:05}_{file.stem}"
        toolboxes.draw(visualizer, sample, args.out / f"{name}.png", args.score_thr, truth=False)
        entry = dict(file=str(file), picture=f"{name}.png")
        if "pred_instances" in sample:
            entry["objects"] = list(objects(sample, classes, args.score_thr))
            told = ", ".join(f"{o['name']} {o['score']:.2f}" for o in entry["objects"]) or "nothing found"
        else:
            labels = sample.pred_sem_seg.data[0].numpy().astype("uint16" if len(classes) > 256 else "uint8")
            entry["label_map"] = f"{name}_labels.png"
            Image.fromarray(labels).save(args.out / entry["label_map"])
            told = ", ".join(classes[label] for label in sorted(set(labels.flat)))
        cli.say(f"{file}: {told}")
        entries.append(entry)
    cli.write_whole(args.out / "predictions.json", json.dumps(dict(classes=classes, images=entries), indent=2) + "\n")
    cli.say(f"pictures and predictions.json: {args.out}")
    if unread:
        raise cli.UserError(f"{unread} of {len(files)} images could not be read")


if __name__ == "__main__":
    cli.run(main)

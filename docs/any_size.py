"""The ablation of docs/any-size.md: rules for other sizes, trained grids, layouts, peers, on scenes and on shapes.

    raftmlp scenes runs/scenes --train 4000 --val 200
    python docs/any_size.py --jobs 2

Every arm is an ordinary run of `raftmlp train-mm` and three of `raftmlp eval-mm`, in a folder of its own in
runs/any-size; what is done is not run again, and an arm that was interrupted goes on. The figures go into
docs/any-size.json, the pictures beside it. `--arms NAME ...` runs some of the arms. The runs import this file, for the
transform that it registers.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import mmcv
import shapes
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS

from raftmlp.files import save_figure, write_json

RUNS, DOCS = Path("runs/any-size"), Path(__file__).parent
TABLE = DOCS / "any-size.json"
GROUP_NORM = {
    f"/model.{part}.norm_cfg.{key}": value
    for part in ("neck", "decode_head")
    for key, value in dict(type="GN", num_groups=16).items()
}
SIZES = (96, 128, 192)  # of the images in evaluation; in training they have 128 pixels
DETECTOR = dict(
    config="detection/mask_rcnn_raftmlp_digits",
    figures={"box AP": "coco/bbox_mAP", "mask AP": "coco/segm_mAP"},
    data="runs/scenes",
    several={},  # what a task changes for several sizes, beside SEVERAL_SIZES
)
TASKS = {
    "segmentation": dict(
        config="segmentation/fpn_raftmlp_digits",
        data="runs/scenes",
        options=["train_cfg.val_interval=1500"],
        figures=dict(mIoU="mIoU"),
        several={  # the schedule in images, not in updates; a batch of one is too small for BatchNorm
            "/model.data_preprocessor.size": None,
            "/model.data_preprocessor.size_divisor": 1,
            "/train_cfg.max_iters": 12000,
            "/train_cfg.val_interval": 12000,
            "/param_scheduler.1.end": 12000,
            **GROUP_NORM,
        },
    ),
    "detection": dict(DETECTOR, options=["train_cfg.max_epochs=1", "param_scheduler.1.end=1"]),
    "shapes": dict(
        DETECTOR,
        data="runs/shapes",
        options=[
            *("train_cfg.max_epochs=8", "train_cfg.val_interval=8", "param_scheduler.1.end=8"),
            *(
                f"{part}_dataloader.dataset.metainfo.classes=[{','.join(shapes.CLASSES)}]"
                for part in ("train", "val", "test")
            ),
            *(f"model.roi_head.{head}_head.num_classes={len(shapes.CLASSES)}" for head in ("bbox", "mask")),
        ],
    ),
}
# networks pretrained on the digits by the recipe of raftmlp_digits: options of `raftmlp train`
PEERS = {
    "mixer": ["--model-kwargs", "token_mixing=plain"],
    "resnet": [
        *("--model", "resnet18", "--model-kwargs", "channels=[16,32,64,128]", "--img-size", 32, "--crop-pct", 1),
        *("--mean", *[0.5] * 3, "--std", *[0.5] * 3, "--interpolation", "bilinear"),
    ],
}
# whole images one by one, each at one of these sizes, eight to an update
SEVERAL_SIZES = {
    "/train_dataloader.batch_size": 1,
    "/optim_wrapper.accumulative_counts": 8,
    "/train_dataloader.dataset.pipeline.2.type": "RandomChoiceResize",
    "/train_dataloader.dataset.pipeline.2.scales": "[(96,96),(96,96),(96,96),(128,128),(160,160),(192,192)]",
    "/train_dataloader.dataset.pipeline.2.keep_ratio": True,
    "/param_scheduler.0.end": 800,
}
RESNET = {
    "_delete_": True,
    "type": "mmseg.TIMMBackbone",
    "model_name": "resnet18",
    "channels": "[16,32,64,128]",
    "out_indices": "[1,2,3,4]",
    "pretrained_cfg_overlay.file": RUNS / "resnet" / "model_best.pth.tar",
    "pretrained_cfg_overlay.num_classes": 10,
    "/model.neck.in_channels": "[16,32,64,128]",
}
MIXER = {
    "arch._delete_": True,
    "arch.embed_dims": "[32,64,128,128]",
    "arch.depths": "[1,2,2,1]",
    "arch.token_mixing": "plain",
    "resizing": "residual",
    "img_size": 32,
    "init_cfg.checkpoint": RUNS / "mixer" / "model_best.pth.tar",
}


@dataclass
class Arm:
    """A row of the table: what it changes in a config, in its backbone or with "/" in the whole, and its evaluation."""

    changes: dict | None = None
    several_sizes: bool = False  # in training
    run: str | None = None  # the arm whose run is evaluated, in place of a run of its own
    resized: int | None = None  # the size in pixels that images are resized to before they are evaluated
    resizing: str | None = None  # the rule in evaluation, if it is another than in training


ARMS = {
    "map": Arm(dict(resizing="full")),
    "update": Arm(dict(resizing="residual")),
    "update, resized to 128": Arm(run="update", resized=128),
    "ResNet-18, a quarter as wide": Arm(RESNET),
    "ResNet-18, a quarter as wide, resized to 128": Arm(run="ResNet-18, a quarter as wide", resized=128),
    "update, several sizes": Arm(dict(resizing="residual"), several_sizes=True),
    "update, several sizes, resized to 160": Arm(run="update, several sizes", resized=160),
    "weights resampled to 128": Arm(dict(resizing="full", img_size=128)),
    "weights resampled to 128, update": Arm(run="weights resampled to 128", resizing="residual"),
    "map, first map the embedding": Arm(dict(resizing="full", first_map="embed")),
    "mixer, update": Arm(MIXER),
}


@TRANSFORMS.register_module()
class LoadCoarseImage(LoadImageFromFile):
    """Loads an image with the detail that it would have at ``size`` pixels: it is resized to it and back."""

    def __init__(self, size: int, **settings):
        super().__init__(**settings)
        self.size = size

    def transform(self, results: dict) -> dict:
        results = super().transform(results)
        image = results["img"]
        results["img"] = mmcv.imresize(mmcv.imresize(image, (self.size, self.size)), image.shape[1::-1])
        return results


def run(*command: object, log: Path) -> None:
    """Run a command of raftmlp on one thread; what it prints goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        command = [sys.executable, "-m", "raftmlp", *map(str, command)]
        path = os.pathsep.join([str(DOCS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        if subprocess.run(command, stdout=file, stderr=file, env=environment).returncode:
            raise SystemExit(f"{' '.join(command)} failed: see {log}")


def pretrain(name: str) -> None:
    """Pretrain a peer on the digits."""
    if not (RUNS / name / "summary.json").exists():
        options = ["--config", "digits/raftmlp_digits", *PEERS[name], "--output", RUNS / name, "--resume"]
        run("train", *options, log=RUNS / f"{name}.log")


def folder_of(task: str, arm: str, seed: int) -> Path:
    """Return the folder of the run that an arm evaluates."""
    name = ARMS[arm].run or arm
    return RUNS / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def options_of(task: str, arm: str, seed: int) -> list[str]:
    """Return what the run that an arm evaluates changes in its task's config, as --cfg-options."""
    settings, several = ARMS[ARMS[arm].run or arm], {**SEVERAL_SIZES, **TASKS[task]["several"]}
    changes = {**settings.changes, **(several if settings.several_sizes else {})}.items()
    changes = [f"{key[1:] if key.startswith('/') else f'model.backbone.{key}'}={value}" for key, value in changes]
    return [*TASKS[task]["options"], f"randomness.seed={seed}", *changes]


def evaluation_options(arm: str, size: int) -> list[str]:
    """Return what evaluating an arm on images of a size changes, as --cfg-options."""
    pipeline, settings = "test_dataloader.dataset.pipeline", ARMS[arm]
    options = [f"model.backbone.resizing={settings.resizing}"] if settings.resizing else []
    if not settings.resized:
        return [*options, f"{pipeline}.1.scale=({size},{size})"]
    return [
        *options,
        "custom_imports.imports=[raftmlp.mm,any_size]",
        *(f"{pipeline}.0.type=LoadCoarseImage", f"{pipeline}.0.size={size}"),
        f"{pipeline}.1.scale=({settings.resized},{settings.resized})",
    ]


def train(task: str, arm: str, seed: int) -> None:
    """Train an arm, or go on with its run."""
    settings, folder = TASKS[task], folder_of(task, arm, seed)
    options = ["--data-dir", settings["data"], "--work-dir", folder, "--resume"]
    changes = ["--cfg-options", *options_of(task, arm, seed)]
    run("train-mm", settings["config"], *options, *changes, log=folder.with_suffix(".log"))


def evaluate(task: str, arm: str, seed: int) -> dict:
    """Evaluate an arm's run on images of each size; return the figures."""
    settings, folder = TASKS[task], folder_of(task, arm, seed)
    row = dict(task=task, arm=arm, seed=seed)
    way = "-resized" if ARMS[arm].resized else f"-{ARMS[arm].resizing}" if ARMS[arm].resizing else ""
    for size in SIZES:
        results = folder / f"{size}{way}.json"
        if not results.exists():
            print(f"{task}: {arm}, seed {seed}, {size} pixels", flush=True)
            options = ["--data-dir", settings["data"], "--work-dir", folder / "test", "--results-file", results]
            changes = ["--cfg-options", *options_of(task, arm, seed), *evaluation_options(arm, size)]
            run("eval-mm", settings["config"], folder, *options, *changes, log=folder.with_suffix(".log"))
        found = json.loads(results.read_text())
        row |= {f"{name} at {size}": found[key] for name, key in settings["figures"].items()}
    return row


def run_arms(task: str, arms: list[str], seed: int) -> list[dict]:
    """Train the one run that some arms share, unless it has been evaluated, and evaluate it; return their figures."""
    if not (folder_of(task, arms[0], seed) / f"{SIZES[-1]}.json").exists():
        train(task, arms[0], seed)
    return [evaluate(task, arm, seed) for arm in arms]


def read_rows() -> list[dict]:
    """Return the figures of all arms."""
    return json.loads(TABLE.read_text())["rows"] if TABLE.exists() else []


def add_row(row: dict) -> None:
    """Add an arm's figures to the table, in the place of older ones; another call may have added others since."""
    keys = ("task", "arm", "seed")
    rows = [old for old in read_rows() if any(old[key] != row[key] for key in keys)]
    rows = [*rows, row]
    rows.sort(key=lambda row: (list(TASKS).index(row["task"]), list(ARMS).index(row["arm"]), row["seed"]))
    write_json(TABLE, dict(rows=rows), indent=1)


def draw(rows: list[dict], path: Path) -> None:
    """Draw the figures over the size of the images, a panel a figure: the mean of the seeds, and each of them.

    An arm that evaluates another's run has its color, and a dashed line.
    """
    from matplotlib.figure import Figure

    panels = [(task, name) for task, settings in TASKS.items() for name in settings["figures"]]
    panels = [(task, name) for task, name in panels if any(row["task"] == task for row in rows)]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 4 * lines + 1), layout="constrained")
    colors = {arm: f"C{number}" for number, arm in enumerate(arm for arm in ARMS if not ARMS[arm].run)}
    handles = {}
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (task, name) in zip(axes, panels):
        for arm in ARMS:
            color, style = colors[ARMS[arm].run or arm], "--" if ARMS[arm].run else "-"
            seeds = [
                [row[f"{name} at {size}"] for size in SIZES] for row in rows if (row["task"], row["arm"]) == (task, arm)
            ]
            if seeds:
                means = [sum(column) / len(seeds) for column in zip(*seeds)]
                (handles[arm],) = axis.plot(SIZES, means, color + style)
                for figures in seeds:
                    axis.plot(SIZES, figures, f"{color}.")
        axis.set(xlabel="size of the images (pixels)", ylabel=name, title=task, xticks=SIZES)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    shown = [arm for arm in ARMS if arm in handles]
    figure.legend([handles[arm] for arm in shown], shown, loc="outside lower center", ncols=columns)
    save_figure(figure, path)


def draw_scenes(arms: list[str], path: Path) -> None:
    """Draw held-out scenes, and below them what the segmentors of some arms find in them."""
    from matplotlib.figure import Figure
    from PIL import Image

    scenes = [Path(f"runs/scenes/images/validation/{number:05}.jpg") for number in range(5)]
    rows = {"scene": scenes}
    for arm in arms:
        folder, config = folder_of("segmentation", arm, 0), TASKS["segmentation"]["config"]
        options = ["--cfg-options", *options_of("segmentation", arm, 0), "--out", folder / "predictions"]
        run("predict-mm", config, folder, *scenes, *options, log=folder.with_suffix(".log"))
        rows[arm] = sorted((folder / "predictions").glob("*[0-9].png"))
    figure = Figure(figsize=(8, 1.65 * len(rows)), layout="constrained")
    for axes, (name, files) in zip(figure.subplots(len(rows), len(scenes)), rows.items()):
        axes[0].set_ylabel(name, fontsize=8)
        for axis, file in zip(axes, files):
            axis.imshow(Image.open(file))
            axis.set(xticks=[], yticks=[])
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each")
    args = parser.parse_args()
    args.arms.sort(key=list(ARMS).index)  # arms that share a run are neighbors
    for name in PEERS:
        if any(name in arm.lower() for arm in args.arms):
            pretrain(name)
    if "shapes" in args.tasks:
        shapes.write_shapes(Path("runs/shapes"))
    runs = [list(arms) for _, arms in groupby(args.arms, lambda arm: ARMS[arm].run or arm)]
    jobs = [(task, arms, seed) for seed in args.seeds for task in args.tasks for arms in runs]
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in chain.from_iterable(pool.map(lambda job: run_arms(*job), jobs)):
            add_row(row)
            print(row, flush=True)
    draw(read_rows(), DOCS / "any-size.png")
    drawn = ["map", "update", "ResNet-18, a quarter as wide"]
    if all(folder_of("segmentation", arm, 0).exists() for arm in drawn):
        draw_scenes(drawn, DOCS / "any-size-scenes.jpg")


if __name__ == "__main__":
    main()

"""A set that no network here was pretrained on, in COCO's format: colored circles, squares and triangles.

    python docs/shapes.py  # runs/shapes: 300 images to train on, 100 held out

The folder is laid out as a folder of scenes is, so that the configs take it as another data_root.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from raftmlp.files import new_folder

CLASSES = ("circle", "square", "triangle")
CORNERS = (40, 4, 3)  # of their outlines
SIZE = 128  # of the images in pixels


def outline(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Return the outline of a shape inside the image, points (N, 2) in pixels, at a random size, angle and place."""
    radius = rng.uniform(9, 24)
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(CORNERS[kind]) / CORNERS[kind]
    return rng.uniform(radius, SIZE - 1 - radius, 2) + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def paint(rng: np.random.Generator) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """Return an image, and the class and outline of each of its one to four shapes, which do not touch."""
    ground = rng.uniform(0, 255, (2, 2, 3)).astype(np.uint8)  # a color to each corner
    image = Image.fromarray(ground).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    taken, shapes = Image.new("1", (SIZE, SIZE)), []
    for kind in rng.integers(3, size=rng.integers(1, 5)):
        points = outline(kind, rng)
        mask = Image.new("1", (SIZE, SIZE))
        ImageDraw.Draw(mask).polygon([tuple(p) for p in points], fill=1)
        if (np.asarray(mask) & np.asarray(taken)).any():
            continue
        taken.paste(1, mask=mask)
        image.paste(tuple(rng.integers(256, size=3).tolist()), mask=mask)
        shapes.append((int(kind), points))
    noisy = np.asarray(image) + rng.normal(0, 8, (SIZE, SIZE, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), shapes


def write_shapes(root: Path, train: int = 300, val: int = 100) -> None:
    """Write the set, complete or not at all, unless the folder is there; it is a function of the numbers alone."""
    if root.exists():
        return
    with new_folder(root) as folder:
        for seed, (split, count) in enumerate((("training", train), ("validation", val))):
            images, annotations = [], []
            (folder / "images" / split).mkdir(parents=True)
            for i in range(count):
                image, shapes = paint(np.random.default_rng([seed, i]))
                image.save(folder / "images" / split / f"{i:05}.jpg", quality=90)
                images.append(dict(id=i, file_name=f"{i:05}.jpg", height=SIZE, width=SIZE))
                for kind, points in shapes:
                    (left, top), (right, bottom) = points.min(0), points.max(0)
                    box = [left, top, right - left, bottom - top]
                    x, y = points.T
                    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
                    about = dict(id=len(annotations) + 1, image_id=i, category_id=kind + 1, iscrowd=0)
                    annotations.append(
                        dict(about, bbox=box, area=area, segmentation=[points.flatten().round(2).tolist()])
                    )
            content = dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
            )
            (folder / "annotations").mkdir(exist_ok=True)
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


if __name__ == "__main__":
    write_shapes(Path("runs/shapes"))

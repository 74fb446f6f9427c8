"""Pixels of every mode as 8 bits a channel, upright, the same in training, evaluation and prediction."""

import io
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, default_collate

from raftmlp.checkpoints.description import EXIF_NOTES, check_description
from raftmlp.data import create_dataset
from raftmlp.data.images import UNREADABLE, ImageSettings, data_config, evaluation_loader, open_image
from raftmlp.data.pixels import PixelReader, _say_once
from raftmlp.data.training import TrainingDataSettings, TrainingLoader
from raftmlp.data.updates import BatchSplit, Updates
from raftmlp.evaluate.prediction import ImageFiles, predict

CPU = torch.device("cpu")
GRAY = np.array([[0, 127, 255]], dtype=np.uint8)  # a bright and a dark pixel, and one between
CONFIG = dict(
    input_size=(3, 1, 3), interpolation="nearest", crop_pct=1, crop_mode="center", mean=(0,) * 3, std=(1,) * 3
)


def wide(kind):
    """Return the gray pixels with 16 bits."""
    return (GRAY.astype(np.int64) * 257).astype(kind)


def with_alpha(mode, alpha):
    """Return the gray pixels with an alpha of its own each."""
    image = Image.fromarray(GRAY).convert(mode[:-1]).convert(mode)
    image.putalpha(Image.fromarray(np.array([alpha], dtype=np.uint8)))
    return image


def with_key(image, key):
    """Return an image as read from a PNG file whose pixels of one value are transparent."""
    file = io.BytesIO()
    image.save(file, "png", transparency=key)
    return Image.open(file)


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.fromarray(wide("<u2")), [0, 127, 255]),
        (Image.fromarray(wide(">u2")), [0, 127, 255]),
        (Image.fromarray(wide("i4")), [0, 127, 255]),
        (Image.fromarray(GRAY.astype("i4")), [0, 127, 255]),
        (Image.fromarray(np.array([[128, 129, 65535]], "<u2")), [0, 1, 255]),
        (Image.fromarray(GRAY), [0, 127, 255]),
        (with_alpha("LA", (0, 255, 0)), [255, 127, 255]),
        (with_alpha("RGBA", (51, 255, 255)), [204, 127, 255]),
        (with_alpha("PA", (0, 255, 255)), [255, 127, 255]),
        (with_key(Image.fromarray(GRAY).convert("P"), 0), [255, 127, 255]),
        (with_key(Image.fromarray(wide("<u2")), 127 * 257), [0, 255, 255]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes(image, expected):
    for channels, mode in ((1, "L"), (3, "RGB")):
        read = PixelReader(channels)(image)
        assert read.mode == mode
        assert np.asarray(read).reshape(3, channels).tolist() == [[value] * channels for value in expected]


def test_what_cannot_be_read():
    for pixels in (np.int32([[-1, 9]]), np.int32([[70000, 9]]), np.float32([[0.5, 0.1]])):
        with pytest.raises(ValueError, match="neither whole numbers of 8 nor of 16 bits"):
            PixelReader(3)(Image.fromarray(pixels))
    with pytest.raises(ValueError, match="unknown color specifier: 'whiet'"):
        PixelReader(3, "whiet")


# EXIF orientation

CORNERS = np.array([[10, 200, 90], [40, 130, 250]], dtype=np.uint8).repeat(16, 0).repeat(16, 1)
STORED = {  # how an upright image is stored for each orientation
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
    5: np.transpose, 6: np.rot90, 7: lambda x: np.rot90(x, 2).T, 8: lambda x: np.rot90(x, -1),
}  # fmt: skip


def save_turned(path, orientation, kind="u1"):
    """Write the corners so that they are upright with this EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    pixels = STORED[orientation](CORNERS).astype(kind) * (257 if kind == "u2" else 1)
    options = dict(compression="tiff_lzw") if path.suffix == ".tif" else {}  # Pillow reads others wrongly
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("suffix, kind", [("jpg", "u1"), ("png", "u2"), ("webp", "u1"), ("tif", "u1")])
def test_images_are_turned_as_exif_says(suffix, kind, tmp_path):
    for orientation in range(1, 9):
        read = np.asarray(open_image(save_turned(tmp_path / f"1.{suffix}", orientation, kind), PixelReader(1)))
        assert read.shape == CORNERS.shape
        assert np.abs(read[8::16, 8::16].astype(int) - CORNERS[8::16, 8::16]).max() < 12  # JPEG and WebP change pixels


def test_damaged_exif_data_say_nothing(tmp_path):
    for data in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\xff" * 40, b"Exif\0\0II*\0" + b"\x12\1" * 30):
        Image.fromarray(CORNERS).save(tmp_path / "1.jpg", exif=b"Exif\0\0" + data)
        for exif in (True, False):
            assert open_image(tmp_path / "1.jpg", PixelReader(1, exif=exif)).size == CORNERS.shape[::-1]


def test_what_weights_say_of_exif_and_what_options_say():
    model = timm.create_model("raftmlp_digits")
    assert data_config(ImageSettings(), model)["exif"] is True
    for given, expected in ((None, False), (("of timm",), False), ((EXIF_NOTES[True],), True)):
        cfg = dict(mean=(0.5,) * 3) | (dict(notes=given) if given else {})
        model.pretrained_cfg = check_description(dict(pretrained_cfg=cfg), "file")["pretrained_cfg"]
        assert data_config(ImageSettings(), model)["exif"] is expected
        for option in (True, False):
            assert data_config(ImageSettings(exif=option), model)["exif"] is option


# Everywhere


def read_everywhere(root, config, files):
    """Yield what training, evaluation and prediction read of the files in root/val: the source, and images."""
    with tarfile.open(root / "images.tar", "w") as tar:
        tar.add(root / "val", arcname=".")
    with tarfile.open(root / "shard.tar", "w") as tar:
        for i, file in enumerate(files):
            tar.add(file, arcname=f"{i}.png")
            label = tarfile.TarInfo(f"{i}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
    sources = {
        "folder": create_dataset("", str(root), "val"),
        "tar": create_dataset("", str(root / "images.tar"), "train"),
        "torchvision": create_dataset("torch/folder", str(root), "val"),
        "stream": create_dataset("wds/", str(root), "shard.tar|2"),
    }
    for name, dataset in sources.items():
        workers = 1 if name == "folder" else 0
        yield name, next(iter(evaluation_loader(dataset, config, CPU, 2, workers)))[0]
    updates, to_tensor = (
        Updates(2, [config["input_size"][1:]], [BatchSplit(2)]),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    )
    for name in ("folder", "stream"):
        settings = TrainingDataSettings(workers=1)
        loader = TrainingLoader(sources[name], [to_tensor], config, CPU, updates, settings, 0, root / "bad")
        images, _ = next(loader.epoch(0))
        loader.end_workers()
        yield f"training on a {name}", images[images.mean((1, 2, 3)).argsort(stable=True)]
    loader = DataLoader(ImageFiles(files, config), 2, collate_fn=default_collate)
    shown = predict(loader, lambda x: torch.ones(len(x), 1), ["a"], 1)
    yield "prediction", torch.stack([image for _, image in shown])


def test_the_same_pixels_everywhere(tmp_path, caplog):
    """Images of 16 bits and with transparency; the processes that load images share what they saw."""
    _say_once.cache_clear()
    (tmp_path / "val" / "a").mkdir(parents=True)
    files = [tmp_path / f"val/a/{i}.png" for i in range(2)]
    Image.fromarray(wide("<u2")).save(files[0])
    with_alpha("RGBA", (255, 255, 255)).save(files[1])
    list(evaluation_loader(create_dataset("", str(tmp_path), "val"), CONFIG, CPU, 2))
    assert not [record for record in caplog.records if record.name.startswith("raftmlp")]  # opaque: no note
    with_alpha("RGBA", (0, 255, 255)).save(files[1])
    expected = [[[0, 127, 255]] * 3, [[255, 127, 255], [0, 127, 255], [0, 127, 255]]]
    for name, images in read_everywhere(tmp_path, {**CONFIG, "background": "#ff0000"}, files):
        assert (images[:, :, 0] * 255).round().int().tolist() == expected, name
    (note,) = (record.getMessage() for record in caplog.records if record.name.startswith("raftmlp"))
    assert "transparency: #ff0000" in note
    Image.fromarray(np.float32(GRAY)).save(tmp_path / "val/a/2.tif")  # of no known range
    _, target = next(iter(evaluation_loader(create_dataset("", str(tmp_path), "val"), CONFIG, CPU, 3)))
    assert target.tolist() == [0, 0, UNREADABLE]


@pytest.mark.parametrize("applied", [True, False])
def test_one_orientation_everywhere(applied, tmp_path, caplog):
    _say_once.cache_clear()
    files = [tmp_path / "val" / name / "1.png" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir(parents=True)
        save_turned(file, 6)
    upright = CORNERS if applied else STORED[6](CORNERS)
    config = {**CONFIG, "input_size": (3, *upright.shape), "exif": applied}
    for name, images in read_everywhere(tmp_path, config, files):
        assert ((images[:, 0] * 255).round().numpy() == upright).all(), name
    assert ("--exif" in caplog.text) != applied

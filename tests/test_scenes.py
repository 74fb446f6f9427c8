"""The embedded scenes: the same by seed, in COCO's and ADE's formats, nothing shared between the splits."""

import json

import numpy as np
import pytest
from PIL import Image

from raftmlp.cli import scenes as command
from raftmlp.data import scenes
from raftmlp.data.scenes import SceneMaker, write_scenes

SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    assert write_scenes(root, train=6, val=4, size=SIZE)
    return root


def decode(run_lengths):
    values = np.arange(len(run_lengths["counts"])) % 2
    return np.repeat(values, run_lengths["counts"]).reshape(run_lengths["size"], order="F").astype(bool)


@pytest.mark.parametrize("split, number", [("training", 6), ("validation", 4)])
def test_the_files_agree(folder, split, number):
    content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    assert len(content["images"]) == number
    assert [c["name"] for c in content["categories"]] == list("0123456789")
    for image in content["images"]:
        pixels = Image.open(folder / "images" / split / image["file_name"])
        assert pixels.mode == "RGB" and pixels.size == (SIZE, SIZE) == (image["width"], image["height"])
        labels = np.zeros((SIZE, SIZE), np.uint8)
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        assert 1 <= len(annotations) <= 6
        for annotation in annotations:
            mask = decode(annotation["segmentation"])
            left, top, width, height = annotation["bbox"]
            assert mask.sum() == mask[top : top + height, left : left + width].sum() == annotation["area"] > 0
            assert mask[top].any() and mask[top + height - 1].any()
            assert mask[:, left].any() and mask[:, left + width - 1].any()
            assert not labels[mask].any()  # visible parts do not overlap
            labels[mask] = annotation["category_id"]
        path = folder / "annotations" / split / image["file_name"].replace(".jpg", ".png")
        np.testing.assert_array_equal(np.asarray(Image.open(path)), labels)


def test_a_scene_depends_on_seed_split_and_number_alone():
    maker = SceneMaker("training", SIZE, seed=3)
    maker.make(0)
    again, other_seed, other_split = (SceneMaker(*a).make(5) for a in (
        ("training", SIZE, 3), ("training", SIZE, 4), ("validation", SIZE, 3)))  # fmt: skip
    scene = maker.make(5)
    np.testing.assert_array_equal(scene.image, again.image)
    np.testing.assert_array_equal(scene.masks, again.masks)
    assert scene.digits == again.digits
    assert not np.array_equal(scene.image, other_seed.image)
    assert not np.array_equal(scene.image, other_split.image)


def test_the_command(run_command, tmp_path, folder):
    out = tmp_path / "new" / "scenes"
    options = [out, "--train", 2, "--val", 1, "--size", SIZE]
    status, text, _ = run_command(command, *options)
    assert status == 0 and f"2 + 1 scenes are in {out}" in text
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    assert Image.open(out / "contact_sheet.png").size == (6 * 2 * SIZE, 2 * SIZE)
    same = (folder / "images/training/00001.jpg").read_bytes()  # of another number of scenes
    assert (out / "images/training/00001.jpg").read_bytes() == same
    before = (out / "scenes.json").stat().st_mtime_ns
    assert "were already in" in run_command(command, *options)[1]
    assert (out / "scenes.json").stat().st_mtime_ns == before


def test_a_folder_of_something_else_is_kept_and_a_failure_leaves_nothing(run_command, folder, monkeypatch, tmp_path):
    status, _, error = run_command(command, folder, "--train", "3")
    assert status == 2 and "holds something else" in error

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes, "_draw_contact_sheet", fail)
    with pytest.raises(OSError, match="No space left"):
        write_scenes(tmp_path / "scenes", 1, 1, SIZE)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert write_scenes(tmp_path / "empty", 1, 1, SIZE) and (tmp_path / "empty/scenes.json").is_file()

"""Batches to train on: their order and sizes, their random numbers, images that cannot be read, streams."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import ExifTags, Image
from torch.utils.data import IterableDataset

from helpers import TINY, TINY_MODEL, assert_same, make_image_folder
from raftmlp.checkpoints.description import EXIF_NOTES
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import predict, train, validate
from raftmlp.data import Digits
from raftmlp.data.augmentation import AugmentationSettings, training_transform
from raftmlp.data.pixels import PixelReader
from raftmlp.data.training import Batches, TrainingDataSettings, TrainingImages, TrainingLoader, check_splits
from raftmlp.data.updates import Share, Updates
from raftmlp.errors import UserError


def make_batches(images, *shares, seed=3) -> Batches:
    """Return batches of as many sizes as there are shares."""
    sizes = [(8 * i, 8 * i) for i in range(1, len(shares) + 1)]
    return Batches(images, Updates(images, sizes, shares, seed=seed), seed)


def test_batches_are_the_same_for_any_number_of_processes():
    alone = make_batches(50, Share(batch_size=4, steps=4))
    alone.start_at(epoch=2, update=1)
    together = [make_batches(50, Share(4, 2, rank, 2)) for rank in range(2)]
    for batches in together:
        batches.start_at(epoch=2, update=1)
    mixed = [batch for pair in zip(*together) for batch in pair]
    assert mixed == list(alone) and len(alone) == 8
    assert [index for batch in mixed[:4] for _, index, _ in batch] == list(alone.images_of(2, 1))
    alone.start_at(epoch=3, update=0)
    seen = [index for batch in alone for _, index, _ in batch]
    assert len(set(seen)) == len(seen) == 48


@pytest.mark.parametrize("batch_sizes", [(4, 4), (8, 2)], ids=["of as many images", "of many and few images"])
def test_updates_of_several_sizes_are_the_same_for_any_number_of_processes(batch_sizes):
    alone = make_batches(100, *(Share(2 * n) for n in batch_sizes))
    together = [make_batches(100, *(Share(n, 1, rank, 2) for n in batch_sizes)) for rank in range(2)]
    for batches in (alone, *together):
        batches.start_at(epoch=1, update=0)
    whole = list(alone)
    assert [first + second for first, second in zip(*together)] == whole
    assert len(whole) == len(alone) == alone.updates.per_epoch == 100 // (batch_sizes[0] + batch_sizes[1])
    sizes = [{size for _, _, size in batch} for batch in whole]
    assert sizes == [{alone.updates.choice(1, update)} for update in range(len(whole))]  # one size an update
    assert {0} in sizes and {1} in sizes
    for batches in (alone, *together):
        batches.start_at(epoch=1, update=5)
    assert list(alone) == whole[5:]
    assert [first + second for first, second in zip(*together)] == whole[5:]
    assert [index for _, index, _ in whole[7]] == list(alone.images_of(1, 7))


def test_an_epoch_that_needs_more_images_begins_again():
    batches = make_batches(60, Share(2), Share(10))
    epoch = next(epoch for epoch in range(9) if batches.updates.mean_images(epoch) > batches.updates.average_images)
    batches.start_at(epoch, 0)
    seen = [index for batch in batches for _, index, _ in batch]
    assert len(seen) > 60 and len(set(seen)) == 60 and seen[60:] == seen[: len(seen) - 60]


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    settings = AugmentationSettings(aa="rand-m9-n2", cutout=0.5, affine=(10, 0.1, 0.1))
    config = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    transform = training_transform(settings, config)
    images, reseeded = (
        TrainingImages(Digits("train"), [transform], PixelReader(3), seed, Path("bad"), 1) for seed in (0, 1)
    )
    first, _ = images[(0, 5, 0)]
    others = [images[(1, 5, 0)][0], images[(0, 6, 0)][0], reseeded[(0, 5, 0)][0]]
    assert torch.equal(images[(0, 5, 0)][0], first)
    assert not any(torch.equal(first, image) for image in others)


def test_every_size_has_its_transform_and_the_same_random_numbers():
    transforms = [lambda image: (8, torch.rand(3)), lambda image: (16, torch.rand(3))]
    images = TrainingImages(Digits("train"), transforms, PixelReader(3), 0, Path("bad"), 1)
    (small, numbers), _ = images[(2, 5, 0)]
    (large, same), _ = images[(2, 5, 1)]
    assert (small, large) == (8, 16) and torch.equal(numbers, same)
    assert not torch.equal(images[(3, 5, 1)][0][1], numbers)


# Through the command


@pytest.fixture
def image_folder(tmp_path):
    """A folder of bright and dark images, train/ and val/, in the working folder."""
    return make_image_folder(tmp_path / "images", train=8, val=3, suffix=".jpg")


def folder_options(images, *more) -> list:
    return [*TINY, "--data-dir", images, "--batch-size", 4, "--warmup-epochs", 0, *more]


def test_corrupt_images_are_named_and_counted(run_command, image_folder):
    intact = {path: path.read_bytes() for path in (image_folder / "train").rglob("*.jpg")}
    whole = (image_folder / "train/bright/3.jpg").read_bytes()
    (image_folder / "train/bright/3.jpg").write_bytes(whole[: len(whole) // 2])
    (image_folder / "train/dark/0.jpg").write_bytes(b"")
    (image_folder / "val/dark/1.jpg").write_text("no image")
    options = folder_options(image_folder, "--workers", 2, "--epochs", 2, "--output", "out")
    status, out, err = run_command(train, *options)
    assert status == 0, err
    assert out.count("cannot read") == 2
    assert "train/bright/3.jpg: image file is truncated" in out and "train/dark/0.jpg: cannot identify" in out
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["bad_images"] == 2
    assert (summary["last"]["eval_images"], summary["last"]["eval_unread"]) == (5, 1)
    assert {line.split("\t")[0] for line in Path("out/bad_images.txt").read_text().splitlines()} == {
        str(image_folder / "train/bright/3.jpg"), str(image_folder / "train/dark/0.jpg"),
    }  # fmt: skip

    status, _, err = run_command(train, *options, "--overwrite", "--max-bad-images", 1)
    assert status == 2
    assert "2 images could not be read, more than --max-bad-images 1" in err and "out/bad_images.txt names them" in err
    for path in intact:
        path.write_bytes(b"")
    status, _, err = run_command(train, *options, "--overwrite", "--max-bad-images", 3)
    assert status == 2
    assert "--max-bad-images 3" in err and "Traceback" not in err
    for path, content in intact.items():
        path.write_bytes(content)
    status, out, err = run_command(train, *options, "--max-bad-images", 0)  # what was damaged does not count any more
    assert status == 0 and "cannot read" not in out, err


def test_an_evaluation_without_a_readable_image_ends_the_run(run_command, image_folder):
    for path in (image_folder / "val").rglob("*.jpg"):
        path.write_text("no image")
    status, _, err = run_command(train, *folder_options(image_folder, "--epochs", 1, "--output", "out"))
    assert status == 2 and "none of the 6 images to evaluate on can be read" in err
    assert not Path("out/model_best.pth.tar").exists()


def test_fewer_classes_to_evaluate_on_than_to_train_on(run_command, image_folder):
    (image_folder / "train/bright").rename(image_folder / "train/zebra")  # the class that comes last, as class 1
    (image_folder / "val/bright").rename(image_folder / "val/zebra")
    for path in (image_folder / "val/dark").iterdir():
        path.unlink()
    options = folder_options(image_folder, "--epochs", 8, "--lr", 0.01, "--hflip", 0, "--output", "out")
    status, out, err = run_command(train, *options)
    assert status == 0, err
    assert "2 classes" in out and err.splitlines()[0] == (
        "note: no images to evaluate on of 1 of the 2 classes: ['dark']; the model chooses among all classes of "
        "training"
    )
    last = json.loads(Path("out/summary.json").read_text())["last"]
    assert (last["eval_images"], last["eval_top1"]) == (3, 100)  # of class 1, not of class 0
    options = ["--checkpoint", "out/last.pth.tar", "--data-dir", image_folder, "--workers", 0, "--device", "cpu"]
    status, out, err = run_command(validate, *options, "--results-file", "r.json")
    assert status == 0 and "images of 1 of the 2 classes that raftmlp_digits knows" in out, err
    row = json.loads(Path("r.json").read_text())["rows"][0]
    assert row["top1"] == 100 and row["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)

    (image_folder / "train/dark").rename(image_folder / "train/cow")
    (image_folder / "train/zebra").rename(image_folder / "train/dark")
    status, _, err = run_command(train, *folder_options(image_folder, "--output", "other"))
    assert status == 2 and "['cow', 'dark', 'zebra'] belong to one of them only" in err


@pytest.mark.parametrize("val, expected", [("ab", None), ("ba", [1, 0]), ("b", [1])])
def test_classes_to_evaluate_on_are_found_by_name(val, expected):
    data = [SimpleNamespace(classes=list(names)) for names in ("ab", val)]
    assert check_splits(*data) == expected


def test_names_that_are_no_unicode(run_command, image_folder):
    name = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (image_folder / split / "dark").rename(image_folder / split / name)
        (image_folder / split / name / "0.jpg").rename(image_folder / split / name / f"{name}.jpg")
    (image_folder / "val" / name / "1.jpg").write_bytes(b"no image")
    (image_folder / "train" / name / "1.jpg").write_bytes(b"no image")
    folder = image_folder.rename(image_folder.with_name(name))
    status, out, err = run_command(train, *folder_options(folder, "--epochs", 2, "--output", "out"))
    assert status == 0, err
    assert load_checkpoint("out/last.pth.tar")["pretrained_cfg"]["label_names"] == ["bright", "caf\\udce9"]
    assert yaml.safe_load(Path("out/args.yaml").read_text())["data_dir"] == str(folder)
    options = ["--checkpoint", "out/last.pth.tar", "--workers", 0, "--device", "cpu", "--picture", "p.png"]
    more = ["--predictions", "p.csv", "--confusion", "c.png", "--results-file", "r.json"]
    status, out, err = run_command(validate, "--data-dir", folder, *options, *more)
    assert status == 0 and "worst classes" in out, err
    assert "/caf\\udce9/val/caf\\udce9/caf\\udce9.jpg,1,caf\\udce9," in Path("p.csv").read_text(encoding="utf-8")
    status, out, err = run_command(predict, folder / "val", *options[:2], *options[-2:], "--results-file", "p.json")
    assert status == 2 and err.splitlines()[-1] == "raftmlp predict: error: 1 of 6 images could not be read"
    assert "/caf\\udce9/val/caf\\udce9/caf\\udce9.jpg  " in out.encode().decode()
    files = [entry["file"] for entry in json.loads(Path("p.json").read_text())["images"]]
    assert any(file.endswith("/caf\\udce9/caf\\udce9.jpg") for file in files)


def make_one_folder(root, kind) -> Path:
    """Write one folder of classes, or one tar, which holds all images; return what --data-dir names."""
    whole = make_image_folder(root / "whole", train=10, val=1)
    if kind == "classes":
        return whole / "train"
    shutil.rmtree(whole / "val")
    if kind == "tar":
        with tarfile.open(root / "photos.tar", "w") as tar:
            tar.add(whole / "train", arcname="photos")
    return root / "photos.tar" if kind == "tar" else whole


@pytest.mark.parametrize("kind", ["classes", "train", "tar"])
def test_one_folder_of_classes(kind, run_command, tmp_path):
    data = make_one_folder(tmp_path, kind)
    options = folder_options(data, "--sched", "constant", "--seed", 3, "--output")
    status, out, err = run_command(train, *options, "one", "--epochs", 2)
    assert status == 0 and err.count("--val-share") == 1, err
    assert "16 images to train on, 4 to evaluate on" in out
    assert yaml.safe_load(Path("one/args.yaml").read_text())["val_share"] == 0.2
    state = load_checkpoint("one/last.pth.tar")
    assert state["options"]["val_share"] == 0.2

    assert run_command(train, *options, "two", "--epochs", 1)[0] == 0
    status, _, err = run_command(train, *options, "two", "--epochs", 2, "--resume")
    assert status == 0, err
    assert_same(state["state_dict"], load_checkpoint("two/last.pth.tar")["state_dict"])
    for changed in (["--val-share", 0.3], ["--seed", 4]):
        status, _, err = run_command(train, *options, "two", "--epochs", 3, "--resume", *changed)
        assert status == 2 and "--val-share 0.2 --seed 3" in err

    options = ["--data-dir", data, "--workers", 0, "--device", "cpu", "--results-file", "r.json"]
    status, _, err = run_command(validate, *options, "--checkpoint", "one/last.pth.tar", "--predictions", "p.csv")
    assert status == 0 and "the 4 images that training held out" in err, err
    row, last = json.loads(Path("r.json").read_text())["rows"][0], state["log"][-1]
    assert row["images"] == 4 and row["loss"] == pytest.approx(last["eval_loss"], rel=1e-4)
    if kind != "train":  # weights that do not say it
        status, _, err = run_command(validate, *options, *TINY_MODEL)
        assert status == 0 and "all 20 images" in err, err


def test_a_share_of_the_training_split_is_held_out(run_command, image_folder):
    options = folder_options(image_folder, "--epochs", 1, "--val-share", 0.25, "--output", "out")
    status, out, err = run_command(train, *options, "--train-num-samples", 8)
    assert status == 0 and "note" not in err, err
    assert "8 images to train on, 4 to evaluate on" in out
    status, _, err = run_command(train, *options, "--val-split", "test", "--overwrite")
    assert status == 0 and "--val-split (needs no --val-share)" in err


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_test_split_beside_the_training_split_is_suggested(kind, run_command, image_folder):
    (image_folder / "val").rename(image_folder / "test")
    if kind == "tar":
        for split in ("train", "test"):
            with tarfile.open(image_folder / f"{split}.tar", "w") as tar:
                tar.add(image_folder / split, arcname=".")
            shutil.rmtree(image_folder / split)
    options = folder_options(image_folder, "--epochs", 1, "--output", "out")
    status, _, err = run_command(train, *options)
    assert status == 2 and "no split 'validation'" in err and "--val-split test" in err
    status, out, err = run_command(train, *options, "--val-split", "test")
    assert status == 0 and "16 images to train on, 6 to evaluate on" in out, err


def test_a_run_of_version_0_2_goes_on_without_exif(run_command, image_folder):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for path in image_folder.rglob("*.jpg"):
        with Image.open(path) as image:
            image.save(path, exif=exif)
    options = folder_options(image_folder, "--sched", "constant", "--output")
    for name, more in (("upright", []), ("lying", ["--no-exif"])):
        status, _, err = run_command(train, *options, name, "--epochs", 2, *more)
        assert status == 0, err
    upright, lying = (load_checkpoint(f"{name}/last.pth.tar") for name in ("upright", "lying"))
    assert upright["options"]["exif"] is True and lying["options"]["exif"] is False
    assert [state["pretrained_cfg"]["notes"] == (EXIF_NOTES[True],) for state in (upright, lying)] == [True, False]
    assert not torch.equal(upright["state_dict"]["head.weight"], lying["state_dict"]["head.weight"])

    assert run_command(train, *options, "old", "--epochs", 1, "--no-exif")[0] == 0
    state = load_checkpoint("old/last.pth.tar")
    del state["options"]["exif"], state["pretrained_cfg"]["notes"]
    torch.save(state, "old/last.pth.tar")
    status, _, err = run_command(train, *options, "old", "--epochs", 2, "--resume")
    assert status == 0, err
    state = load_checkpoint("old/last.pth.tar")
    assert_same(state["state_dict"], lying["state_dict"])
    assert state["options"]["exif"] is False and state["pretrained_cfg"]["notes"] == (EXIF_NOTES[False],)


def test_training_on_tars_and_gray_images(run_command, image_folder):
    for split in ("train", "val"):
        with tarfile.open(f"{split}.tar", "w") as tar:
            tar.add(image_folder / split, arcname=".")
    options = [*folder_options(".", "--epochs", 1, "--in-chans", 1), "--mean", 0.5, "--std", 0.25, "--output", "out"]
    status, out, err = run_command(train, *options)
    assert status == 0, err
    assert "2 classes, 32x32: 16 images to train on, 6 to evaluate on" in out
    state = load_checkpoint("out/last.pth.tar")
    assert state["state_dict"]["stages.0.embed.convs.0.weight"].shape[1] == 1
    assert state["pretrained_cfg"]["label_names"] == ["bright", "dark"]
    assert state["pretrained_cfg"]["mean"] == (0.5,)


class ShortStream(IterableDataset):
    """A stream of two images that says it has eight."""

    def __len__(self):
        return 8

    def __iter__(self):
        yield from [(self.transform(Image.new("RGB", (8, 8))), 0)] * 2


@pytest.mark.parametrize("first_update", [0, 2])
def test_a_stream_that_ends_too_early(first_update, tmp_path):
    config, updates = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), Updates(8, [(8, 8)], [Share(2)])
    settings = TrainingDataSettings(workers=1)
    transforms = [lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8)]
    loader = TrainingLoader(
        ShortStream(), transforms, config, torch.device("cpu"), updates, settings, 0, tmp_path / "bad"
    )
    with pytest.raises(UserError, match="it has fewer images than it says"):
        list(loader.epoch(0, first_update))
    loader.end_workers()


def test_training_on_webdataset_shards(run_command, image_folder):
    import webdataset

    for split in ("train", "val"):
        with webdataset.TarWriter(f"set-{split}-0.tar") as shard:
            for number, path in enumerate(sorted((image_folder / split).rglob("*.jpg"))):
                label = int(path.parent.name == "dark")
                shard.write({"__key__": f"{number:03}", "jpg": path.read_bytes(), "cls": label})
    splits = ["--train-split", "set-train-0.tar|16", "--val-split", "set-val-0.tar|6", "--num-classes", 2]
    options = folder_options(".", "--dataset", "wds/", *splits, "--epochs", 2, "--drop-path", 0.2)
    options += ["--sched", "constant", "--output"]
    status, out, err = run_command(train, *options, "one")
    assert status == 0, err
    assert "16 images to train on, 6 to evaluate on" in out
    status, _, err = run_command(train, *options, "two", "--epochs", 1)
    assert status == 0, err
    status, _, err = run_command(train, *options, "two", "--resume")
    assert status == 0, err
    one, two = (load_checkpoint(f"{name}/last.pth.tar")["state_dict"] for name in ("one", "two"))
    assert_same(one, two)
    status, _, err = run_command(train, *options, "three", "--train-img-sizes", 24, 32)
    assert status == 2 and "--train-img-sizes takes one size for a stream" in err

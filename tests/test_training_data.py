"""What is trained on: updates and their sizes, order, random numbers, images that cannot be read, streams."""

import json
import os
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
from raftmlp.data.updates import BatchSplit, SizeSettings, Updates, share_batches
from raftmlp.errors import MissingPackageError, UserError

SIZES = [(24, 24), (32, 32), (40, 48)]


# Updates


def test_the_global_batch_is_kept():
    for batch_size, total, processes, expected in (
        (128, None, 2, (128, 1)),
        (128, 2048, 8, (128, 2)),
        (100, 2048, 8, (64, 4)),
        (10**11, None, 1, (10**11, 1)),
    ):
        share = share_batches(batch_size, total, world_size=processes)
        assert (share.batch_size, share.steps) == expected
        assert share.images == (total or batch_size * processes)
    with pytest.raises(UserError, match="2048 cannot be shared among 3 processes"):
        share_batches(128, 2048, world_size=3)


def make_updates(images=400, batch_sizes=(4, 4, 4), **given) -> Updates:
    return Updates(images, SIZES, [BatchSplit(n) for n in batch_sizes], **given)


def choices(updates: Updates, epoch: int) -> list[int]:
    return [updates.choice(epoch, update) for update in range(updates.per_epoch)]


def test_the_size_of_an_update_is_a_function_of_seed_epoch_and_update():
    one, other = make_updates(seed=3), make_updates(seed=3)
    drawn = choices(one, epoch=2)
    assert len(drawn) == 100 and set(drawn) == {0, 1, 2}
    assert other.choice(2, 57) == drawn[57]  # asked for it alone
    choices(other, epoch=5)
    assert choices(other, epoch=2) == drawn  # whatever was asked before
    assert choices(make_updates(seed=4), epoch=2) != drawn != choices(one, epoch=3)
    halves = Updates(400, SIZES, [BatchSplit(2, rank=1, world_size=2)] * 3, seed=3)  # the second of two processes
    assert choices(halves, epoch=2) == drawn


def test_sizes_come_as_probabilities_and_schedule_say():
    counts = make_updates(images=8000, probs=(3, 0, 1)).counts(epoch=0)
    assert list(counts) == ["24", "32", "40x48"] and sum(counts.values()) == 2000
    assert counts["32"] == 0 and counts["24"] / 2000 == pytest.approx(0.75, abs=0.05)
    updates = make_updates(images=4000, schedule="progressive", epochs=5)
    most = [max(counts, key=counts.get) for counts in map(updates.counts, range(5))]
    assert (most[0], most[2], most[4]) == ("24", "32", "40x48") and updates.counts(0)["40x48"] > 0


def test_every_epoch_has_as_many_updates_where_their_images_change():
    updates = make_updates(images=1000, batch_sizes=(40, 20, 10), probs=(1, 2, 1))
    assert updates.average_images == pytest.approx(22.5) and updates.per_epoch == 44
    drawn = choices(updates, 1)
    assert updates.mean_images(1) == pytest.approx(sum((40, 20, 10)[choice] for choice in drawn) / 44)
    assert [updates.share(1, i).batch_size for i in range(44)] == [(40, 20, 10)[choice] for choice in drawn]


def test_one_size_needs_no_schedule(monkeypatch):
    monkeypatch.delattr("timm.data.ScheduledBatchSampler")  # as in an older timm
    updates = Updates(10, SIZES[:1], [BatchSplit(3)])
    assert (updates.per_epoch, choices(updates, 1), updates.mean_images(1)) == (3, [0, 0, 0], 3)
    with pytest.raises(MissingPackageError, match="--train-img-sizes needs a newer timm"):
        choices(make_updates(), 0)


def test_size_settings_that_cannot_be():
    sizes = dict(train_img_sizes=(24, "32x32", "40x48"))
    assert SizeSettings(**sizes).train_img_sizes == ["24", "32", "40x48"]
    for given, message in (
        (dict(train_img_sizes=[24, 32, "24x24"]), "must differ"),
        (dict(train_batch_sizes=[8]), "not 1: 8"),
        (dict(train_size_probs=[0, 0.0, 0]), "above 0"),
        (dict(train_img_sizes=[24], train_size_schedule="progressive"), "two --train-img-sizes"),
    ):
        with pytest.raises(UserError, match=message):
            SizeSettings(**sizes | given)


# Batches


def make_batches(images, *shares, seed=3) -> Batches:
    """Return batches of as many sizes as there are shares."""
    sizes = [(8 * i, 8 * i) for i in range(1, len(shares) + 1)]
    return Batches(images, Updates(images, sizes, shares, seed=seed), seed)


def test_batches_are_the_same_for_any_number_of_processes():
    alone = make_batches(50, BatchSplit(batch_size=4, steps=4))
    alone.start_at(epoch=2, update=1)
    together = [make_batches(50, BatchSplit(4, 2, rank, 2)) for rank in range(2)]
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
    alone = make_batches(100, *(BatchSplit(2 * n) for n in batch_sizes))
    together = [make_batches(100, *(BatchSplit(n, 1, rank, 2) for n in batch_sizes)) for rank in range(2)]
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
    batches = make_batches(60, BatchSplit(2), BatchSplit(10))
    epoch = next(epoch for epoch in range(9) if batches.updates.mean_images(epoch) > batches.updates.average_images)
    batches.start_at(epoch, 0)
    seen = [index for batch in batches for _, index, _ in batch]
    assert len(seen) > 60 and len(set(seen)) == 60 and seen[60:] == seen[: len(seen) - 60]


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    settings = AugmentationSettings(aa="rand-m9-n2", cutout=0.5, affine=(10, 0.1, 0.1))
    config = dict(input_size=(3, 32, 32), interpolation="bilinear", crop_pct=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
    transforms = [training_transform(settings, config), lambda image: torch.rand(3), lambda image: torch.rand(3)]
    images, reseeded = (
        TrainingImages(Digits("train"), transforms, PixelReader(3), seed, Path("bad"), 1) for seed in (0, 1)
    )
    first, _ = images[(0, 5, 0)]
    others = [images[(1, 5, 0)][0], images[(0, 6, 0)][0], reseeded[(0, 5, 0)][0]]
    assert torch.equal(images[(0, 5, 0)][0], first)
    assert not any(torch.equal(first, image) for image in others)
    assert torch.equal(images[(2, 5, 1)][0], images[(2, 5, 2)][0])  # the same numbers for every size


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
    named = {line.split("\t")[0] for line in Path("out/bad_images.txt").read_text().splitlines()}
    assert named == {str(image_folder / "train" / name) for name in ("bright/3.jpg", "dark/0.jpg")}
    status, _, err = run_command(train, *options, "--overwrite", "--max-bad-images", 1)
    assert status == 2 and "2 images could not be read, more than --max-bad-images 1" in err
    for path in intact:
        path.write_bytes(b"")
    status, _, err = run_command(train, *options, "--overwrite", "--max-bad-images", 3)
    assert status == 2 and "in a row than --max-bad-images 3" in err
    for path, content in intact.items():
        path.write_bytes(content)
    status, out, err = run_command(train, *options, "--max-bad-images", 0)  # what was damaged does not count any more
    assert status == 0 and "cannot read" not in out, err


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


def test_classes_to_evaluate_on_are_found_by_name():
    trained = SimpleNamespace(classes=["a", "b"])
    for val, expected in (("ab", None), ("ba", [1, 0]), ("b", [1])):
        assert check_splits(trained, SimpleNamespace(classes=list(val))) == expected
    with pytest.raises(UserError, match="'c'"):
        check_splits(trained, SimpleNamespace(classes=["a", "c"]))


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
    options = ["--checkpoint", "out/last.pth.tar", "--picture", "p.png", "--results-file", "p.json"]
    status, out, err = run_command(predict, folder / "val", *options)
    assert status == 2 and err.splitlines()[-1] == "raftmlp predict: error: 1 of 6 images could not be read"
    assert "/caf\\udce9/val/caf\\udce9/caf\\udce9.jpg  " in out.encode().decode()
    files = [entry["file"] for entry in json.loads(Path("p.json").read_text())["images"]]
    assert any(file.endswith("/caf\\udce9/caf\\udce9.jpg") for file in files)


def make_one_folder(root, kind) -> Path:
    """Write one folder of classes, or one tar, which holds all images; return what --data-dir names."""
    whole = make_image_folder(root / "whole", train=10, val=1) / "train"
    if kind == "tar":
        with tarfile.open(root / "photos.tar", "w") as tar:
            tar.add(whole, arcname="photos")
    return root / "photos.tar" if kind == "tar" else whole


@pytest.mark.parametrize("kind", ["classes", "tar"])
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
    status, _, err = run_command(validate, *options, *TINY_MODEL)  # weights that do not say it
    assert status == 0 and "all 20 images" in err, err


def test_parts_and_other_splits(run_command, image_folder):
    options = folder_options(image_folder, "--epochs", 1, "--output", "out")
    part = ["--val-share", 0.25, "--train-num-samples", 8]
    status, out, err = run_command(train, *options, *part)
    assert status == 0 and "8 images to train on, 4 to evaluate on" in out, err
    assert yaml.safe_load(Path("out/args.yaml").read_text())["train_num_samples"] == 8
    (image_folder / "val").rename(image_folder / "test")
    status, _, err = run_command(train, *options, "--overwrite")
    assert status == 2 and "no split 'validation'" in err and "--val-split test" in err
    status, out, err = run_command(train, *options, "--val-split", "test", "--overwrite")
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


def test_a_stream_that_ends_too_early(tmp_path):
    config, updates = dict(input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.5,) * 3), Updates(8, [(8, 8)], [BatchSplit(2)])
    settings = TrainingDataSettings(workers=1)
    transforms = [lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8)]
    loader = TrainingLoader(
        ShortStream(), transforms, config, torch.device("cpu"), updates, settings, 0, tmp_path / "bad"
    )
    for first_update in (0, 2):
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

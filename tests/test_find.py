"""Image files by name, in the package and in the script that stands alone."""

import errno
import os
import tarfile
from pathlib import Path

import pytest
import timm

import raftmlp_onnx
from raftmlp.data import class_names, create_dataset
from raftmlp.data.find import find_images
from raftmlp.data.images import check_classes
from raftmlp.errors import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of files with names of many kinds."""
    monkeypatch.chdir(tmp_path)
    for name in ("10.png", "9.JPG", ".hidden.png", "notes.txt", "x.png/keep", "deep/[er]/2.png", "deep/[er]/10.png"):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.mark.parametrize("find", [find_images, raftmlp_onnx.find_images], ids=["package", "script"])
def test_find_images(photos, find):
    top = [Path("photos/9.JPG"), Path("photos/10.png")]
    deep = [Path("photos/deep/[er]/2.png"), Path("photos/deep/[er]/10.png")]
    assert find(["photos"]) == [*top, *deep]
    assert find(["photos/*"]) == top
    assert find(["photos/**/[0-9]*.png"]) == [top[1], *deep]
    assert find(["photos/deep/[er]"]) == deep
    named = ["photos/notes.txt", "photos/10.png", "./photos", "photos/*"]
    assert find(named)[:3] == [Path("photos/notes.txt"), top[1], top[0]]


def test_the_script_finds_the_same(photos):
    """The script has a copy of the function, which must not differ."""
    names = ["photos/notes.txt", "photos/x.png", "photos", "photos/*", "photos/deep/**", "missing", "*.gif", "", None]
    refused = 0
    for name in names:
        given, outcomes = [name] if name is not None else [], []
        for find in (find_images, raftmlp_onnx.find_images):
            try:
                outcomes.append(find(given))
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        refused += isinstance(outcomes[0], str)
    assert refused == 5  # an empty folder, nothing there, no match, an empty name, no name


def test_what_is_no_image(photos):
    for names in ([], ["photos/missing.png"], ["photos/10.png", "*.jpeg"], ["photos/x.png"], [""]):
        with pytest.raises(UserError, match="no images at|name an image"):
            find_images(names)


@pytest.fixture
def odd_folders(tmp_path, monkeypatch):
    """Two images among folders that may not be read, and links that lead to themselves or to a folder above them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/cat", "photos/closed", "photos/dog", "more"):
        Path(folder).mkdir(parents=True)
    for file in ("photos/cat/1.png", "photos/closed/2.png", "more/3.png"):
        Path(file).write_text("")
    Path("photos/cat/up").symlink_to(tmp_path / "photos")
    Path("photos/cat/self").symlink_to("self")
    Path("photos/dog/linked").symlink_to(tmp_path / "more")
    scandir = os.scandir

    def refuse(path):
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)


def test_folders_that_are_passed_over_are_named(odd_folders, caplog):
    assert find_images(["photos"]) == [Path("photos/cat/1.png"), Path("photos/dog/linked/3.png")]
    (note,) = [record.getMessage() for record in caplog.records]
    assert note == (
        "note: 3 folders passed over: photos/cat/self (Too many levels of symbolic links), photos/cat/up (a link to a "
        "folder above it), photos/closed (Permission denied)"
    )


def test_classes_in_odd_folders(odd_folders, caplog):
    folder = create_dataset("", "photos", "train")
    assert class_names(folder) == ["cat", "dog"]
    assert [folder.filename(i) for i in range(len(folder))] == ["cat/1.png", "dog/linked/3.png"]
    assert "note: 3 folders passed over: " in caplog.text
    caplog.clear()
    Path("photos/cat/1.png").unlink()
    Path("more/3.png").unlink()
    with pytest.raises(UserError, match="0 images in it"):
        create_dataset("", "photos", "train")
    assert "note: 3 folders passed over: " in caplog.text


LAYOUTS = ["folder", "tar", "tar of the split", "tar with ./"]


def create_layout(kind, names, folder):
    """Return the data set of empty images of these names, in train/ or in train.tar."""
    for name in names:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    if kind != "folder":
        with tarfile.open(folder / "train.tar", "w") as tar:
            for name in names:
                prefix = {"tar of the split": "train/", "tar with ./": "./"}.get(kind, "")
                tar.add(folder / "train" / name, prefix + name)
    return create_dataset("", str(folder), "train")


@pytest.mark.parametrize("kind", LAYOUTS)
def test_classes_are_the_first_folders_and_hidden_names_are_left_out(kind, tmp_path, caplog):
    hidden = [".ipynb_checkpoints/1.png", "cat/._1.png", "dog/.thumbnails/1.png", "._2.png"]
    names = ["cat/2021/1.png", "cat/2022/2.png", "dog/1.png", "10/1.png", "9/1.png"]
    data = create_layout(kind, names + hidden, tmp_path)
    assert class_names(data) == ["9", "10", "cat", "dog"] and len(data) == 5
    labels = {Path(name).parts[-2:]: target for name, target in zip(data.filenames(), targets(data))}
    assert labels[("2021", "1.png")] == labels[("2022", "2.png")] == 2 and labels[("dog", "1.png")] == 3
    (note,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "2 of the 5 images" in note and "cat/202" in note and "'cat'" in note


def targets(data):
    return data.reader.targets if hasattr(data.reader, "targets") else [target for _, target in data.reader.samples]


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("names", [["1.png", "2.png"], ["cat/1.png", "dog/2.png", "3.png"]], ids=["flat", "stray"])
def test_images_outside_of_class_folders_are_refused(kind, names, tmp_path):
    with pytest.raises(UserError, match="images in .*train.* outside of class folders.*train.*/CLASS/IMAGE") as error:
        create_layout(kind, names, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_single_class_is_refused_in_training(kind, tmp_path):
    data = create_layout(kind, ["cat/2021/1.png", "cat/2022/2.png"], tmp_path)
    with pytest.raises(UserError, match="one class alone, 'cat'.*train.*/CLASS/IMAGE"):
        check_classes(data, timm.create_model("raftmlp_digits"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("names", [[], [".hidden/1.png"]], ids=["empty", "hidden"])
def test_data_without_an_image_are_refused(kind, names, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="0 images in it"):
        create_layout(kind, names, tmp_path)


def test_a_tar_of_tars_has_their_names_as_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "1.png").write_bytes(name.encode())
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / "1.png", "1.png")
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("cat", "dog"):
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    data = create_dataset("", str(tmp_path), "train")
    assert class_names(data) == ["cat", "dog"]
    assert sorted((file.read(), int(target)) for file, target in data.reader) == [(b"cat", 0), (b"dog", 1)]


def test_splits_of_odd_names_are_no_classes(tmp_path):
    for name in ("Train/cat/1.png", "Valid/cat/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="no split 'train' in .*Train, Valid"):
        create_dataset("", str(tmp_path), "train")


def test_classes_come_in_timms_order(tmp_path):
    names = ["10", "9", "A", "a", "b2", "b10", "\u00b2", "caf\u00e9"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.webp").write_text("")
    folder = create_dataset("", str(tmp_path), "train")
    assert class_names(folder) == ["9", "10", "A", "a", "b2", "b10", "caf\u00e9", "\u00b2"] and len(folder) == 8

"""Image files by name, in the package and in the script that stands alone."""

from pathlib import Path

import pytest

from helpers import load_script
from raftmlp.data.find import find_images
from raftmlp.errors import UserError


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of files with names of many kinds."""
    monkeypatch.chdir(tmp_path)
    for name in ("10.png", "9.JPG", ".hidden.png", "notes.txt", "x.png/keep", "deep/[er]/2.png", "deep/[er]/10.png"):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


@pytest.mark.parametrize("find", [find_images, load_script("predict_onnx").find_images], ids=["package", "script"])
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
    script = load_script("predict_onnx")
    names = ["photos/notes.txt", "photos/x.png", "photos", "photos/*", "photos/deep/**", "missing", "*.gif", "", None]
    refused = 0
    for name in names:
        given, outcomes = [name] if name is not None else [], []
        for find in (find_images, script.find_images):
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

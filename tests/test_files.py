"""Files and folders that are complete or absent."""

import os

import pytest
from matplotlib.figure import Figure
from PIL import Image

from raftmlp.files import new_file, new_folder, save_figure, write_bytes, write_text


def fail(*args):
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with new_file(path) as temporary:
        temporary.write_text("half")
        assert temporary.suffix == ".txt" and path.read_text() == "old"
    assert path.read_text() == "half"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt():
        with new_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_unicode_are_escaped(tmp_path):
    write_text(tmp_path / "a.txt", os.fsdecode(b"caf\xe9") + " caf\u00e9")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 caf\u00e9"


def test_names_of_the_greatest_length(tmp_path):
    name = "n" * 251 + ".txt"
    write_text(tmp_path / name, "x")
    with new_folder(tmp_path / ("f" * 255)):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name, "f" * 255}


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "made") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "file").read_text() == "x"
    assert (tmp_path / "deep" / "made").stat().st_mode & 0o777 == 0o755

    def interrupt():
        with new_folder(tmp_path / "deep" / "other") as temporary:
            (temporary / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["made"]


def test_figures_take_their_format_from_the_suffix(tmp_path):
    figure = Figure(figsize=(1, 1))
    save_figure(figure, tmp_path / "a.png", dpi=30)
    assert Image.open(tmp_path / "a.png").size == (30, 30)
    save_figure(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")

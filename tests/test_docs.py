"""The README and the pages of docs/: their Python blocks and commands are run, and the site is built.

A page is one story: its blocks run from the top to the bottom, Python in one namespace, commands in one folder. There,
what the pages call FILE, FOLDER, imagenet, photos or photo.jpg exists, small. A block behind the comment
``<!-- not run: REASON -->`` is left out; NOT_RUN lists the reasons.
"""

import importlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from helpers import ROOT, TINY, load_script, make_image_folder
from raftmlp.cli import train
from raftmlp.cli.launcher import NAMES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "sh", "bibtex", "yaml")  # of blocks; the first two are run
NOT_RUN = Counter(
    {
        "AOTInductor compiles for a minute": 1,
        "it takes a trained detector": 1,
        "timm's scripts are not in its package": 2,
    }
)
# what is added to every line of a command: later options win over earlier ones
SHORTER = {
    "train": [
        *("--epochs", 1, "--warmup-epochs", 0, "--global-batch-size", 4, "--batch-size", 4, "--img-size", 32, *TINY),
    ],
    "benchmark": ["--rounds", 1, "--min-time", 0, "--sizes", 32, "--batch-size", 1],
    "validate": ["--workers", 0],
    "predict": ["--workers", 0],
}
# lines of which the options alone are parsed: they would take minutes, or the weights of a detector
PARSED = (
    "raftmlp study studies/paper",
    "raftmlp study studies/data_efficiency",
    "raftmlp study studies/distillation",
    "raftmlp benchmark reference:raftmlp_s raftmlp_s --modes eager compile",
    "raftmlp export --model raftmlp_digits --pretrained --format aoti --out digits-aoti.pt2",
    "raftmlp eval-mm CONFIG CHECKPOINT --data-dir coco --show-dir shown --results-file results.json",
    "raftmlp predict-mm CONFIG CHECKPOINT photo.jpg photos/ --out predictions",
    "torchrun --nproc-per-node 8 -m raftmlp train-mm configs/detection/mask_rcnn_raftmlp_s_fpn_1x_coco.py "
    "--data-dir coco --cfg-options model.backbone.init_cfg.checkpoint=FILE",
)
# parts of lines, and the smaller ones that stand for them
SMALLER = {
    "CONFIG": "detection/mask_rcnn_raftmlp_digits",
    "--pretrained --data-dir FOLDER": "--data-dir FOLDER",
    "--pretrained --format": "--model-kwargs embed_dims=(8,8,8,8) depths=(1,1,1,1) --format",
    "reference:raftmlp_m raftmlp_m": "reference:raftmlp_digits raftmlp_digits",
    "reference:raftmlp_l raftmlp_l": "reference:raftmlp_digits raftmlp_digits",
}
FOREIGN = ("pip install ", "hf upload ")  # other programs, which go to the network


def blocks(page):
    """Yield the blocks of a page: the language, the text, its first line, and why it is not run, if so."""
    reason = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            yield token.info, token.content, token.map[0] + 1, reason
        if token.level == 0:
            marker = (
                re.fullmatch(r"<!-- not run: (.*) -->", token.content.strip()) if token.type == "html_block" else None
            )
            reason = marker[1] if marker else ""


def command_lines(text):
    """Return the commands of a shell block, each on one line, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [" ".join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder of what the pages name."""
    folder = tmp_path_factory.mktemp("things")
    rng = np.random.default_rng(0)
    make_image_folder(folder / "imagenet", train=2, val=1)
    make_image_folder(folder / "FOLDER", train=2, val=1)
    (folder / "photos").mkdir()
    for name in ("photo.jpg", "photo.png", "new.jpg", "photos/a.jpg", "photos/b.jpg"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def run_line(run_command, things, tmp_path, monkeypatch):
    """Run a line of a shell block, in the page's folder."""
    for thing in things.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    monkeypatch.setenv("RAFTMLP_CHECKPOINTS", "exported")  # a run's --export goes there
    if not (things / "FILE").exists():
        folder = things / "run"
        status, _, error = run_command(train, "--data-dir", "imagenet", "--output", folder, *SHORTER["train"])
        assert status == 0, error
        shutil.copy(folder / "model_best.pth.tar", things / "FILE")
        (tmp_path / "FILE").symlink_to(things / "FILE")

    def run(line):
        is_parsed = line in PARSED
        for part, smaller in SMALLER.items():
            line = line.replace(part, smaller)
        words = line.split()
        if line.startswith("make "):
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
            return
        if line.startswith(FOREIGN):
            return
        if line.startswith("python tools/"):
            subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True, capture_output=True)
            return
        if words[0] == "torchrun":  # one process does what each of them does
            name, args = re.fullmatch(r"torchrun .*-m raftmlp ([\w-]+) (.*)", line).groups()
            args = args.split()
        else:
            assert words[0] == "raftmlp", f"{line}: is it run, or one of FOREIGN?"
            name, args = words[1], words[2:]
        assert name in NAMES, line
        module = command_module(name)
        if is_parsed:
            parse(name, module, args)
            return
        status, out, error = run_command(module, *args, *SHORTER.get(name, []))
        assert status == 0, f"{line}\n{out}{error}"

    return run


def command_module(name):
    """Return the module of a command."""
    return importlib.import_module(f"raftmlp.cli.{name.replace('-', '_')}")


def parse(name, module, args):
    """Parse the options of a command; of one for mmdet and mmseg, read its config and build the model too."""
    if name.endswith("-mm"):
        pytest.importorskip("mmdet")
    options = module.build_parser().parse_args(args)
    if name.endswith("-mm"):
        from mmengine.registry import MODELS, init_default_scope

        from raftmlp.cli.mm_options import load_config

        config = load_config(options)
        init_default_scope(config.default_scope)
        assert MODELS.build(config.model).backbone.out_channels


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_run(page, run_line, tmp_path, monkeypatch):
    load = torch.hub.load  # "." of the page is the checkout
    monkeypatch.setattr("torch.hub.load", lambda _, *args, **kwargs: load(str(ROOT), *args, **kwargs))
    if page.stem == "export":  # what the page on fine-tuning leaves
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        shutil.copy("FILE", "runs/mine/model_best.pth.tar")
    torch.manual_seed(0)
    namespace = {"__name__": "example"}
    for language, text, line, reason in blocks(page):
        if reason:
            continue
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), namespace)
        elif language == "sh":
            for command in command_lines(text):
                run_line(command)


def test_every_block_is_known():
    found = [block for page in PAGES for block in blocks(page)]
    assert {language for language, *_ in found} <= set(LANGUAGES)
    assert Counter(reason for *_, reason in found if reason) == NOT_RUN
    lines = {line for language, text, *_ in found if language == "sh" for line in command_lines(text)}
    assert set(PARSED) <= lines  # no entry is left of a line that is gone
    assert len(found) > 30 and len(lines) > 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_sentences_have_such_options(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`(raftmlp [^`]+)`", text):
        words = code.split()
        if words[1] in ("--help", "COMMAND"):
            continue
        assert words[1].rstrip(",") in NAMES, code
        if words[1].endswith("-mm") and not importlib.util.find_spec("mmdet"):
            continue
        parser = command_module(words[1].rstrip(",")).build_parser()
        known = {option for action in parser._actions for option in action.option_strings}
        assert {word for word in words[2:] if word.startswith("-")} <= known, code


# The site


def build_site(folder, to):
    """Build the site of a checkout as `make docs` does."""
    (options,) = re.findall(r"\$\(RUN\) (-m mkdocs .*)", (ROOT / "Makefile").read_text())
    command = [sys.executable, *options.split(), "--site-dir", to]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_site_is_built(tmp_path):
    done = build_site(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in tmp_path.glob("*.html")}
    assert {page.stem + ".html" for page in PAGES[1:]} <= set(pages)
    assert "set_input_size" in pages["api.html"] and "There are no ImageNet weights" in pages["index.html"]
    for name, page in pages.items():  # nothing is loaded from another server
        assert not re.search(r'<(script|img|link)[^>]* (src|href)="?(https?:)?//', page), name
    assert not list(tmp_path.rglob("*.py"))


def test_a_broken_link_fails(tmp_path):
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "train.md").open("a") as page:
        page.write("\n[a](export.md#nowhere)\n")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode == 1 and "does not contain an anchor '#nowhere'" in done.stderr


def test_links_out_of_the_pages(caplog):
    hooks = load_script("hooks", "docs")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="train.md"))
    text = "[a](../LICENSE) [`b`](../configs) [c](export.md#figures) [f](../README.md#models) ![g](h.png)"
    changed = "a `b` [c](export.md#figures) [f](index.md#models) ![g](h.png)"
    assert hooks.on_page_markdown(text, page, None, None) == changed
    with caplog.at_level(logging.WARNING):
        hooks.on_page_markdown("[a](../nothing.md)", page, None, None)
    assert caplog.messages == ["train.md names ../nothing.md, which is not there"]


def test_the_pictures_are_drawn(tmp_path, monkeypatch):
    drawing = load_script("how_it_works", "docs")
    monkeypatch.setattr(drawing, "DOCS", tmp_path)
    drawing.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"mixing.png", "embedding.png", "rules.png"}
    for name in drawn:
        assert 5_000 < (ROOT / "docs" / name).stat().st_size < 150_000
        assert Image.open(tmp_path / name).size == Image.open(ROOT / "docs" / name).size

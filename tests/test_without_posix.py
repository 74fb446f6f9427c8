"""Where POSIX is not, as on Windows: the commands are imported, and train, predict and study run."""

import subprocess
import sys

import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from helpers import TINY_MODEL, make_image_folder
from raftmlp.train import Trainer, TrainSettings

PROGRAM = """
import asyncio, logging, os, pkgutil, runpy, signal, subprocess, sys, tempfile
import filelock, huggingface_hub, matplotlib.figure, multiprocessing, torch, timm, timm.task, torchvision, tqdm, yaml
import torch.distributed, torch.utils.data, torch.utils.flop_counter

# what other packages found; ours are imported without it
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios")))
for name in ("SIGCHLD", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "pthread_sigmask"):
    delattr(signal, name)
for name in ("O_DIRECTORY", "sysconf", "geteuid", "getuid", "fork", "killpg", "setsid", "sched_getaffinity"):
    delattr(os, name)

import raftmlp.cli
for _, name, _ in pkgutil.iter_modules(raftmlp.cli.__path__, "raftmlp.cli."):
    if not name.endswith("_mm"):
        __import__(name)
import raftmlp.cli.launcher
for line in sys.stdin:
    sys.argv = ["raftmlp", *line.split()]
    try:
        raftmlp.cli.launcher.main()
    except SystemExit as end:
        assert not end.code, line
"""


def test_commands(tmp_path):
    make_image_folder(tmp_path / "images")
    options = f"--data-dir images --batch-size 8 --epochs 1 --workers 0 --device cpu {' '.join(TINY_MODEL)}"
    recipe = dict(model="raftmlp_digits", data_dir="images", batch_size=8, epochs=1, device="cpu")
    recipe["model_kwargs"] = dict(embed_dims=[8] * 4, depths=[1] * 4)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(dict(recipe=recipe, seeds=[0], arms=dict(a={}))))
    lines = [
        f"train {options} --output run",
        "predict images/val/dark --checkpoint run/last.pth.tar --picture p.png --workers 0",
        "study s.yaml --output study --jobs 1",
    ]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/summary.json").exists() and (tmp_path / "p.png").exists()
    assert (tmp_path / "study/runs/a/seed-0/summary.json").exists()


def test_workers_that_are_not_forked(tmp_path):
    """What they are given is pickled, and they share what they saw."""
    data = make_image_folder(tmp_path / "images")
    Image.new("LA", (8, 8)).save(data / "train" / "bright" / "0.png")
    given = dict(reprob=0.5, mixup=0.2, cutout=0.5, affine=[10, 0.1, 0.1], warmup_epochs=0, aa="augmix-m3-w3")
    given |= dict(model="raftmlp_digits", data_dir=str(data), output=str(tmp_path / "run"), batch_size=8)
    loader = Trainer.from_settings(TrainSettings(**given)).loader
    batches = loader.loader.loader
    spawn = dict(num_workers=1, multiprocessing_context="spawn", worker_init_fn=batches.worker_init_fn)
    spawned = DataLoader(batches.dataset, sampler=[(0, 0, 0)], collate_fn=batches.collate_fn, **spawn)
    assert next(iter(spawned))[0].dtype == torch.uint8 and loader.pixels.transparent.value

"""The console command: its list, its errors in one line, what it shows of the package's log."""

import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT
from raftmlp import __version__
from raftmlp.cli import console, train
from raftmlp.cli.launcher import COMMANDS, NAMES, main
from raftmlp.errors import UserError


def command(function):
    return SimpleNamespace(__name__="raftmlp.cli.some", main=function)


def raising(error):
    def main():
        raise error

    return command(main)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (UserError("a is 3, allowed is 4"), 2, "raftmlp some: error: a is 3, allowed is 4\n"),
        (OSError(errno.ENOSPC, "No space left"), 2, "raftmlp some: error: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_errors_are_one_line(run_command, error, status, shown):
    assert run_command(raising(error)) == (status, "", shown)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch-size"),
        (torch.OutOfMemoryError("out of\nmemory"), "--batch-size"),
        (MemoryError(), "--batch-size"),
        (RuntimeError("a\nbug"), "a bug (RuntimeError; RAFTMLP_DEBUG=1"),
    ],
)
def test_errors_of_other_libraries_are_one_line_too(run_command, monkeypatch, error, words):
    status, out, shown = run_command(raising(error))
    assert (status, out) == (2, "") and words in shown and shown.count("\n") == 1
    monkeypatch.setenv("RAFTMLP_DEBUG", "1")
    with pytest.raises(type(error)):
        console.run(raising(error).main)


def test_what_the_package_logs_is_shown(run_command):
    log = logging.getLogger("raftmlp.some.module")

    def main():
        log.debug("hidden")
        log.info("a line")
        log.warning("a note")

    assert run_command(command(main)) == (0, "a line\n", "a note\n")


def test_of_several_processes_the_first_speaks(run_command, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_command(command(lambda: console.say("a line"))) == (0, "", "")
    assert run_command(raising(UserError("wrong"))) == (2, "", "")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert run_command(raising(UserError("wrong"))) == (2, "", "raftmlp some: error: [process 1] wrong\n")
    assert run_command(raising(UserError("wrong", shared=True))) == (2, "", "")


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["raftmlp train", "-c", "a b.yaml"])
    assert console.command_line() == "raftmlp train -c 'a b.yaml'"


def test_the_list_of_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["raftmlp", "--help"])
    with pytest.raises(SystemExit):
        main()
    text = capsys.readouterr().out
    for title, commands in COMMANDS.items():
        assert f"\n{title}:\n" in text
        assert all(f"\n  {name} " in text for name in commands)
    monkeypatch.setattr(sys, "argv", ["raftmlp", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == f"raftmlp {__version__}\n"


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean train"), ("xyz", f"are {', '.join(NAMES)}")])
def test_an_unknown_command(monkeypatch, capsys, name, hint):
    monkeypatch.setattr(sys, "argv", ["raftmlp", name])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and f"unknown command '{name}'" in error and hint in error


def test_a_command_in_a_process_of_its_own():
    line = [sys.executable, "-m", "raftmlp", "convert", "missing.pth", "x.safetensors"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.endswith(": error: no checkpoint at missing.pth\n") and done.stderr.count("\n") == 1


def test_the_list_of_commands_does_not_load_torch():
    line = [sys.executable, "-X", "importtime", "-m", "raftmlp", "--help"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and "torch" not in done.stderr and "timm" not in done.stderr


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """Run Python in an empty folder where torch, timm and mmengine cannot be imported; gives status and output."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'mmengine')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}

    def run(*words):
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("name", NAMES)
def test_options_are_listed_before_torch_is_loaded(without_torch, name):
    status, out, error = without_torch("-m", "raftmlp", name, "--help")
    assert (status, error) == (0, "") and f"usage: raftmlp {name}" in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-m", "raftmlp", "trian"], "train"),
        (["-m", "raftmlp", "train", "--lrr", "1"], "--lrr"),
        (["-m", "raftmlp", "train", "--lr", "fast"], "fast"),
        ([ROOT / "tools" / "validate.py", "--sizes", "8x"], "8x"),
        (["-m", "raftmlp", "train", "-c", "imagenet/raftmlp_x"], "imagenet/raftmlp_s"),
        (["-m", "raftmlp", "train", "-c", "typo.yaml"], "lrr"),
        (["-m", "raftmlp", "study", "study.yaml"], "lrr"),
        (["-m", "raftmlp", "eval-mm", "detection/fpn", "x.pth"], "segmentation/fpn"),
        (["-m", "raftmlp", "predict", "no-such-image"], "no-such-image"),
    ],
)
def test_typos_are_refused_before_torch_is_loaded(without_torch, tmp_path_factory, words, named):
    folder = next(tmp_path_factory.getbasetemp().glob("site*"))
    (folder / "typo.yaml").write_text("lrr: 1\n")
    (folder / "study.yaml").write_text("recipe: {dataset: digits}\nseeds: [0]\narms: {a: {}, b: {lrr: 1}}\n")
    status, out, error = without_torch(*words)
    assert (status, out) == (2, "") and named in error and error.count("\n") == 1


def test_what_needs_torch_names_it_where_it_is_missing(without_torch):
    status, _, error = without_torch("-m", "raftmlp", "train", "--dataset", "digits")
    assert status == 2 and "torch" in error and "pip install" in error


@pytest.mark.parametrize("option", ["model", "kd-model-name", "opt"])
def test_names_that_timm_does_not_know_are_refused_with_their_option(run_command, option):
    status, out, error = run_command(train, f"--{option}", "no_such_name")
    assert (status, out) == (2, "") and f"--{option}" in error and "no_such_name" in error and error.count("\n") == 1
    Path("run.yaml").write_text(f"{option.replace('-', '_')}: no_such_name\n")
    status, out, error = run_command(train, "-c", "run.yaml")
    assert (status, out) == (2, "") and "run.yaml" in error and "no_such_name" in error and error.count("\n") == 1


def test_an_import_by_name_registers_the_models():
    code = "import {}, timm; assert timm.is_model('raftmlp_s'); import raftmlp; assert raftmlp.RaftMLP"
    for name in ("raftmlp.cli.train", "raftmlp"):
        assert subprocess.run([sys.executable, "-c", code.format(name)]).returncode == 0


def test_a_script_with_options_like_ours_gets_the_models(tmp_path):
    (tmp_path / "script.py").write_text("import raftmlp, timm; assert timm.is_model('raftmlp_s')")
    assert subprocess.run([sys.executable, tmp_path / "script.py", "-m", "raftmlp"]).returncode == 0


def test_ctrl_c_while_torch_is_loaded():
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "raftmlp", "validate"], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:  # a name in the list has been imported
        if "torch._utils" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode == 130
    assert "Traceback" not in rest and rest.endswith("\ninterrupted\n")


@pytest.mark.parametrize("closed", ["2>&-", "2>&1 >&-", "2>&1 | true"])
def test_closed_streams(tmp_path, closed):
    line = f"{sys.executable} -m raftmlp convert missing.pth x.safetensors {closed}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == (0 if "|" in closed else 2)


def test_names_that_a_terminal_cannot_show(tmp_path):
    line = [sys.executable, "-m", "raftmlp", "convert", "Größe-☃.pth", "x.safetensors"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr == "raftmlp convert: error: no checkpoint at Gr\\xf6\\xdfe-\\u2603.pth\n"


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_leave_their_core(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["raftmlp", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_no_script_hides_a_module_of_python():
    # the folder of a script is the first that Python looks for modules in
    assert not {path.stem for path in (ROOT / "tools").glob("*.py")} & sys.stdlib_module_names

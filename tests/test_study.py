"""Studies: what a plan allows, how runs are scheduled, and one that is killed, resumed and compared."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from helpers import ROOT
from raftmlp.commands import study as command
from raftmlp.commands import train
from raftmlp.commands.config_files import find_config
from raftmlp.errors import UserError
from raftmlp.study import Plan, StudyFolder, make_rows, make_table, run_study, write_results

RECIPE = dict(
    model="raftmlp_digits", model_kwargs=dict(embed_dims=[8] * 4, depths=[1] * 4), dataset="digits", device="cpu",
    train_num_samples=64, batch_size=32, epochs=2, warmup_epochs=0,
)  # fmt: skip
STUDY = dict(recipe=RECIPE, seeds=[0, 3], arms={"raft-2": {}, "mean": dict(global_batch_size=64, lr=0.01)})
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))


def write_study(path="study.yaml", **changes):
    Path(path).write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


# Plans


def test_the_options_of_a_run():
    plan = Plan(
        recipe=dict(lr=1, epochs=5, model="a", model_kwargs=dict(x=1, y=1)),
        arms=dict(same={}, other=dict(lr=2, model_kwargs=dict(y=2)), another=dict(model="b"), most=dict(workers=3)),
        seeds=(0, 1),
        points=(dict(train_num_samples=10, epochs=7), dict(train_num_samples=20)),
    )
    options = {cell.name: cell.options for cell in plan.cells()}
    assert options["same/train_num_samples-10"] == dict(
        lr=1, epochs=7, model="a", model_kwargs=dict(x=1, y=1), workers=0, train_num_samples=10
    )
    assert options["same/train_num_samples-20"]["epochs"] == 5
    assert options["other/train_num_samples-10"]["model_kwargs"] == dict(x=1, y=2)
    assert options["other/train_num_samples-10"]["lr"] == 2
    assert options["another/train_num_samples-10"]["model_kwargs"] == {}
    assert options["most/train_num_samples-10"]["workers"] == 3
    names = [run.name for run in plan.runs()]
    assert len(names) == len(set(names)) == 16
    assert names[0] == "same/train_num_samples-10/seed-0" and names[8] == "same/train_num_samples-10/seed-1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seeds=[1, 2, 1]), "seeds must differ: 1 stands there twice"),
        (dict(seeds=[]), "seeds must be one or more whole numbers"),
        (dict(seeds=[-1]), "seeds must be whole numbers from 0 to 4294967295, not -1"),
        (dict(seeds=3), "seeds must be a list, not 3"),
        (dict(seeds=[True]), "not True"),
        (dict(arms={}), "arms must be a mapping from names to options"),
        (dict(arms=["a"]), "arms must be a mapping"),
        (dict(arms={"a/b": {}}), "arm 'a/b': a name has 1 to 60 letters"),
        (dict(arms={"..": {}}), "arm '..': a name"),
        (dict(arms={4: {}}), "arm 4: a name"),
        (dict(arms={"a": {}, "A": {}}), "must differ in more than capital letters"),
        (dict(arms={"a": 3}), "arm a must be a mapping from options to values, not 3"),
        (dict(arms={"a": {"seed": 3}}), "arm a: seed is no option of an arm"),
        (dict(arms={"a": {3: 3}}), "arm a: the names of options are texts, not 3"),
        (dict(arms={"a": {"model_kwargs": 3}}), "arm a: model_kwargs must be a mapping, not 3"),
        (dict(recipe=[]), "recipe must be a mapping"),
        (dict(recipe=dict(output="x")), "recipe: output is no option"),
        (dict(points=[]), "points must be one or more mappings"),
        (dict(points=[dict(lr=1), dict(epochs=1)]), "begin with the same option, the picture's axis"),
        (dict(points=[dict(lr=1), dict(lr=1)]), "points must differ: lr 1 stands there twice"),
        (dict(points=[dict(model="a")]), "points: model, the picture's axis, must be numbers"),
        (dict(points=[dict(lr=1)], arms={"a": {"lr": 2}}), "arm a: lr is an option of the points"),
        (dict(sedes=[1]), "unknown key 'sedes'; did you mean seeds?"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be(changes, message):
    with pytest.raises(UserError) as caught:
        Plan.from_content({**STUDY, **changes})
    assert message in str(caught.value)


def test_a_plan_without_a_key():
    with pytest.raises(UserError, match="the key seeds is missing"):
        Plan.from_content({key: STUDY[key] for key in ("recipe", "arms")})


# Runs, made by a program that takes no time


FAKE = """#!{python} -IS
import os, pathlib, sys, time
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder, seed = pathlib.Path(options["--output"]), int(options["--seed"])
print("hello")
log = (folder / "log.csv").open("a")
if not log.tell():
    log.write("epoch\\n1\\n")
log.close()
if "slow" in str(folder) and not (folder / "again").exists():
    (folder / "again").touch()
    time.sleep(60)
if "bad" in str(folder) and not (folder.parent / "repaired").exists():
    sys.exit("raftmlp train: error: it broke, and here is why")
if "killed" in str(folder):
    os.kill(os.getpid(), 9)
top1 = 10 * seed + len(folder.parent.name)
text = '{{"last": {{"eval_top1": %f}}, "best_top1": 99, "seconds": 2.0}}' % top1
(folder / "summary.json").write_text(text)
"""


@pytest.fixture
def fake_training(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr("raftmlp.study.runner.sys.executable", str(program))
    monkeypatch.chdir(tmp_path)


def run(plan, jobs=2, folder="out"):
    """Run a plan; returns the failures, the rows and how many times results were reported."""
    folder, reports = StudyFolder(folder), []
    sizes = {cell.name: (1000, 2_000_000) for cell in plan.cells()}
    folder.open(plan)
    try:
        failures = run_study(folder, plan, dict.fromkeys(sizes, 1), jobs, reports.append)
    finally:
        folder.close()
    return failures, make_rows(folder, plan, sizes, failures or {}), len(reports)


def plan_of(*arms, seeds=(0, 1), **changes):
    return Plan(dict(epochs=1), {name: {} for name in arms}, seeds, **changes)


def test_runs_that_fail_are_marked_and_the_others_go_on(fake_training):
    plan = plan_of("good", "bad", "killed")
    failures, rows, reports = run(plan)
    assert failures == {
        **{f"bad/seed-{seed}": "it broke, and here is why" for seed in (0, 1)},
        **{f"killed/seed-{seed}": "it was killed by signal 9, for want of memory perhaps" for seed in (0, 1)},
    }
    assert reports == 6
    good, bad, _ = rows
    assert (good["top1_mean"], good["runs"], good["seconds"], good["macs"]) == (9.0, 2, 2.0, 2_000_000)
    assert good["top1_deviation"] == pytest.approx(50**0.5) and good["top1"] == {0: 4.0, 1: 14.0}
    assert (bad["runs"], bad["top1_mean"], len(bad["failures"])) == (0, None, 2)
    table = make_table(rows).splitlines()
    assert len({len(line) for line in table}) == 1
    assert "| good   |       9.00 |      7.07 |                2 |      1,000 |  2.00 |       2 |" in table
    assert any("0 of 2, 2 failed" in line for line in table)
    write_results(StudyFolder("out"), "mine", plan, rows)
    assert json.loads(Path("out/study.json").read_text())["rows"][1]["failures"]["0"].startswith("it broke")
    records = list(csv.DictReader(Path("out/study.csv").read_text().splitlines()))
    assert [row["failed"] for row in records] == ["0", "2", "2"] and records[1]["top1_mean"] == ""
    assert Image.open("out/study.png").width > 500

    # what is done is not run again, what failed is
    Path("out/runs/bad/repaired").touch()
    before = Path("out/runs/good/seed-0/train.log").read_text()
    failures, rows, reports = run(plan_of("good", "bad"))
    assert failures == {} and reports == 2 and rows[1]["runs"] == 2
    assert Path("out/runs/good/seed-0/train.log").read_text() == before == "hello\n"


def test_points_are_lines_of_a_picture(fake_training):
    plan = plan_of("a", "b", points=tuple(dict(train_num_samples=n) for n in (10, 100)))
    failures, rows, _ = run(plan)
    assert not failures and [row["point"]["train_num_samples"] for row in rows] == [10, 100, 10, 100]
    assert "| arm | train_num_samples |" in make_table(rows)
    write_results(StudyFolder("out"), "mine", plan, rows)
    assert Path("out/study.csv").read_text().startswith("arm,train_num_samples,runs,")
    assert Image.open("out/study.png").height > 400


def test_a_study_that_is_stopped_ends_its_runs_and_goes_on_later(fake_training):
    plan = plan_of("quick", "slow")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    failures, rows, _ = run(plan, jobs=1)
    assert failures is None and time.monotonic() - started < 30
    assert [row["runs"] for row in rows] == [1, 0]  # the first seed of every arm comes before the second
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    failures, rows, _ = run(plan, jobs=2)
    assert failures is None and [row["runs"] for row in rows] == [2, 1]
    failures, rows, _ = run(plan)
    assert failures == {} and [row["runs"] for row in rows] == [2, 2]


def test_a_run_that_another_process_still_writes_is_waited_for(fake_training):
    plan = plan_of("a", seeds=(0,))
    folder = Path("out/runs/a/seed-0")
    folder.mkdir(parents=True)
    StudyFolder("out").path.joinpath("study.yaml").write_text(
        yaml.safe_dump(dict(recipe={}, arms=dict(a={}), seeds=[1]))
    )
    with pytest.raises(UserError, match="in it, epochs of a is None, not 1"):
        run(plan)
    Path("out/study.yaml").unlink()
    with pytest.raises(UserError, match="out holds something else than a study"):
        run(plan)
    folder = Path("new/runs/a/seed-0")
    StudyFolder("new").open(plan)
    folder.mkdir(parents=True)
    other = (folder / ".process").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)

    def finish():
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        other.close()

    threading.Timer(1, finish).start()
    failures, rows, _ = run(plan, folder="new")
    assert failures == {} and rows[0]["top1_mean"] == 7 and not (folder / "train.log").exists()


SUMMARY = dict(last=dict(eval_top1=7), best_top1=8, seconds=1)


# The folder


def test_the_order_of_options_makes_no_other_study(tmp_path):
    folder = StudyFolder(tmp_path / "out")
    kwargs = dict(mlp_ratio=2, token_mlp_ratio=1)
    folder.open(Plan(dict(epochs=1), dict(a=dict(model_kwargs=kwargs)), (0,)))
    folder.close()
    folder.check(Plan(dict(epochs=1), dict(a=dict(model_kwargs=dict(reversed(kwargs.items())))), (0,)))


def test_a_folder_of_another_study_is_refused(tmp_path):
    plan = plan_of("a", "b")
    folder = StudyFolder(tmp_path / "out")
    folder.open(plan)
    with pytest.raises(UserError, match="another study is writing into"):
        StudyFolder(tmp_path / "out").open(plan)
    folder.close()
    folder.check(plan_of("a", "c", seeds=(5,)))  # more of the same study
    changed = Plan(dict(epochs=1), dict(a=dict(lr=2)), (0,))
    for other, message in (
        (changed, "holds another study: in it, lr of a is None, not 2; name another folder with --output"),
        (plan_of("x"), "holds another study, with the arms a, b"),
    ):
        before = {path: path.read_bytes() for path in folder.path.rglob("*.yaml")}
        with pytest.raises(UserError) as caught:
            StudyFolder(tmp_path / "out").open(other)
        assert message in str(caught.value)
        assert {path: path.read_bytes() for path in folder.path.rglob("*.yaml")} == before
    (folder.path / "study.yaml").write_text("[1")
    with pytest.raises(UserError, match="study.yaml is damaged"):
        folder.check(plan)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"):
        StudyFolder(tmp_path / "file").check(plan)


# The command


def test_bad_input(run_command):
    for changes, message in (
        (dict(arms={"good": {}, "worse": dict(model="raftmlp_x")}), "yaml: worse: model: unknown model"),
        (dict(arms={"worse": dict(model_kwargs=dict(raft_size=3))}), "worse: cannot make raftmlp_digits: raft_"),
        (dict(arms={"worse": dict(modle="x")}), "study.yaml: worse: unknown key 'modle'; did you mean model"),
        (dict(arms={"worse": dict(batch_size=100)}), "study.yaml: worse: 64 images make no update of 100"),
        (dict(arms={"worse": dict(model="test_vit", img_size=8)}), "study.yaml: worse: "),
        (dict(seeds=[1, 1]), "study.yaml: seeds must differ: 1 stands there twice"),
        (dict(recipe=dict(base="digits/nothing")), "study.yaml: recipe: no config digits/nothing"),
        (dict(recipe=dict(base=3)), "the recipe's base must be the name of a config, not 3"),
    ):  # fmt: skip
        status, _, err = run_command(command, write_study(**changes))
        assert status == 2 and message in err and "Traceback" not in err, err
        assert not Path("runs").exists()
    status, _, err = run_command(command, "nothing.yaml")
    assert status == 2 and "no config nothing.yaml" in err
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    status, _, err = run_command(command, write_study(), "--output", "full")
    assert status == 2 and "full holds something else than a study: name another folder with --output" in err
    status, _, err = run_command(command, write_study(), "--jobs", 0)
    assert status == 2 and "must be a whole number from 1 to 1024, not '0'" in err


def test_a_dry_run_and_a_base(run_command):
    write_study(recipe=dict(base="digits/raftmlp_digits", epochs=3), arms=dict(a={}, b=dict(model="test_resnet")))
    status, out, err = run_command(command, "study.yaml", "--dry-run")
    assert status == 0, err
    assert "2 arms x 2 seeds, 4 runs of raftmlp train" in out and " 756,454 |" in out
    assert not Path("runs").exists()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_shipped_studies(path):
    """Every arm can be built; the arms of a study cost the same, where it says so."""
    plan = command.read_plan(find_config(f"studies/{path.stem}"))
    assert len(plan.seeds) >= 5
    costs, _ = command.check_cells(plan, path)
    macs = [macs for _, macs in costs.values()]
    assert max(macs) / min(macs) < 1.1
    text = path.read_text()
    assert f"#   raftmlp study studies/{path.stem}" in text
    assert "Not run" in text or " %" in text


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def figures(file):
    """Return the rows of a study without what the clock says."""
    return [{key: row[key] for key in row if key != "seconds"} for row in json.loads(Path(file).read_text())["rows"]]


def test_killed_and_resumed_it_ends_the_same(run_command, tmp_path):
    write_study()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "raftmlp", "study", "study.yaml", "--jobs", "1"]
    killed = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: Path("runs/study/study.csv").exists())  # the first run has ended, the second has begun or will
    wait_for(lambda: Path("runs/study/runs/mean/seed-0/train.log").exists())
    killed.kill()
    killed.wait()
    assert len(list(Path("runs/study/runs").rglob("summary.json"))) < 4
    status, out, err = run_command(command, "study.yaml")
    assert status == 0, err
    assert "1 of 4 runs are done already" in out or "2 of 4 runs are done already" in out
    rows = figures("runs/study/study.json")
    assert [row["runs"] for row in rows] == [2, 2]
    for row in rows:  # as ordinary runs of raftmlp train, which no one has interrupted, do
        for seed, top1 in row["top1"].items():
            options = [
                "-c",
                f"runs/study/options/{row['arm']}.yaml",
                "--seed",
                seed,
                "--output",
                "alone",
                "--overwrite",
            ]
            assert run_command(train, *options)[0] == 0
            assert json.loads(Path("alone/summary.json").read_text())["last"]["eval_top1"] == top1
    assert {path.name for path in Path("runs/study").iterdir()} >= {"study.csv", "study.json", "study.md", "study.png"}
    status, out, err = run_command(command, "study.yaml")
    assert status == 0 and "4 of 4 runs are done already" in out
    assert figures("runs/study/study.json") == rows

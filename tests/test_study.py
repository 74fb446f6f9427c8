"""Studies: what a plan allows, how runs are scheduled, and one that is killed, resumed and compared."""

import csv
import fcntl
import json
import logging
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
from scipy.stats import ttest_ind

from helpers import ROOT, load_script
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import study as command
from raftmlp.cli import train, validate
from raftmlp.cli.config_files import find_config
from raftmlp.errors import UserError
from raftmlp.study import runner
from raftmlp.study.plan import PREPARATION, Plan
from raftmlp.study.report import add_differences, make_notes, make_rows, make_table, write_results
from raftmlp.study.runner import StudyFolder, run_study
from raftmlp.train.settings import TrainSettings

TINY = dict(model="raftmlp_digits", model_kwargs=dict(embed_dims=[8] * 4, depths=[1] * 4))
RECIPE = dict(dataset="digits", device="cpu", train_num_samples=64, batch_size=32, epochs=2, warmup_epochs=0)
STUDY = dict(recipe={**TINY, **RECIPE}, seeds=[0, 3], arms={"raft-2": {}, "mean": dict(global_batch_size=64, lr=0.01)})
MODELS = dict(ours=dict(model="raftmlp_digits"), other=dict(model="test_resnet"))
PREPARED = dict(zip(PREPARATION, ([32, 32], "bilinear", 1.0, "center", [0.5] * 3, [0.5] * 3)))


def write_study(path="study.yaml", **changes):
    Path(path).write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def plan_of(*arms, seeds=(0, 1), **changes):
    return Plan(recipe=dict(epochs=1), arms={name: {} for name in arms}, seeds=seeds, **changes)


# Plans


def test_the_options_of_a_run():
    plan = Plan(
        recipe=dict(lr=1, epochs=5, model="a", model_kwargs=dict(x=1, y=1)),
        arms=dict(same={}, other=dict(lr=2, workers=3, model_kwargs=dict(y=2)), another=dict(model="b")),
        seeds=[0, 1],
        points=[dict(n=10, epochs=7), dict(n=20)],
    )
    options = {cell.name: cell.options for cell in plan.cells()}
    same = dict(lr=1, epochs=7, model="a", model_kwargs=dict(x=1, y=1), workers=0, n=10)
    assert options["same/n-10"] == same and options["same/n-20"] == {**same, "epochs": 5, "n": 20}
    assert options["other/n-10"] == {**same, "lr": 2, "workers": 3, "model_kwargs": dict(x=1, y=2)}
    assert options["another/n-10"] == {**same, "model": "b", "model_kwargs": {}}
    names = [run.name for run in plan.runs()]
    assert len(set(names)) == 12 and (names[0], names[6]) == ("same/n-10/seed-0", "same/n-10/seed-1")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(seeds=[1, 2, 1]), "seeds"),
        (dict(seeds=[-1]), "-1"),
        (dict(seeds=[True]), "True"),
        (dict(arms={"a/b": {}}), "a/b"),
        (dict(arms={"a": {}, "A": {}}), "capital letters"),
        (dict(arms={"a": {"seed": 3}}), "a: seed"),
        (dict(recipe=dict(output="x")), "recipe: output"),
        (dict(points=[dict(workers=1), dict(workers=1)]), "points"),
        (dict(points=[dict(model="a")]), "model"),
        (dict(points=[dict(lr=1)], arms={"a": {"lr": 2}}), "a: lr"),
        (dict(sedes=[1]), "sedes"),
    ],
)
def test_a_plan_that_would_be_silently_wrong(changes, named, run_command):
    status, _, err = run_command(command, write_study(**changes), "--dry-run")
    assert status == 2 and "study.yaml" in err and named in err and err.count("\n") == 1


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
SUMMARY = dict(last=dict(eval_top1=7), best_top1=8, seconds=1)


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
    facts = {cell.name: dict(parameters=1000, macs=2_000_000, preparation=PREPARED) for cell in plan.cells()}
    with folder.open(plan):
        failures = run_study(folder, plan.runs(), dict.fromkeys(facts, 1), jobs, reports.append)
    return failures, make_rows(folder, plan, facts, failures or {}), len(reports)


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
    good = ["good", "9.00 ± 7.07", "", "2", "1,000", "2.00", "2"]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == good
    assert any("0 of 2, 2 failed" in line for line in table)
    write_results(StudyFolder("out"), "mine", plan, rows)
    assert json.loads(Path("out/study.json").read_text())["rows"][1]["failures"]["0"].startswith("it broke")
    records = list(csv.DictReader(Path("out/study.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"], row["top1"]) for row in records] == [
        ("good", "0", "4.0"), ("good", "1", "14.0"), *((arm, seed, "") for arm in ("bad", "killed") for seed in "01")
    ]  # fmt: skip
    assert [row["failure"] for row in records][1:3] == ["", "it broke, and here is why"]
    first = [records[0][key] for key in ("images_img_size", "images_interpolation", "seconds")]
    assert first == ["32 32", "bilinear", "2.0"]
    assert Image.open("out/study.png").width > 500
    assert {path.name for path in Path("out").iterdir()} >= {"study.csv", "study.json", "study.md", "study.png"}

    # what is done is not run again, what failed is
    Path("out/runs/bad/repaired").touch()
    before = Path("out/runs/good/seed-0/train.log").read_text()
    failures, rows, reports = run(plan_of("good", "bad"))
    assert failures == {} and reports == 2 and rows[1]["runs"] == 2
    assert Path("out/runs/good/seed-0/train.log").read_text() == before == "hello\n"


def test_a_study_that_is_stopped_ends_its_runs_and_goes_on_later(fake_training, monkeypatch, caplog):
    monkeypatch.setattr(runner, "LINE_SECONDS", -1)
    monkeypatch.setattr(logging.getLogger("raftmlp"), "propagate", True)
    caplog.set_level(logging.INFO, "raftmlp")
    plan = plan_of("quick", "slow")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    failures, rows, _ = run(plan, jobs=1)
    assert failures is None and time.monotonic() - started < 30
    assert [row["runs"] for row in rows] == [1, 0]  # the first seed of every arm comes before the second
    assert any("1 of 4 runs ended" in text and "slow/seed-0 epoch 1/1" in text for text in caplog.messages)
    assert any("run 1/4, quick/seed-0: top-1 5.00 %, 2.0 s; " in text and "left" in text for text in caplog.messages)
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    failures, rows, _ = run(plan, jobs=2)
    assert failures is None and [row["runs"] for row in rows] == [2, 1]
    failures, rows, _ = run(plan)
    assert failures == {} and [row["runs"] for row in rows] == [2, 2]


def test_a_run_that_another_process_still_writes_is_waited_for(fake_training):
    """Its points are lines of a picture."""
    plan = plan_of("a", seeds=(0,), points=[dict(n=1), dict(n=10)])
    folder = Path("new/runs/a/n-1/seed-0")
    folder.mkdir(parents=True)
    content = dict(recipe=dict(epochs=1), arms=dict(a={}), seeds=[0], points=[dict(n=1)])
    Path("new/study.yaml").write_text(yaml.safe_dump(content))
    other = (folder / ".process").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)

    def finish():
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        other.close()

    threading.Timer(1, finish).start()
    failures, rows, _ = run(plan, folder="new")
    assert failures == {} and rows[0]["top1_mean"] == 7 and not (folder / "train.log").exists()
    assert "| arm | " in make_table(rows) and [row["point"]["n"] for row in rows] == [1, 10]
    write_results(StudyFolder("new"), "mine", plan, rows)
    assert Path("new/study.csv").read_text().startswith("arm,n,seed,top1,")
    assert Image.open("new/study.png").height > 400


# Images


def dry_run(run_command, **changes):
    status, out, err = run_command(command, write_study(**changes), "--dry-run")
    assert status == 0, err
    return out


def test_all_arms_get_the_images_of_the_first(run_command):
    ours, other = (
        f"img_size {s}, interpolation bilinear, crop_pct {c}" for s, c in (("32 32", 1.0), ("160 160", 0.95))
    )
    assert f"Images of all arms: {ours}" in dry_run(run_command, recipe=RECIPE, arms=MODELS)
    arms = dict(reversed(MODELS.items()))
    assert f"Images of all arms: {other}" in dry_run(run_command, recipe=RECIPE, arms=arms)
    # what the recipe or an arm says counts
    arms = {**MODELS, "cropped": dict(model="test_resnet", crop_pct=0.5, mean=[0.1])}
    out = dry_run(run_command, recipe={**RECIPE, "interpolation": "nearest"}, arms=arms)
    assert "Images of ours, other: img_size 32 32, interpolation nearest, crop_pct 1.0, " in out
    assert "Images of cropped: img_size 32 32, interpolation nearest, crop_pct 0.5, crop_mode center, mean 0.1 " in out
    assert not Path("runs").exists()


def test_a_study_of_version_0_2_is_continued_only_with_the_same_images(run_command):
    folder = Path("runs/study")  # as version 0.2 named it
    with StudyFolder(folder).open(Plan(recipe=RECIPE, arms=MODELS, seeds=[0])):
        pass
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    status, _, err = run_command(command, write_study(recipe=RECIPE, arms=MODELS), "--dry-run")
    assert status == 2 and err.count("\n") == 1
    assert "runs/study holds another study: in it, img_size of other is [160, 160], not [32, 32]" in err
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before
    own = dict(img_size=160, interpolation="bilinear", crop_pct=0.95, mean=[0.5], std=[0.5])
    dry_run(run_command, recipe=RECIPE, arms=dict(ours=MODELS["ours"], other={**MODELS["other"], **own}))
    dry_run(run_command, recipe=RECIPE, arms=dict(ours=MODELS["ours"]))
    assert command.default_folder("other") == Path("runs/studies/other")


# Differences


def row_of(arm, *top1, **point):
    return dict(arm=arm, point=point, top1=dict(enumerate(top1)), runs=len(top1), planned=len(top1), macs=1e6,
                top1_mean=sum(top1) / max(1, len(top1)), top1_deviation=1.0, parameters=1000, seconds=1.0, failures={},
                preparation=PREPARED)  # fmt: skip


def test_differences_are_those_of_welchs_test_and_the_notes_name_them():
    samples = dict(a=(50, 51, 52), better=(60, 61, 62), same=(50, 51, 53), short=(50,))
    rows = [row_of(name, *top1) for name, top1 in samples.items()]
    add_differences(rows)
    low, high = ttest_ind(samples["better"], samples["a"], equal_var=False).confidence_interval()
    told = rows[1]["difference"]
    assert (told["mean"], told["half_width"]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert rows[0]["difference"] is rows[3]["difference"] is None
    images, sure, unsure, untold, _ = make_notes(rows)
    assert "all arms" in images and "img_size 32 32" in images
    assert sure.endswith(": better (+10.00 ± 2.27).") and unsure.endswith(": same.") and untold.endswith(": short.")
    assert "**+10.00 ± 2.27** |" in make_table(rows) and " +0.33 ± " in make_table(rows)
    points = [row_of(arm, base, base, n=n) for arm, base in (("a", 10), ("b", 50)) for n in (1, 2)]
    points[3]["top1"] = {0: 50, 1: 51}
    add_differences(points)
    assert points[2]["difference"] is None  # all figures are the same
    _, first, second, _ = make_notes(points)
    assert "at n 1: b." in first and "at n 2: b (+40.50" in second


@pytest.mark.parametrize("name", ["paper", "data_efficiency", "distillation"])
def test_the_page_has_the_figures_of_its_json(name):
    evidence = load_script("evidence", "docs")
    page = evidence.PAGE.read_text()
    assert f"<!-- {name} -->\n{evidence.section(name)}\n<!-- end of {name} -->" in page
    assert f"raftmlp study studies/{name}" in page


# The folder


def test_a_folder_of_another_study_is_refused(tmp_path):
    def plan(seed=0, **arms):
        return Plan(recipe=dict(epochs=1), arms=arms, seeds=[seed])

    kwargs = dict(mlp_ratio=2, token_mlp_ratio=1)
    first = plan(a=dict(model_kwargs=kwargs), b={})
    folder = StudyFolder(tmp_path / "out")
    with folder.open(first), pytest.raises(UserError, match="another study is writing into"):
        StudyFolder(tmp_path / "out").open(first).__enter__()
    # more of the same study, and its options in another order
    folder.check(plan(5, a=dict(model_kwargs=dict(reversed(kwargs.items()))), c={}))
    before = {path: path.read_bytes() for path in folder.path.rglob("*.yaml")}
    for other, message in ((plan(b=dict(lr=2)), "in it, lr of b is None, not 2"), (plan(x={}), "with the arms a, b")):
        with pytest.raises(UserError) as caught, folder.open(other):
            pass
        assert message in str(caught.value)
    assert {path: path.read_bytes() for path in folder.path.rglob("*.yaml")} == before
    (folder.path / "study.yaml").unlink()
    with pytest.raises(UserError, match="something else than a study"):
        folder.check(first)


# The command


def test_bad_options_of_arms(run_command):
    for changes, message in (
        (dict(arms={"good": {}, "worse": dict(model="raftmlp_x")}), "yaml: worse: unknown model"),
        (dict(arms={"worse": dict(modle="x")}), "study.yaml: worse: unknown key 'modle'; did you mean model"),
        (dict(arms={"worse": dict(batch_size=100)}), "study.yaml: worse: 64 images make no update of 100"),
        (dict(recipe=dict(base="digits/nothing")), "no config digits/nothing"),
    ):
        status, _, err = run_command(command, write_study(**changes))
        assert status == 2 and message in err and err.count("\n") == 1, err
        assert not Path("runs").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies(path):
    """Every arm can be built; the arms cost the same, and get the same images."""
    plan = command.read_plan(find_config(f"studies/{path.stem}"))
    cells = {cell.arm: cell for cell in plan.cells()}.values()
    facts = [command.build(cell, TrainSettings(**cell.options), 0)[0] for cell in cells]
    macs = [known["macs"] for known in facts]
    assert len(plan.seeds) >= 5 and max(macs) / min(macs) < 1.1
    assert len({json.dumps(known["preparation"]) for known in facts}) == 1
    assert f"#   raftmlp study studies/{path.stem}" in path.read_text()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def figures(file):
    """Return the rows of a study without what the clock says."""
    rows = json.loads(Path(file).read_text())["rows"]
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows]


def test_killed_and_resumed_it_ends_the_same(run_command, tmp_path):
    write_study(seeds=[3])
    folder = Path("runs/studies/study")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "raftmlp", "study", "study.yaml", "--jobs", "1"]
    killed = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "study.csv").exists())  # the first run has ended, the second has begun or will
    wait_for(lambda: (folder / "runs/mean/seed-3/train.log").exists())
    killed.kill()
    killed.wait()
    assert len(list((folder / "runs").rglob("summary.json"))) < 2
    status, out, err = run_command(command, "study.yaml", "--keep", "all")
    assert status == 0, err
    assert "1 of 2 runs are done already" in out
    rows = figures(folder / "study.json")
    assert [row["runs"] for row in rows] == [1, 1]
    for row in rows:  # as ordinary runs of raftmlp train, which no one has interrupted, do
        options = ["-c", folder / f"options/{row['arm']}.yaml", "--output", "alone", "--overwrite"]
        for seed, top1 in row["top1"].items():
            assert run_command(train, *options, "--seed", seed)[0] == 0
            assert json.loads(Path("alone/summary.json").read_text())["last"]["eval_top1"] == top1
    assert len(list(folder.rglob("last.pth.tar"))) >= 1
    status, out, err = run_command(command, "study.yaml", "--keep", "best")
    assert status == 0 and "2 of 2 runs are done already" in out
    assert figures(folder / "study.json") == rows

    # of every finished run the best weights are left, which are protected
    for run in folder.glob("runs/*/seed-*"):
        assert {path.name for path in run.glob("*.tar")} == {"model_best.pth.tar"}
        assert "optimizer" not in load_checkpoint(run / "model_best.pth.tar")
    options = ["-c", folder / "options/mean.yaml", "--output", run]
    before = (run / "model_best.pth.tar").read_bytes()
    for more in ([], ["--resume"]):
        status, _, err = run_command(train, *options, *more)
        assert status == 2 and "--overwrite" in err and (run / "model_best.pth.tar").read_bytes() == before
    status, out, err = run_command(validate, "--checkpoint", run / "model_best.pth.tar", "--dataset", "digits")
    assert status == 0, err

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

from helpers import ROOT
from raftmlp.checkpoints.weights import load_checkpoint
from raftmlp.cli import study as command
from raftmlp.cli import train, validate
from raftmlp.cli.config_files import find_config
from raftmlp.errors import UserError
from raftmlp.study import (
    PREPARATION,
    Plan,
    StudyFolder,
    difference,
    make_notes,
    make_rows,
    make_table,
    progress,
    run_study,
    write_results,
)
from raftmlp.train.run_folder import RunFolder

RECIPE = dict(
    model="raftmlp_digits", model_kwargs=dict(embed_dims=[8] * 4, depths=[1] * 4), dataset="digits", device="cpu",
    train_num_samples=64, batch_size=32, epochs=2, warmup_epochs=0,
)  # fmt: skip
STUDY = dict(recipe=RECIPE, seeds=[0, 3], arms={"raft-2": {}, "mean": dict(global_batch_size=64, lr=0.01)})
PREPARED = dict(zip(PREPARATION, ([32, 32], "bilinear", 1.0, "center", [0.5] * 3, [0.5] * 3)))
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
    facts = {cell.name: dict(parameters=1000, macs=2_000_000, preparation=PREPARED) for cell in plan.cells()}
    folder.open(plan)
    try:
        failures = run_study(folder, plan, dict.fromkeys(facts, (1, 1)), jobs, reports.append)
    finally:
        folder.close()
    return failures, make_rows(folder, plan, facts, failures or {}), len(reports)


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
    good = ["good", "9.00", "7.07", "", "2", "1,000", "2.00", "2"]
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == good
    assert any("0 of 2, 2 failed" in line for line in table)
    write_results(StudyFolder("out"), "mine", plan, rows)
    assert json.loads(Path("out/study.json").read_text())["rows"][1]["failures"]["0"].startswith("it broke")
    records = list(csv.DictReader(Path("out/study.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"], row["top1"]) for row in records] == [
        ("good", "0", "4.0"), ("good", "1", "14.0"), *((arm, seed, "") for arm in ("bad", "killed") for seed in "01")
    ]  # fmt: skip
    assert [row["failure"] for row in records][1:3] == ["", "it broke, and here is why"]
    assert (records[0]["images_img_size"], records[0]["images_interpolation"]) == ("32 32", "bilinear")
    assert records[0]["seconds"] == "2.0"
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
    assert Path("out/study.csv").read_text().startswith("arm,train_num_samples,seed,top1,")
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
    Path("out/last.pth.tar").touch()
    with pytest.raises(UserError, match="out holds a training run"):
        run(plan)
    Path("out/last.pth.tar").unlink()
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


# Images


MODELS = dict(ours=dict(model="raftmlp_digits"), other=dict(model="test_resnet"))


def facts_of(content, name="study.yaml"):
    """Return the plan of a study's file as the command runs it, and how the images of its arms are prepared."""
    plan = command.pin_preparation(command.read_plan(Path(write_study(name, **content))), Path(name))
    facts, _ = command.check_cells(plan, Path(name))
    return plan, {cell: known["preparation"] for cell, known in facts.items()}


def test_all_arms_get_the_images_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {key: value for key, value in RECIPE.items() if not key.startswith("model")}
    plan, prepared = facts_of(dict(recipe=recipe, arms=MODELS))
    assert prepared["ours"] == prepared["other"] == PREPARED
    assert all(cell.options["crop_pct"] == 1.0 for cell in plan.cells())
    _, prepared = facts_of(dict(recipe=recipe, arms=dict(reversed(MODELS.items()))))
    assert prepared["ours"] == prepared["other"] != PREPARED

    # what the recipe or an arm says counts
    arms = {**MODELS, "cropped": dict(model="test_resnet", crop_pct=0.5, mean=[0.1])}
    plan, prepared = facts_of(dict(recipe={**recipe, "interpolation": "nearest"}, arms=arms))
    assert prepared["ours"] == prepared["other"] == {**PREPARED, "interpolation": "nearest"}
    changed = dict(interpolation="nearest", crop_pct=0.5, mean=[0.1] * 3)
    assert prepared["cropped"] == {**PREPARED, **changed}
    arms = dict(colour=dict(model="test_resnet"), gray=dict(model="raftmlp_digits", model_kwargs=dict(in_chans=1)))
    _, prepared = facts_of(dict(recipe=recipe, arms=arms))
    assert prepared["gray"]["mean"] == [pytest.approx(sum(prepared["colour"]["mean"]) / 3)]


def test_a_study_of_version_0_2_is_continued_only_with_the_same_images(run_command):
    recipe = {key: value for key, value in RECIPE.items() if not key.startswith("model")}
    folder = Path("runs/study")
    StudyFolder(folder).open(Plan.from_content(dict(recipe=recipe, arms=MODELS, seeds=[0])))
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    status, _, err = run_command(command, write_study(recipe=recipe, arms=MODELS), "--dry-run")
    assert status == 2 and err.count("\n") == 1
    assert "runs/study holds another study: in it, img_size of other is [160, 160], not [32, 32]" in err
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before
    own = command.own_preparation(Plan.from_content(dict(recipe=recipe, arms=MODELS, seeds=[0])).cells()[1], "")
    arms = dict(ours=MODELS["ours"], other={**MODELS["other"], **own})
    for same in (dict(recipe=recipe, arms=arms), dict(recipe=recipe, arms=dict(ours=MODELS["ours"]))):
        status, _, err = run_command(command, write_study(**same), "--dry-run")
        assert status == 0, err


# Differences


def row_of(arm, *top1, **point):
    return dict(arm=arm, point=point, top1=dict(enumerate(top1)), runs=len(top1), planned=len(top1), macs=1e6,
                top1_mean=sum(top1) / max(1, len(top1)), top1_deviation=1.0, parameters=1000, seconds=1.0, failures={},
                preparation=PREPARED)  # fmt: skip


def test_a_difference_is_that_of_welchs_test():
    first, second = row_of("a", 50, 51, 53), row_of("b", 60, 61.5, 61, 64)
    low, high = ttest_ind([*second["top1"].values()], [*first["top1"].values()], equal_var=False).confidence_interval()
    told = difference(second, first)
    assert told["mean"] - told["half_width"] == pytest.approx(low)
    assert told["mean"] + told["half_width"] == pytest.approx(high)
    assert difference(first, first) is None
    assert difference(row_of("b", 60), first) is None
    assert difference(row_of("b", 60, 60), row_of("a", 50, 50)) is None


def test_the_notes_name_what_differs():
    rows = [row_of("a", 50, 51, 52), row_of("better", 60, 61, 62), row_of("same", 50, 51, 53), row_of("short", 50)]
    for row in rows:
        row["difference"] = difference(row, rows[0])
    images, sure, unsure, untold = make_notes(rows)
    assert "all arms" in images and "32 pixels" in images
    assert "better (+10.00 ± 2.27)" in sure and "same" not in sure
    assert "same" in unsure and "better" not in unsure and "short" in untold
    assert "**+10.00 ± 2.27** |" in make_table(rows) and " +0.33 ± " in make_table(rows)
    rows[1]["preparation"] = {**PREPARED, "crop_pct": 0.5}
    others, own = make_notes(rows)[:2]
    assert "a, same, short" in others and "better" in own and "crop 0.5" in own
    points = [row_of(arm, base + n, base + n + 1, n=n) for arm, base in (("a", 10), ("b", 50)) for n in (1, 2)]
    for row in points:
        row["difference"] = difference(row, points[0 if row["point"]["n"] == 1 else 1])
    _, first, second = make_notes(points)
    assert first.startswith("At n 1") and second.startswith("At n 2") and "b (+40.00" in first


# Progress


def test_how_far_a_run_is_comes_from_its_log():
    log = "epoch 1/3, update 10/20: loss 2\nepoch 1/3: training loss 1\nepoch 2/3, update 5/20: loss 1, 0:00:01 left\n"
    assert progress.epochs_in_log(log) == 1.25
    assert progress.epochs_in_log("starting\n") == 0


def test_the_pace_of_a_run_leaves_out_the_start_of_its_process(monkeypatch):
    """Ten seconds of start, then a tenth of the run every two seconds: 30 seconds, from the second mark on."""
    clock = iter([0.0, 5.0, 12.0, 14.0, 22.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    pace = progress._Pace(0.0)
    assert [pace.seconds(share) for share in (0.0, 0.1)] == [None, None]
    assert [pace.seconds(share) for share in (0.2, 0.6)] == [pytest.approx(30), pytest.approx(30)]


def test_progress_says_the_epoch_and_the_percent(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    monkeypatch.setattr(logging.getLogger("raftmlp"), "propagate", True)
    caplog.set_level(logging.INFO, "raftmlp")
    runs = plan_of("a", "b").runs()
    shown = progress.StudyProgress(runs, dict(a=4, b=4), {"a/seed-0": SUMMARY}, 1)
    shown.show([(runs[1], 1.5)])
    assert "1 of 4 runs" in caplog.messages[-1] and "b/seed-0 epoch 2/4, 38%" in caplog.messages[-1]
    shown.ended(runs[1], SUMMARY, "")
    assert "run 2/4, b/seed-0: top-1 7.00 %, 1 s; " in caplog.messages[-1] and "left" in caplog.messages[-1]


# The folder


def test_the_default_folder_is_not_that_of_a_training_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.default_folder("train") == Path("runs/studies/train")
    folder = StudyFolder("runs/paper")  # as version 0.2 named it
    folder.open(plan_of("a"))
    assert command.default_folder("paper") == folder.path
    with pytest.raises(UserError, match="study"):
        RunFolder("runs/paper").prepare(None, True)


def test_the_best_weights_are_kept_on_demand_only(tmp_path, fake_training):
    """Runs that ended before keep their checkpoints where nobody asks for less."""
    plan = plan_of("a")
    run(plan)
    saved = Path("out/runs/a/seed-0/last.pth.tar")
    saved.touch()
    run(plan)
    assert saved.exists()
    StudyFolder("out").keep_best(plan.runs())  # nothing to read there: all stays
    assert saved.exists()


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
    facts, _ = command.check_cells(plan, path)
    macs = [known["macs"] for known in facts.values()]
    assert len({json.dumps(known["preparation"]) for known in facts.values()}) == 1
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
    rows = json.loads(Path(file).read_text())["rows"]
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows]


def test_killed_and_resumed_it_ends_the_same(run_command, tmp_path):
    write_study()
    folder = Path("runs/studies/study")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "raftmlp", "study", "study.yaml", "--jobs", "1"]
    killed = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "study.csv").exists())  # the first run has ended, the second has begun or will
    wait_for(lambda: (folder / "runs/mean/seed-0/train.log").exists())
    killed.kill()
    killed.wait()
    assert len(list((folder / "runs").rglob("summary.json"))) < 4
    status, out, err = run_command(command, "study.yaml")
    assert status == 0, err
    assert "1 of 4 runs are done already" in out or "2 of 4 runs are done already" in out
    rows = figures(folder / "study.json")
    assert [row["runs"] for row in rows] == [2, 2]
    for row in rows:  # as ordinary runs of raftmlp train, which no one has interrupted, do
        for seed, top1 in row["top1"].items():
            options = [
                "-c",
                folder / f"options/{row['arm']}.yaml",
                "--seed",
                seed,
                "--output",
                "alone",
                "--overwrite",
            ]
            assert run_command(train, *options)[0] == 0
            assert json.loads(Path("alone/summary.json").read_text())["last"]["eval_top1"] == top1
    assert {path.name for path in folder.iterdir()} >= {"study.csv", "study.json", "study.md", "study.png"}
    status, out, err = run_command(command, "study.yaml", "--keep", "best")
    assert status == 0 and "4 of 4 runs are done already" in out
    assert figures(folder / "study.json") == rows

    # of every finished run the best weights are left, which are protected
    size = Path("alone/model_best.pth.tar").stat().st_size
    for run in folder.glob("runs/*/seed-*"):
        assert {path.name for path in run.glob("*.tar")} == {"model_best.pth.tar"}
        assert (run / "model_best.pth.tar").stat().st_size < size / 2
        assert "optimizer" not in load_checkpoint(run / "model_best.pth.tar")
    options = ["-c", folder / "options/mean.yaml", "--output", run]
    before = (run / "model_best.pth.tar").read_bytes()
    for more in ([], ["--resume"]):
        status, _, err = run_command(train, *options, *more)
        assert status == 2 and "--overwrite" in err and (run / "model_best.pth.tar").read_bytes() == before
    status, out, err = run_command(validate, "--checkpoint", run / "model_best.pth.tar", "--dataset", "digits")
    assert status == 0, err

"""Train several networks or settings with several seeds, and compare them: one YAML file, one command.

    raftmlp study studies/paper --jobs 2
    raftmlp study mine.yaml --dry-run

The file has the keys recipe (options of raftmlp train that all runs share; base names a recipe to start from), arms (a
name and the options that it changes, for each), seeds, and, where every arm is to be tried at several values of
options, points:

    recipe: {base: finetune/folder, data_dir: photos, img_size: 128, epochs: 20}
    seeds: [0, 1, 2]
    arms:
      raftmlp: {model: raftmlp_s}
      resnet: {model: resnet18}
    points: [{train_num_samples: 200}, {train_num_samples: 1000}]

All arms get images of the same size, prepared in the same way: where neither recipe, points nor the arm set
img_size, interpolation, crop_pct, crop_mode, mean or std, that of the first arm's model counts for all.

Every run is one of raftmlp train in a folder of its own. Writes into the output folder: study.md (the table, and which
arms differ from the first), study.csv (a row for every run), study.json, study.png, options/ and runs/. The same
command resumes a study that was interrupted, and tries runs again that failed; what is done is not run again. The same
seeds give the same figures on one machine, but for seconds.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import ModelSettings
from ..data.settings import ImageSettings
from ..data.workers import processor_count
from ..errors import UserError, first_words
from ..settings import between
from ..study.plan import PREPARATION, Cell, Plan
from ..train.settings import TrainSettings
from .config_files import find_config, read_config
from .console import say
from .launcher import load_package
from .options import Parser, option_type
from .train import build_parser as build_train_parser


def build_parser() -> Parser:
    parser = Parser("%(prog)s CONFIG [OPTION ...]", yaml_config=False, description=__doc__)
    parser.add_argument("study", metavar="CONFIG", help="YAML file, or the name of a shipped one (studies/paper)")
    text = "folder of the study (default: runs/studies/ and the file's name)"
    parser.add_argument("--output", metavar="DIR", help=text)
    text = "runs at a time, one thread each (default: as many as there are processors; 1 where there is a GPU)"
    parser.add_argument("--jobs", type=option_type(between(1, 1024)), metavar="N", help=text)
    text = (
        "checkpoints of finished runs to keep: all, or the best weights of each only, without the optimizer (default: "
        "best, for runs that end now; if it is given, for runs that ended before too)"
    )
    parser.add_argument("--keep", choices=("all", "best"), help=text)
    text = "check every arm, print parameters and multiply-accumulates, and end"
    parser.add_argument("--dry-run", action="store_true", help=text)
    return parser


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Let an error that is raised inside begin with where it comes from."""
    try:
        yield
    except Exception as error:  # models of timm's list raise anything
        raise UserError(f"{where}: {first_words(error)}") from error


def read_plan(path: Path) -> Plan:
    """Return the study that a file describes.

    Raises:
        UserError: If it is no study; the message names the file.
    """
    content = read_config(path)
    recipe = content.get("recipe")
    if isinstance(recipe, dict) and "base" in recipe:
        base = recipe.pop("base")
        beside = path.parent / base
        below = read_config(beside if beside.is_file() else find_config(base))
        ours = ("export", "output", "seed")  # the study gives every run its own
        content["recipe"] = {**{key: value for key, value in below.items() if key not in ours}, **recipe}
    with naming(str(path)):
        return Plan(**content)


def own_preparation(settings: TrainSettings) -> dict[str, Any]:
    """Return how a model prepares images where no option says it: the values of PREPARATION."""
    from ..data.images import data_config
    from ..model.create import create_model

    settings = replace(ModelSettings.select(vars(settings)), img_size=None, pretrained=False)
    return as_options(data_config(ImageSettings(), create_model(settings, to_train=True)))


def as_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of PREPARATION in a data config."""
    values = {**config, "img_size": config["input_size"][-2:]}
    return {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in PREPARATION}


def build(cell: Cell, settings: TrainSettings, seed: int) -> tuple[dict[str, Any], int]:
    """Build a cell with its data; return its cost and how images are prepared, and how many epochs a run has."""
    from ..evaluate.speed import count_macs
    from ..train.trainer import Trainer

    unset = [key for key in PREPARATION if getattr(settings, key) is None]
    settings = replace(settings, seed=seed, **{key: cell.options.get(key) for key in unset})
    model = Trainer.from_settings(settings).train_step.model.to("cpu")
    channels, *own = model.pretrained_cfg["input_size"]
    shape = (channels, *(settings.size or own))
    facts = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, shape),
        preparation=as_options({**model.pretrained_cfg, "input_size": shape}),
    )
    return facts, settings.epochs


def default_folder(name: str) -> Path:
    """Return the folder of a study by its name; one that version 0.2 began is continued where it is."""
    folder, before = Path("runs/studies") / name, Path("runs") / name
    return before if (before / "study.yaml").exists() and not folder.exists() else folder


def default_jobs() -> int:
    """Return how many runs go at a time: one a processor, or a single one where there is a GPU."""
    from ..device import find_device

    return processor_count() if find_device(None).type == "cpu" else 1


def main() -> int:
    args = build_parser().parse_args()
    path = find_config(args.study)
    plan, name = read_plan(path), path.stem
    settings = {}
    for cell in plan.cells():
        options = build_train_parser().parse_options(cell.options, f"{path}: {cell.name}")
        settings[cell.name] = TrainSettings.select(vars(options))
    load_package()
    import torch

    from ..study.report import make_notes, make_rows, make_table, write_results
    from ..study.runner import StudyFolder, run_study

    torch.set_num_threads(1)
    first = plan.cells()[0].name
    with naming(f"{path}: {first}"):
        plan = plan.with_preparation(own_preparation(settings[first]))
    folder = StudyFolder(args.output or default_folder(name), lambda cell: own_preparation(settings[cell.name]))
    folder.check(plan)
    facts, epochs = {}, {}
    for cell in plan.cells():
        with naming(f"{path}: {cell.name}"):
            facts[cell.name], epochs[cell.name] = build(cell, settings[cell.name], plan.seeds[0])
    runs, jobs = plan.runs(), args.jobs or default_jobs()
    say(f"{name}: {len(facts)} arms x {len(plan.seeds)} seeds, {len(runs)} runs of raftmlp train, {jobs} at a time")

    def report(failures: dict[str, str]) -> list[dict]:
        rows = make_rows(folder, plan, facts, failures)
        if not args.dry_run:
            write_results(folder, name, plan, rows)
        return rows

    if args.dry_run:
        rows, failures = report({}), {}
    else:
        with folder.open(plan):
            for run in runs if args.keep == "best" else ():
                folder.keep_best(run)
            failures = run_study(folder, runs, epochs, jobs, report, args.keep or "best")
            rows = report(failures or {})
    say("\n".join([make_table(rows), *make_notes(rows)]))
    if args.dry_run:
        return 0
    say(f"in {folder.path}: study.md, study.csv, study.json, study.png, runs/")
    if failures is None:
        say("stopped, and saved: the same command continues")
        return 130
    for run, reason in failures.items():
        log = folder.path / "runs" / run / "train.log"
        raise UserError(
            f"{len(failures)} of {len(runs)} runs failed, which the table marks; {run}: {reason} (more in {log}); "
            f"the same command tries them again"
        )
    return 0

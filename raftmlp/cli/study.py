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

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.workers import processor_count
from ..errors import MissingFileError, UserError, first_words
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
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the study (default: runs/studies/ and the file's name)"
    )
    parser.add_argument(
        "--jobs",
        type=option_type(between(1, 1024)),
        metavar="N",
        help="runs at a time, one thread each (default: as many as there are processors; 1 where there is a GPU)",
    )
    parser.add_argument(
        "--keep",
        choices=("all", "best"),
        help="checkpoints of finished runs to keep: all, or the best weights of each only, without the optimizer "
        "(default: best, for runs that end now; if it is given, for runs that ended before too)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check every arm, print parameters and multiply-accumulates, and end"
    )
    return parser


def read_plan(path: Path) -> Plan:
    """Return the study that a file describes.

    Raises:
        UserError: If it cannot be read, is no study, or an arm has an unknown option or a wrong value; the message
            names the file.
    """
    content = read_config(path)
    recipe = content.get("recipe")
    if isinstance(recipe, dict) and "base" in recipe:
        base = recipe.pop("base")
        if not isinstance(base, str):
            raise UserError(f"{path}: the recipe's base must be the name of a config, not {base!r}")
        beside = path.parent / base
        try:
            content["recipe"] = {**read_config(beside if beside.is_file() else find_config(base)), **recipe}
        except MissingFileError as error:
            raise MissingFileError(f"{path}: recipe: {error}") from error
        for name in ("export", "output", "seed"):  # the study gives every run its own
            content["recipe"].pop(name, None)
    try:
        plan = Plan.from_content(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for cell in plan.cells():
        build_train_parser().parse_options(cell.options, f"{path}: {cell.name}")
    return plan


def own_preparation(cell: Cell, path: Path) -> dict[str, Any]:
    """Return how the model of a cell prepares images where no option says it: the values of PREPARATION.

    Raises:
        UserError: If the model cannot be built; the message names the cell.
    """
    from ..config import ModelSettings
    from ..data.images import data_config
    from ..data.settings import ImageSettings
    from ..model.create import create_model

    where = f"{path}: {cell.name}"
    args = build_train_parser().parse_options(cell.options, where)
    try:
        settings = replace(ModelSettings.select(vars(args)), img_size=None, pretrained=False)
        return as_options(data_config(ImageSettings(), create_model(settings, to_train=True)))
    except Exception as error:  # constructors raise anything on arguments that they cannot take
        raise UserError(f"{where}: {first_words(error)}") from error


def pin_preparation(plan: Plan, path: Path) -> Plan:
    """Return the plan with the preparation of the first arm's model for all arms, where no option says it.

    Raises:
        UserError: If that model cannot be built.
    """
    if all(plan.recipe.get(key) is not None for key in PREPARATION):
        return plan
    return plan.with_preparation(own_preparation(plan.cells()[0], path))


def as_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of PREPARATION in a data config."""
    values = {**config, "img_size": config["input_size"][-2:]}
    return {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in PREPARATION}


def check_cells(plan: Plan, path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, int]]]:
    """Build every arm at every point, with its data, and return what is known of them, by the names of the cells.

    Returns:
        Parameters, multiply-accumulates an image and how images are prepared; epochs, and the updates of one.

    Raises:
        UserError: If one cannot be built; the message names it.
    """
    from ..evaluate.speed import count_macs
    from ..train.trainer import Trainer

    facts, lengths = {}, {}
    for cell in plan.cells():
        where, parser = f"{path}: {cell.name}", build_train_parser()
        args = parser.parse_options(cell.options, where)
        parser.load_and_check(args)
        try:
            settings = TrainSettings.select({**vars(args), "seed": plan.seeds[0]})
            trainer = Trainer.from_settings(settings)
            shape = trainer.train_step.model.pretrained_cfg["input_size"]
            size = settings.size or shape[-2:]
            model = trainer.train_step.model.to("cpu")
            facts[cell.name] = dict(
                parameters=sum(p.numel() for p in model.parameters()),
                macs=count_macs(model, (shape[0], *size)),
                preparation=as_options({**model.pretrained_cfg, "input_size": (shape[0], *size)}),
            )
            lengths[cell.name] = settings.epochs, trainer.updates_per_epoch
        except Exception as error:  # models of timm's list raise anything on sizes that they cannot take
            raise UserError(f"{where}: {first_words(error)}") from error
    return facts, lengths


def default_folder(name: str) -> Path:
    """Return the folder of a study by its name; one that version 0.2 began is continued where it is."""
    folder, before = Path("runs/studies") / name, Path("runs") / name
    return before if (before / "study.yaml").exists() and not folder.exists() else folder


def default_jobs() -> int:
    """Return how many runs go at a time: one a processor, or a single one where there is a GPU."""
    from ..device import find_device

    return processor_count() if find_device(None).type == "cpu" else 1


def show(rows: list[dict]) -> None:
    """Print a table and its notes."""
    from ..study import make_notes, make_table

    say(make_table(rows))
    for note in make_notes(rows):
        say(note)


def main() -> int:
    args = build_parser().parse_args()
    path = find_config(args.study)
    plan, name = read_plan(path), path.stem
    load_package()
    import torch

    from ..study import StudyFolder, make_rows, run_study, write_results

    torch.set_num_threads(1)
    plan = pin_preparation(plan, path)
    folder = StudyFolder(args.output or default_folder(name), lambda cell: own_preparation(cell, path))
    folder.check(plan)
    facts, lengths = check_cells(plan, path)
    runs, jobs = len(plan.runs()), args.jobs or default_jobs()
    say(f"{name}: {len(plan.cells())} arms x {len(plan.seeds)} seeds, {runs} runs of raftmlp train, {jobs} at a time")
    if args.dry_run:
        show(make_rows(folder, plan, facts, {}))
        return 0

    def report(failures: dict[str, str]) -> list[dict]:
        rows = make_rows(folder, plan, facts, failures)
        write_results(folder, name, plan, rows)
        return rows

    folder.open(plan)
    try:
        if args.keep == "best":
            folder.keep_best(plan.runs())
        failures = run_study(folder, plan, lengths, jobs, report, args.keep or "best")
        rows = report(failures or {})
    finally:
        folder.close()
    show(rows)
    say(f"in {folder.path}: study.md, study.csv, study.json, study.png, runs/")
    if failures is None:
        say("stopped, and saved: the same command continues")
        return 130
    if failures:
        first = next(iter(failures))
        raise UserError(
            f"{len(failures)} of {runs} runs failed, which the table marks; {first}: {failures[first]} (more in "
            f"{folder.path / 'runs' / first / 'train.log'}); the same command tries them again"
        )
    return 0

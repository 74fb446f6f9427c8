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

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ..study.runner import StudyFolder


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
        UserError: If it is no study; the message names the file.
    """
    content = read_config(path)
    recipe = content.get("recipe")
    if isinstance(recipe, dict) and "base" in recipe:
        base = recipe.pop("base")
        beside = path.parent / base
        below = read_config(beside if beside.is_file() else find_config(base))
        for name in ("export", "output", "seed"):  # the study gives every run its own
            below.pop(name, None)
        content["recipe"] = {**below, **recipe}
    try:
        return Plan(**content)
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error


class Arms:
    """The options of every arm at every point, parsed as `raftmlp train` does.

    Args:
        plan: The study.
        path: Its file, which messages name.
    """

    def __init__(self, plan: Plan, path: Path):
        self.path, self._parsed = path, {}
        for cell in plan.cells():
            parser = build_train_parser()
            self._parsed[cell.name] = parser, parser.parse_options(cell.options, self.where(cell))

    def where(self, cell: Cell) -> str:
        """Return the beginning of a message on a cell."""
        return f"{self.path}: {cell.name}"

    def settings(self, cell: Cell, **changes: Any) -> TrainSettings:
        """Return the settings of a cell, checked, with the preparation of its options where they set none itself."""
        parser, args = self._parsed[cell.name]
        parser.load_and_check(args)
        settings = TrainSettings.select({**vars(args), **changes})
        unset = [key for key in PREPARATION if getattr(settings, key) is None]
        return replace(settings, **{key: cell.options.get(key) for key in unset})

    def own_preparation(self, cell: Cell) -> dict[str, Any]:
        """Return how the model of a cell prepares images where no option says it: the values of PREPARATION."""
        from ..data.images import data_config
        from ..model.create import create_model

        settings = ModelSettings.select({**vars(self.settings(cell)), "img_size": None, "pretrained": False})
        try:
            return as_options(data_config(ImageSettings(), create_model(settings, to_train=True)))
        except Exception as error:  # constructors raise anything on arguments that they cannot take
            raise UserError(f"{self.where(cell)}: {first_words(error)}") from error

    def facts(self, cell: Cell, seed: int) -> tuple[dict[str, Any], int]:
        """Build a cell with its data; return its cost and how images are prepared, and how many epochs a run has."""
        from ..evaluate.speed import count_macs
        from ..train.trainer import Trainer

        settings = self.settings(cell, seed=seed)
        try:
            model = Trainer.from_settings(settings).learner.model.to("cpu")
            channels, *own = model.pretrained_cfg["input_size"]
            shape = (channels, *(settings.size or own))
            macs = count_macs(model, shape)
        except Exception as error:  # models of timm's list raise anything on sizes that they cannot take
            raise UserError(f"{self.where(cell)}: {first_words(error)}") from error
        preparation = as_options({**model.pretrained_cfg, "input_size": shape})
        parameters = sum(p.numel() for p in model.parameters())
        return dict(parameters=parameters, macs=macs, preparation=preparation), settings.epochs


def as_options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of PREPARATION in a data config."""
    values = {**config, "img_size": config["input_size"][-2:]}
    return {key: list(values[key]) if isinstance(values[key], tuple) else values[key] for key in PREPARATION}


def default_folder(name: str) -> Path:
    """Return the folder of a study by its name; one that version 0.2 began is continued where it is."""
    folder, before = Path("runs/studies") / name, Path("runs") / name
    return before if (before / "study.yaml").exists() and not folder.exists() else folder


def default_jobs() -> int:
    """Return how many runs go at a time: one a processor, or a single one where there is a GPU."""
    from ..device import find_device

    return processor_count() if find_device(None).type == "cpu" else 1


def run(args: Namespace, plan: Plan, name: str, folder: "StudyFolder", facts: dict[str, tuple], jobs: int) -> int:
    """Run a study, show its table, and return the exit status."""
    from ..study.report import make_rows, write_results
    from ..study.runner import run_study

    costs, epochs = ({cell: known[i] for cell, known in facts.items()} for i in (0, 1))

    def report(failures: dict[str, str]) -> list[dict]:
        rows = make_rows(folder, plan, costs, failures)
        write_results(folder, name, plan, rows)
        return rows

    folder.open(plan)
    try:
        if args.keep == "best":
            folder.keep_best(plan.runs())
        failures = run_study(folder, plan, epochs, jobs, report, args.keep or "best")
        show(report(failures or {}))
    finally:
        folder.close()
    say(f"in {folder.path}: study.md, study.csv, study.json, study.png, runs/")
    if failures is None:
        say("stopped, and saved: the same command continues")
        return 130
    if failures:
        first = next(iter(failures))
        log = folder.path / "runs" / first / "train.log"
        raise UserError(
            f"{len(failures)} of {len(plan.runs())} runs failed, which the table marks; {first}: {failures[first]} "
            f"(more in {log}); the same command tries them again"
        )
    return 0


def show(rows: list[dict]) -> None:
    """Print a table and its notes."""
    from ..study.report import make_notes, make_table

    say("\n".join([make_table(rows), *make_notes(rows)]))


def main() -> int:
    args = build_parser().parse_args()
    path = find_config(args.study)
    plan, name = read_plan(path), path.stem
    arms = Arms(plan, path)
    load_package()
    import torch

    from ..study.report import make_rows
    from ..study.runner import StudyFolder

    torch.set_num_threads(1)
    plan = plan.with_preparation(arms.own_preparation(plan.cells()[0]))
    folder = StudyFolder(args.output or default_folder(name), arms.own_preparation)
    folder.check(plan)
    facts = {cell.name: arms.facts(cell, plan.seeds[0]) for cell in plan.cells()}
    runs, jobs = len(plan.runs()), args.jobs or default_jobs()
    say(f"{name}: {len(facts)} arms x {len(plan.seeds)} seeds, {runs} runs of raftmlp train, {jobs} at a time")
    if args.dry_run:
        show(make_rows(folder, plan, {cell: known[0] for cell, known in facts.items()}, {}))
        return 0
    return run(args, plan, name, folder, facts, jobs)

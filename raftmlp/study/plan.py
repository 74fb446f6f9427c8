"""What a study runs: arms, points and seeds, each combination an ordinary training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from ..errors import UserError
from ..settings import Settings, between, settings

__all__ = ["PREPARATION", "Cell", "Plan", "Run"]

PREPARATION = ("img_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")  # which models set differently
OURS = ("base", "export", "output", "overwrite", "resume", "seed")  # options that the study itself gives
Options = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9 ._+-]{0,58}[A-Za-z0-9_+-])?$")]  # of a folder too


@dataclass(frozen=True)
class Cell:
    """An arm at a point of a study: one row of its table, one run a seed.

    Args:
        arm: The arm's name.
        point: The options of the point, none in a study without points.
        options: All options of `raftmlp train`, but the seed and the folder.
    """

    arm: str
    point: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The arm, and the first option of the point: "mixer", or "mixer/train_num_samples-100"."""
        return "/".join([self.arm, *(f"{key}-{value}" for key, value in list(self.point.items())[:1])])


@dataclass(frozen=True, eq=False)
class Run:
    """A training run of a study."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """The name of the run, and of its folder below the study's."""
        return f"{self.cell.name}/seed-{self.seed}"


@settings
class Plan(Settings):
    """A study: every arm at every point with every seed.

    A run's options are those of the recipe, over them those of the point, over them those of the arm. ``model_kwargs``
    of an arm are put over the recipe's one by one, unless the arm names a model: then they are all that there are.
    Images are loaded in the process that trains (``workers`` 0) where the recipe does not say otherwise.

    Args:
        recipe: Options of `raftmlp train`, by their long names with underscores.
        arms: The options of every arm, by its name.
        seeds: The seeds, each once.
        points: Options to try every arm at, such as numbers of images; the first option of each is the axis of the
            picture. None is a single point without options.

    Raises:
        UserError: If one of them is not so.
    """

    recipe: Options
    arms: Annotated[dict[Name, Options], Field(min_length=1)]
    seeds: Annotated[list[between(0, 2**32 - 1)], Field(min_length=1)]
    points: Annotated[list[Options], Field(min_length=1)] = field(default_factory=lambda: [{}])

    def __post_init__(self):
        shared = {key for point in self.points for key in point}
        for where, options in {"recipe": self.recipe, **self.arms, "points": shared}.items():
            if ours := {*options} & {*OURS}:
                raise UserError(f"{where}: {min(ours)} is no option here: the study gives it to every run")
            if where in self.arms and (common := {*options} & shared):
                raise UserError(f"{where}: {min(common)} is an option of the points, which every arm is tried at")
        axis = [next(iter(point.items()), (None, 0)) for point in self.points]
        if len({key for key, _ in axis}) > 1 or not all(type(value) in (int, float) for _, value in axis):
            raise UserError(f"points must all begin with the same option, the picture's axis, and a number, not {axis}")
        names = [run.name.lower() for run in self.runs()]
        if len({*names}) < len(names):
            raise UserError("seeds and points must differ, and arms in more than capital letters")

    def with_preparation(self, preparation: Mapping[str, Any]) -> "Plan":
        """Return the plan with values for PREPARATION, which count where neither recipe, point nor arm sets one."""
        unset = {key: value for key, value in preparation.items() if self.recipe.get(key) is None}
        return replace(self, recipe={**self.recipe, **unset})

    def cells(self) -> list[Cell]:
        """Return every arm at every point."""
        pairs = [(name, arm, point) for name, arm in self.arms.items() for point in self.points]
        return [Cell(name, dict(point), self._options(arm, point)) for name, arm, point in pairs]

    def runs(self) -> list[Run]:
        """Return all runs, the first seed of all arms before the second: a study that is stopped compares all arms."""
        return [Run(cell, seed) for seed in self.seeds for cell in self.cells()]

    def _options(self, arm: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
        parts = [arm] if "model" in arm else [self.recipe, point, arm]
        kwargs = {key: value for part in parts for key, value in part.get("model_kwargs", {}).items()}
        return {"workers": 0, **self.recipe, **point, **arm, "model_kwargs": kwargs}

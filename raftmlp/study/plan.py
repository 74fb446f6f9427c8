"""What a study runs: arms, points and seeds, each combination an ordinary training run."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UserError

__all__ = ["PREPARATION", "Cell", "Plan", "Run"]

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9 ._+-]{0,58}[A-Za-z0-9_+-])?")  # of an arm, which is a folder's too
PREPARATION = ("img_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")  # which models set differently
OURS = ("base", "export", "output", "overwrite", "resume", "seed")  # options that the study itself gives


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


@dataclass(frozen=True)
class Run:
    """A training run of a study."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """The name of the run, and of its folder below the study's."""
        return f"{self.cell.name}/seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
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

    recipe: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    seeds: Sequence[int]
    points: Sequence[dict[str, Any]] = ({},)

    def __post_init__(self):
        seeds, points = self.seeds, self.points
        for name, value in dict(seeds=seeds, points=points).items():
            if not isinstance(value, list | tuple) or not value:
                raise UserError(f"{name} must be a list, not {value!r}")
        if not isinstance(self.arms, Mapping) or not self.arms:
            raise UserError(f"arms must be a mapping from names to options, not {self.arms!r}")
        for name in self.arms:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UserError(f"arm {name!r}: a name has 1 to 60 letters, digits and any of ' ._+-'")
        arms = {f"arm {name}": options for name, options in self.arms.items()}
        for where, options in [("recipe", self.recipe), *arms.items(), *(("points", point) for point in points)]:
            if not isinstance(options, Mapping) or not isinstance(options.get("model_kwargs", {}), Mapping):
                raise UserError(f"{where}: it, and its model_kwargs, must be a mapping, not {options!r}")
            if ours := options.keys() & {*OURS}:
                raise UserError(f"{where}: {min(ours)} is no option here: the study gives it to every run")
            if where in arms and (common := options.keys() & {key for point in points for key in point}):
                raise UserError(f"{where}: {min(common)} is an option of the points, which every arm is tried at")
        if len({*seeds}) < len(seeds) or not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds):
            raise UserError(f"seeds must be different whole numbers from 0 to {2**32 - 1}, not {seeds}")
        axis = [next(iter(point.items()), (None, 0)) for point in points]
        if len({key for key, _ in axis}) > 1 or not all(type(value) in (int, float) for _, value in axis):
            raise UserError(f"points must all begin with the same option, the picture's axis, and a number, not {axis}")
        if len({cell.name.lower() for cell in self.cells()}) < len(arms) * len(points):
            raise UserError("the names of arms must differ in more than capital letters, points in their first option")

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

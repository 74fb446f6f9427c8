"""What a study runs: arms, points and seeds, each combination an ordinary training run."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..checkpoints.description import shorten
from ..errors import UserError

__all__ = ["PREPARATION", "Cell", "Plan", "Run"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,59}")  # of an arm, which is a folder's too
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
    seeds: tuple[int, ...]
    points: tuple[dict[str, Any], ...] = ({},)

    def __post_init__(self):
        _check_options("recipe", self.recipe)
        if not isinstance(self.arms, Mapping) or not self.arms:
            raise UserError(f"arms must be a mapping from names to options, not {shorten(self.arms)}")
        for name, options in self.arms.items():
            if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith((".", " ")):
                raise UserError(
                    f"arm {shorten(name)}: a name has 1 to 60 letters, digits and any of ' ._+-', and begins with a "
                    f"letter or a digit"
                )
            _check_options(f"arm {name}", options)
        if len({name.lower() for name in self.arms}) < len(self.arms):
            raise UserError("arms must differ in more than capital letters: their names are those of folders too")
        _check_seeds(self.seeds)
        _check_points(self.points)
        for name, options in self.arms.items():
            if common := options.keys() & {key for point in self.points for key in point}:
                raise UserError(f"arm {name}: {min(common)} is an option of the points, which every arm is tried at")

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "Plan":
        """Return the plan that the content of a study's file describes.

        Raises:
            UserError: If a key is unknown or missing, or a value is not as it must be.
        """
        known = [entry.name for entry in fields(cls)]
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
                raise UserError(f"unknown key {shorten(key)}; {hint}")
        for key in ("recipe", "arms", "seeds"):
            if key not in content:
                raise UserError(
                    f"the key {key} is missing; a study has recipe, arms, seeds, and points if there are any"
                )
        values = dict(content)
        for key in values.keys() & {"seeds", "points"}:
            if not isinstance(values[key], list | tuple):
                raise UserError(f"{key} must be a list, not {shorten(values[key])}")
            values[key] = tuple(values[key])
        return cls(**values)

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
        options = {"workers": 0, **self.recipe, **point, **arm}
        if "model" in arm:
            options["model_kwargs"] = arm.get("model_kwargs", {})
        else:
            options["model_kwargs"] = {
                key: value for part in (self.recipe, point, arm) for key, value in part.get("model_kwargs", {}).items()
            }
        return options


def _check_options(where: str, options: Any) -> None:
    if not isinstance(options, Mapping):
        raise UserError(f"{where} must be a mapping from options to values, not {shorten(options)}")
    for key in options:
        if not isinstance(key, str):
            raise UserError(f"{where}: the names of options are texts, not {shorten(key)}")
        if key in OURS:
            raise UserError(f"{where}: {key} is no option of an arm: the study gives every run its seed and its folder")
    if not isinstance(options.get("model_kwargs", {}), Mapping):
        raise UserError(f"{where}: model_kwargs must be a mapping, not {shorten(options['model_kwargs'])}")


def _check_seeds(seeds: Any) -> None:
    if not seeds:
        raise UserError("seeds must be one or more whole numbers, not none")
    for i, seed in enumerate(seeds):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"seeds must be whole numbers from 0 to {2**32 - 1}, not {shorten(seed)}")
        if seed in seeds[:i]:
            raise UserError(f"seeds must differ: {seed} stands there twice")


def _check_points(points: Any) -> None:
    if not points:
        raise UserError("points must be one or more mappings from options to values, not none")
    for point in points:
        _check_options("points", point)
    if points == ({},):
        return
    axes = {next(iter(point), None) for point in points}
    if len(axes) > 1 or None in axes:
        names = ", ".join(sorted(map(str, axes)))
        raise UserError(f"points must all begin with the same option, the picture's axis, not with {names}")
    axis = axes.pop()
    values = [point[axis] for point in points]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise UserError(f"points: {axis}, the picture's axis, must be numbers, not {shorten(values)}")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise UserError(f"points must differ: {axis} {value} stands there twice")

"""What came out of a study: rows of figures, differences between them, a table, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..files import save_figure, write_csv, write_json, write_text
from ..train.run_logger import versions
from .plan import PREPARATION, Plan, Run
from .runner import StudyFolder

__all__ = ["difference", "draw_study", "make_notes", "make_rows", "make_table", "shown_difference", "write_results"]


def make_rows(
    folder: StudyFolder, plan: Plan, facts: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the figures of every arm at every point.

    The accuracy is that after the last epoch: the best epoch would be chosen on the images that it is measured on.
    The deviation is that of a sample (n - 1). All figures but ``seconds`` are the same at every run on one machine.

    Args:
        folder: The study's folder.
        plan: The study.
        facts: ``parameters``, ``macs`` (multiply-accumulates an image) and ``preparation`` (how images are prepared),
            by the names of the cells.
        failures: The reasons of runs that failed, by their names.
    """
    rows = []
    for cell in plan.cells():
        runs = [Run(cell, seed) for seed in plan.seeds]
        summaries = {run.seed: folder.summary(run) for run in runs}
        done = {seed: summary for seed, summary in summaries.items() if summary}
        top1 = {seed: summary["last"]["eval_top1"] for seed, summary in done.items()}
        values = list(top1.values())
        rows.append(
            dict(
                arm=cell.arm,
                point=cell.point,
                runs=len(done),
                planned=len(runs),
                top1_mean=mean(values) if values else None,
                top1_deviation=stdev(values) if len(values) > 1 else None,
                top1=top1,
                best_top1={seed: summary["best_top1"] for seed, summary in done.items()},
                **facts[cell.name],
                seconds=round(mean(summary["seconds"] for summary in done.values()), 1) if done else None,
                seconds_of={seed: summary["seconds"] for seed, summary in done.items()},
                failures={run.seed: failures[run.name] for run in runs if run.name in failures},
            )
        )
    for row in rows:
        row["difference"] = difference(row, _first(rows, row))
    return rows


def _first(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of the first arm at a row's point."""
    return next(other for other in rows if other["point"] == row["point"])


def difference(row: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float] | None:
    """Return how far the top-1 of a row is from another's, and the 95 % interval of that by Welch's t-test.

    Returns:
        The difference of the means, ``mean``, and the interval's half width, ``half_width``, both in points. None for
        a row and itself, and where the seeds cannot tell: fewer than two of them, or all with the same figure.
    """
    from scipy.stats import ttest_ind  # takes a second

    samples = [list(r["top1"].values()) for r in (row, first)]
    if row is first or min(map(len, samples)) < 2 or all(len({*values}) == 1 for values in samples):
        return None
    low, high = map(float, ttest_ind(*samples, equal_var=False).confidence_interval(0.95))
    return dict(mean=(low + high) / 2, half_width=(high - low) / 2)


def _is_sure(difference: Mapping[str, float]) -> bool:
    return abs(difference["mean"]) > difference["half_width"]


def shown_difference(difference: Mapping[str, float] | None) -> str:
    """Return a difference in words, bold where its interval leaves out 0: "**+10.00 ± 2.27**"."""
    if not difference:
        return ""
    words = f"{difference['mean']:+.2f} ± {difference['half_width']:.2f}"
    return f"**{words}**" if _is_sure(difference) else words


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table of Markdown, aligned; arms that failed or are not finished are marked."""
    axis = next(iter(rows[0]["point"]), None)
    titles = ["top-1 in %", "deviation", "from the first arm", "runs", "parameters", "MMACs", "s a run"]
    lines = [["arm", *([axis] if axis else []), *titles]]
    for row in rows:
        marks = f"{row['runs']} of {row['planned']}" if row["runs"] < row["planned"] else str(row["runs"])
        if row["failures"]:
            marks += f", {len(row['failures'])} failed"
        figures = [_shown(row[key], 2) for key in ("top1_mean", "top1_deviation")]
        figures.append(shown_difference(row["difference"]))
        cost = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}", _shown(row["seconds"], 0)]
        lines.append([row["arm"], *([str(row["point"][axis])] if axis else []), *figures, marks, *cost])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - (i > 0)) + ":" * (i > 0) for i, width in enumerate(widths)])
    cells = [[f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def make_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a table of rows does not say: how images are prepared, and which arms differ from the first."""
    prepared: dict[str, list[str]] = {}
    for row in rows:
        axis = "".join(f" at {key} {value}" for key, value in list(row["point"].items())[:1])
        prepared.setdefault(_preparation_in_words(row["preparation"]), []).append(row["arm"] + axis)
    notes = [
        f"Images of {'all arms' if len(prepared) == 1 else ', '.join(names)}: {words}."
        for words, names in prepared.items()
    ]
    for first in rows:
        if first is _first(rows, first) and any(row["runs"] for row in rows):
            notes += _differences_in_words(first, [row for row in rows if row["point"] == first["point"]][1:])
    return notes


def _preparation_in_words(preparation: Mapping[str, Any]) -> str:
    def numbers(name: str, separator: str = " ") -> str:
        values = preparation[name]
        return separator.join(f"{value:g}" for value in (values[:1] if len({*values}) == 1 else values))

    crop = f"crop {preparation['crop_pct']:g} ({preparation['crop_mode']})"
    norm = f"mean {numbers('mean')}, std {numbers('std')}"
    return f"{numbers('img_size', 'x')} pixels, {preparation['interpolation']}, {crop}, {norm}"


def _differences_in_words(first: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return sentences on which of the other arms at a point differ from the first one."""
    told = [row for row in others if row["difference"]]
    start = "".join(f"At {key} {value}: " for key, value in list(first["point"].items())[:1])
    sentences = []
    if sure := [row for row in told if _is_sure(row["difference"])]:
        words = ", ".join(f"{row['arm']} ({shown_difference(row['difference']).strip('*')})" for row in sure)
        sentences.append(f"{start}top-1 differs from that of {first['arm']}: {words}.")
    if unsure := [row["arm"] for row in told if row not in sure]:
        sentences.append(f"{start}no difference from {first['arm']} is seen with these seeds: {', '.join(unsure)}.")
    if told:
        tests = f"{len(told)} differences" if len(told) > 1 else "1 difference"
        sentences[-1] += f" (95 % intervals of Welch's t-test, not corrected for {tests}.)"
    if untold := [row["arm"] for row in others if not row["difference"]]:
        sentences.append(
            f"{start}no difference from {first['arm']} can be told of {', '.join(untold)}: that takes two or more "
            f"finished seeds of both, with different figures."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def write_results(folder: StudyFolder, name: str, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write study.json, study.csv (a row for every run), study.md and study.png into a study's folder."""
    content = dict(
        study=name,
        figure="top-1 in % after the last epoch",
        recipe=plan.recipe,
        seeds=plan.seeds,
        arms=plan.arms,
        rows=rows,
        notes=make_notes(rows),
        versions=versions(),
    )
    write_json(folder.path / "study.json", content, indent=1)
    plain = [
        {
            "arm": row["arm"],
            **row["point"],
            "seed": seed,
            "top1": row["top1"].get(seed),
            "best_top1": row["best_top1"].get(seed),
            "seconds": row["seconds_of"].get(seed),
            "parameters": row["parameters"],
            "macs": row["macs"],
            "failure": row["failures"].get(seed),
            # names of their own: an option of the points may have the same
            **{f"images_{key}": _flat(row["preparation"][key]) for key in PREPARATION},
        }
        for row in rows
        for seed in plan.seeds
    ]
    write_csv(folder.path / "study.csv", plain)
    write_text(folder.path / "study.md", "\n\n".join([make_table(rows), *make_notes(rows)]) + "\n")
    draw_study(folder.path / "study.png", name, rows)


def _flat(value: Any) -> Any:
    """Return a value for a cell of a CSV file."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def draw_study(path: Path, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a picture of the accuracy of every arm, or of every arm over the points; bars are standard deviations."""
    from matplotlib.figure import Figure  # draws into files, no screen needed

    arms, axis_name = list(dict.fromkeys(row["arm"] for row in rows)), next(iter(rows[0]["point"]), None)
    figure = Figure(figsize=(7.5, 4.5 if axis_name else 1.2 + 0.34 * len(arms)), layout="constrained")
    axis = figure.subplots()
    if axis_name:
        for arm in arms:
            own = [row for row in rows if row["arm"] == arm and row["runs"]]
            values = [row["point"][axis_name] for row in own]
            bars = [row["top1_deviation"] or 0 for row in own]
            axis.errorbar(values, [row["top1_mean"] for row in own], bars, marker="o", ms=4, capsize=3, label=arm)
        xs = sorted({row["point"][axis_name] for row in rows})
        if xs[0] > 0 and xs[-1] / xs[0] > 5:
            axis.set_xscale("log")
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.minorticks_off()
        axis.set(xlabel=axis_name, ylabel="top-1 (%)")
        axis.legend(fontsize=8)
    else:
        for i, row in enumerate(rows):
            axis.plot(list(row["top1"].values()), [i] * row["runs"], "o", color="0.7", ms=3)
            if row["runs"]:
                bar = row["top1_deviation"] or 0
                axis.errorbar(row["top1_mean"], i, xerr=bar, fmt="o", color=f"C{i % 10}", ms=6, capsize=4)
        axis.set_yticks(range(len(rows)), arms, parse_math=False)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set(xlabel="top-1 (%)")
    runs = [row["planned"] for row in rows]
    axis.set_title(f"{title}: mean and standard deviation over {max(runs)} seeds", fontsize=10, parse_math=False)
    axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=140)

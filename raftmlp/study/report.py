"""What came out of a study: rows of figures, a table, a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..files import save_figure, write_csv, write_json, write_text
from ..train.journal import versions
from .plan import Plan, Run
from .runner import StudyFolder

__all__ = ["draw_study", "make_rows", "make_table", "write_results"]


def make_rows(
    folder: StudyFolder, plan: Plan, sizes: Mapping[str, tuple[int, int]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the figures of every arm at every point.

    The accuracy is that after the last epoch: the best epoch would be chosen on the images that it is measured on.
    The deviation is that of a sample (n - 1). All figures but ``seconds`` are the same at every run on one machine.

    Args:
        folder: The study's folder.
        plan: The study.
        sizes: Parameters and multiply-accumulates an image, by the names of the cells.
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
                parameters=sizes[cell.name][0],
                macs=sizes[cell.name][1],
                seconds=round(mean(summary["seconds"] for summary in done.values()), 1) if done else None,
                failures={run.seed: failures[run.name] for run in runs if run.name in failures},
            )
        )
    return rows


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table of Markdown, aligned; arms that failed or are not finished are marked."""
    axis = next(iter(rows[0]["point"]), None)
    lines = [["arm", *([axis] if axis else []), "top-1 in %", "deviation", "runs", "parameters", "MMACs", "s a run"]]
    for row in rows:
        marks = f"{row['runs']} of {row['planned']}" if row["runs"] < row["planned"] else str(row["runs"])
        if row["failures"]:
            marks += f", {len(row['failures'])} failed"
        figures = [_shown(row[key], 2) for key in ("top1_mean", "top1_deviation")]
        cost = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}", _shown(row["seconds"], 0)]
        lines.append([row["arm"], *([str(row["point"][axis])] if axis else []), *figures, marks, *cost])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * (width - (i > 0)) + ":" * (i > 0) for i, width in enumerate(widths)])
    cells = [[f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_results(folder: StudyFolder, name: str, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write study.json, study.csv, study.md and study.png into a study's folder."""
    content = dict(
        study=name,
        figure="top-1 in % after the last epoch",
        recipe=plan.recipe,
        seeds=plan.seeds,
        arms=plan.arms,
        rows=rows,
        versions=versions(),
    )
    write_json(folder.path / "study.json", content, indent=1)
    plain = [
        {
            "arm": row["arm"],
            **row["point"],
            **{key: row[key] for key in ("runs", "top1_mean", "top1_deviation", "parameters", "macs", "seconds")},
            "failed": len(row["failures"]),
        }
        for row in rows
    ]
    write_csv(folder.path / "study.csv", plain)
    write_text(folder.path / "study.md", make_table(rows) + "\n")
    draw_study(folder.path / "study.png", name, rows)


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

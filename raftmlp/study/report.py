"""What came out of a study: rows of figures, differences between them, a table, a picture."""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from ..evaluate.plots import draw_study
from ..evaluate.results import aligned
from ..files import write_csv, write_json, write_text
from ..train.run_logger import versions
from .plan import PREPARATION, Plan, Run
from .runner import StudyFolder

__all__ = ["add_differences", "make_notes", "make_rows", "make_table", "write_results"]


def make_rows(
    folder: StudyFolder, plan: Plan, facts: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the figures of every arm at every point, of the summaries in the study's folder.

    The accuracy is that after the last epoch: the best epoch would be chosen on the images that it is measured on.
    The deviation is that of a sample (n - 1). All figures but ``seconds`` are the same at every run on one machine.
    ``facts`` are more figures of the rows, by the names of the cells; ``failures`` the reasons of runs that failed.
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
    add_differences(rows)
    return rows


def add_differences(rows: Sequence[dict[str, Any]]) -> None:
    """Set ``difference`` of every row: how far its top-1 is from that of the first arm at its point.

    It is the difference of the means, ``mean``, and the half width of its 95 % interval by Welch's t-test,
    ``half_width``, both in points. None for the first arm itself, and where the seeds cannot tell: fewer than two of
    them, or all with the same figure.
    """
    from scipy.stats import ttest_ind  # takes a second

    for row in rows:
        first = _first(rows, row)
        samples = [list(r["top1"].values()) for r in (row, first)]
        row["difference"] = None
        if row is not first and min(map(len, samples)) > 1 and any(len({*values}) > 1 for values in samples):
            low, high = map(float, ttest_ind(*samples, equal_var=False).confidence_interval(0.95))
            row["difference"] = dict(mean=(low + high) / 2, half_width=(high - low) / 2)


def _first(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the row of the first arm at a row's point."""
    return next(other for other in rows if other["point"] == row["point"])


def _is_sure(difference: Mapping[str, float]) -> bool:
    return abs(difference["mean"]) > difference["half_width"]


def _plus_minus(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.2f} ± {difference['half_width']:.2f}"


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table of Markdown, aligned; differences are bold where their interval leaves out 0.

    Arms that failed or are not finished are marked.
    """
    axis = list(rows[0]["point"])[:1]
    lines = [["arm", *axis, "top-1 in %", "from the first arm", "runs", "parameters", "MMACs", "s a run"]]
    for row in rows:
        top1 = f"{row['top1_mean']:.2f} ± {row['top1_deviation'] or 0:.2f}" if row["runs"] else ""
        apart = _plus_minus(row["difference"]) if row["difference"] else ""
        if apart and _is_sure(row["difference"]):
            apart = f"**{apart}**"
        marks = f"{row['runs']} of {row['planned']}" if row["runs"] < row["planned"] else str(row["runs"])
        if row["failures"]:
            marks += f", {len(row['failures'])} failed"
        seconds = f"{row['seconds']:.0f}" if row["runs"] else ""
        cost = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}", seconds]
        lines.append([row["arm"], *(str(row["point"][key]) for key in axis), top1, apart, marks, *cost])
    titles, *others = aligned(lines, separator=" | ")
    rule = " | ".join("-" * (len(cell) - (i > 0)) + ":" * (i > 0) for i, cell in enumerate(titles.split(" | ")))
    return "\n".join(f"| {line} |" for line in (titles, rule, *others))


def make_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a table of rows does not say: how images are prepared, and which arms differ from the first."""
    prepared: dict[str, list[str]] = {}
    for row in rows:
        words = ", ".join(f"{key} {_flat(value)}" for key, value in row["preparation"].items())
        prepared.setdefault(words, []).append(row["arm"] + _place(row))
    notes = [
        f"Images of {'all arms' if len(prepared) == 1 else ', '.join(names)}: {words}."
        for words, names in prepared.items()
    ]
    for first in rows if any(row["runs"] for row in rows) else ():
        if first is not _first(rows, first):
            continue
        others = [row for row in rows if row["point"] == first["point"] and row is not first]
        told = [row for row in others if row["difference"]]
        sure = [row for row in told if _is_sure(row["difference"])]
        for words, arms in (
            ("Top-1 differs from that of", [f"{row['arm']} ({_plus_minus(row['difference'])})" for row in sure]),
            ("No difference is seen with these seeds from", [row["arm"] for row in told if row not in sure]),
            ("Too few finished seeds, or all of one figure, to tell from", [r["arm"] for r in others if r not in told]),
        ):
            if arms:
                notes.append(f"{words} {first['arm']}{_place(first)}: {', '.join(arms)}.")
    if count := sum(bool(row["difference"]) for row in rows):
        notes.append(f"± of a difference: 95 % interval of Welch's t-test, not corrected for {count} differences.")
    return notes


def _place(row: Mapping[str, Any]) -> str:
    """Return the point of a row in words, as they follow an arm's name: " at train_num_samples 100"."""
    return "".join(f" at {key} {value}" for key, value in list(row["point"].items())[:1])


def write_results(folder: StudyFolder, name: str, plan: Plan, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write study.json, study.csv (a row for every run), study.md and study.png into a study's folder."""
    notes = make_notes(rows)
    plans = dict(recipe=plan.recipe, seeds=plan.seeds, arms=plan.arms)
    content = dict(study=name, figure="top-1 in % after the last epoch", **plans, rows=rows, notes=notes)
    content["versions"] = versions()
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
    write_text(folder.path / "study.md", "\n\n".join([make_table(rows), *notes]) + "\n")
    draw_study(folder.path / "study.png", name, rows)


def _flat(value: Any) -> Any:
    """Return a value for a cell of a CSV file."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value

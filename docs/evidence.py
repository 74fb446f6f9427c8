"""The tables and pictures of docs/evidence.md, from the JSON that `raftmlp study` has written.

    raftmlp study studies/paper
    raftmlp study studies/data_efficiency
    raftmlp study studies/distillation
    python docs/evidence.py

Copies the JSON and the picture of every study that is in runs/studies/ next to the page, and writes the tables into the
page, each between a pair of comments. A difference has the 95 % interval of Welch's t-test over the seeds.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from raftmlp.cli.study import default_folder
from raftmlp.files import write_text
from raftmlp.study import difference, shown_difference

DOCS = Path(__file__).parent
PAGE = DOCS / "evidence.md"
STUDIES = ("paper", "data_efficiency", "distillation")


def table_of(study: dict[str, Any]) -> str:
    """Return the rows of a study as a table: arms, or arms and points; bold differences are beyond their interval."""
    rows = study["rows"]
    axis = next(iter(rows[0]["point"]), None)
    first = {row["point"].get(axis): row for row in reversed(rows)}  # of each point, the first arm
    titles = ["arm", *([axis] if axis else []), "top-1 in %", "beside the first arm", "seeds", "parameters", "MMACs"]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        top1 = "" if row["top1_mean"] is None else f"{row['top1_mean']:.2f} ± {row['top1_deviation'] or 0:.2f}"
        point = row["point"].get(axis)
        cost = [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.2f}"]
        seeds = str(row["runs"]) + f", {len(row['failures'])} failed" * bool(row["failures"])
        apart = shown_difference(difference(row, first[point]))
        lines.append([row["arm"], *([str(point)] if axis else []), top1, apart, seeds, *cost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_table(page: str, name: str, text: str) -> str:
    """Return the page with a text between the comments of a study."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
    assert re.search(pattern, page, re.DOTALL), name
    return re.sub(pattern, lambda found: f"{found[1]}{text}\n{found[2]}", page, flags=re.DOTALL)


def main() -> None:
    page = PAGE.read_text()
    for name in STUDIES:
        source = default_folder(name) / "study.json"
        if not source.exists():
            print(f"{source}: not there, its table stays as it is")
            continue
        shutil.copy(source, DOCS / f"evidence-{name}.json")
        shutil.copy(source.with_name("study.png"), DOCS / f"evidence-{name}.png")
        picture = f"![top-1 of every arm, mean and standard deviation over the seeds](evidence-{name}.png)"
        page = replace_table(page, name, f"{table_of(json.loads(source.read_text()))}\n\n{picture}")
    write_text(PAGE, page)


if __name__ == "__main__":
    main()

"""The tables and pictures of docs/evidence.md, from the JSON that `raftmlp study` has written.

    raftmlp study studies/paper
    raftmlp study studies/data_efficiency
    raftmlp study studies/distillation
    python docs/evidence.py

Copies the JSON and the picture of every study that is in runs/studies/ next to the page, and writes the tables of the
JSON next to the page into it, each between a pair of comments.
"""

import json
import shutil
from pathlib import Path

from raftmlp.cli.study import default_folder
from raftmlp.files import write_text
from raftmlp.study.report import add_differences, make_table

DOCS = Path(__file__).parent
PAGE = DOCS / "evidence.md"
STUDIES = ("paper", "data_efficiency", "distillation")


def section(name: str) -> str:
    """Return the table of a study, whose JSON is next to the page, and its picture."""
    rows = json.loads((DOCS / f"evidence-{name}.json").read_text())["rows"]
    add_differences(rows)
    picture = f"![top-1 of every arm, mean and standard deviation over the seeds](evidence-{name}.png)"
    return f"{make_table(rows)}\n\n{picture}"


def main() -> None:
    page = PAGE.read_text()
    for name in STUDIES:
        source = default_folder(name) / "study.json"
        if source.exists():
            shutil.copy(source, DOCS / f"evidence-{name}.json")
            shutil.copy(source.with_name("study.png"), DOCS / f"evidence-{name}.png")
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}{section(name)}\n{end}{rest.partition(end)[2]}"
    write_text(PAGE, page)


if __name__ == "__main__":
    main()

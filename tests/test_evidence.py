"""docs/evidence.md: its tables are those of the JSON files beside it."""

import json

import pytest

from helpers import load_script

evidence = load_script("evidence", "docs")


def row(arm, *top1, **point):
    values = dict(enumerate(top1))
    return dict(arm=arm, point=point, runs=len(top1), top1=values, top1_mean=sum(top1) / len(top1) if top1 else None,
                top1_deviation=1.0 if len(top1) > 1 else None, parameters=1000, macs=2_000_000,
                failures={} if top1 else {0: "broke"})  # fmt: skip


def test_a_table():
    table = evidence.table_of(dict(rows=[row("a", 50, 51, 52), row("b", 60, 61, 62), row("c", 50, 51, 53), row("d")]))
    lines = table.splitlines()
    assert lines[2] == "| a | 51.00 ± 1.00 |  | 3 | 1,000 | 2.00 |"
    assert lines[3] == "| b | 61.00 ± 1.00 | **+10.00 ± 2.27** | 3 | 1,000 | 2.00 |"
    assert "| +0.33 ± " in lines[4] and lines[5] == "| d |  |  | 0, 1 failed | 1,000 | 2.00 |"
    rows = [row(arm, *(base + n + i for i in range(3)), n=n) for base, arm in ((50, "a"), (60, "b")) for n in (1, 2)]
    lines = evidence.table_of(dict(rows=rows)).splitlines()
    assert lines[4].startswith("| b | 1 | 62.00 ± 1.00 | **+10.00 ± ") and lines[2].startswith("| a | 1 | 52.00")


@pytest.mark.parametrize("name", evidence.STUDIES)
def test_the_page_has_the_figures_of_its_json(name):
    page, source = evidence.PAGE.read_text(), evidence.DOCS / f"evidence-{name}.json"
    text = page.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0]
    assert f"raftmlp study studies/{name}" in page
    if not source.exists():
        assert text == "Not run."
    else:
        assert text.startswith(evidence.table_of(json.loads(source.read_text())))
    assert evidence.replace_table(page, name, text) == page

"""The examples of docs/integrations.md."""

import re

import pytest
import torch

from helpers import DIGITS, ROOT
from raftmlp.commands import export

TEXT = (ROOT / "docs" / "integrations.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")[1:]}
BLOCKS = [
    pytest.param(block, id=title.replace(" ", "-"))
    for title, section in SECTIONS.items()
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block, run_command, monkeypatch):
    """In an empty folder, with the exported model that the page makes; "." of torch.hub is the checkout."""
    if '"digits"' in block:
        assert run_command(export, *DIGITS, "--dataset", "digits", "--format", "hf", "--out", "digits")[0] == 0
    load = torch.hub.load
    monkeypatch.setattr("torch.hub.load", lambda _, *args, **kwargs: load(str(ROOT), *args, **kwargs))
    torch.manual_seed(0)
    exec(compile(block, "docs/integrations.md", "exec"), {"__name__": "example"})


def test_every_example_is_found():
    assert len(BLOCKS) == TEXT.count("```python")

"""Studies: the same training for several networks or settings and several seeds, and what came out of it."""

from .. import is_parsing
from .plan import Cell, Plan, Run

if not is_parsing:
    from .report import make_rows, make_table, write_results
    from .runner import StudyFolder, run_study

__all__ = ["Cell", "Plan", "Run", "StudyFolder", "make_rows", "make_table", "run_study", "write_results"]

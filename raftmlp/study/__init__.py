"""Studies: the same training for several networks or settings and several seeds, and what came out of it."""

from .. import is_command
from .plan import PREPARATION, Cell, Plan, Run

if not is_command:
    from .report import difference, make_notes, make_rows, make_table, shown_difference, write_results
    from .runner import StudyFolder, run_study

__all__ = [
    "PREPARATION", "Cell", "Plan", "Run", "StudyFolder", "difference", "make_notes", "make_rows", "make_table",
    "run_study", "shown_difference", "write_results",
]  # fmt: skip

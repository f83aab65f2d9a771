"""Records in, one self-contained HTML page out."""

from trimtab.report.experiment import render_experiment
from trimtab.report.page import render_report
from trimtab.report.pictures import draw_kept, picture_entry

__all__ = ["draw_kept", "picture_entry", "render_experiment", "render_report"]

"""Records in, one self-contained HTML page out."""

from trimtab.report.experiment import render_experiment
from trimtab.report.page import Report, page_place, read_report, render_report, write_report
from trimtab.report.pictures import draw_kept, picture_entry

__all__ = [
    "Report",
    "draw_kept",
    "page_place",
    "picture_entry",
    "read_report",
    "render_experiment",
    "render_report",
    "write_report",
]

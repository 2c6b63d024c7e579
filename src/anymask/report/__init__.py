"""Finished runs as paired statistics, Markdown tables and an interactive page."""

from anymask.report.failed import failed_table
from anymask.report.overview import overviews
from anymask.report.page import write_page
from anymask.report.stats import Comparison, Overall, missing, overall, paired
from anymask.report.table import grid, markdown, table

__all__ = ["Comparison", "Overall", "failed_table", "grid", "markdown", "missing", "overall", "overviews", "paired", "table", "write_page"]

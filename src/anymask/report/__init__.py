"""Finished runs as paired statistics, Markdown tables and an interactive page."""

from anymask.report.failed import failed_table
from anymask.report.overview import overviews
from anymask.report.page import write_page
from anymask.report.stats import overall, paired
from anymask.report.table import grid, markdown, table

__all__ = ["failed_table", "grid", "markdown", "overall", "overviews", "paired", "table", "write_page"]

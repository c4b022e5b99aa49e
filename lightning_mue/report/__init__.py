"""What a run found, for people: a table on the console, in Markdown, and one self-contained page of HTML."""

from lightning_mue.report.page import write_html
from lightning_mue.report.pictures import ShownAnswer, split_text
from lightning_mue.report.table import Row, print_table, table_markdown

__all__ = ["Row", "ShownAnswer", "print_table", "split_text", "table_markdown", "write_html"]

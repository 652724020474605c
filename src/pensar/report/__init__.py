"""The report of a run: one page that opens anywhere, and `report.json` with every number on it."""

from pensar.report.publish import write, write_report

__all__ = ["write", "write_report"]

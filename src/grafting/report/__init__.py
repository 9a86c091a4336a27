"""One self-contained HTML page per run or study."""

from __future__ import annotations

from grafting.report.page import write_report
from grafting.report.study import write_study

__all__ = ["write_report", "write_study"]

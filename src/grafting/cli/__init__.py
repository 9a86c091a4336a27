"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr.

A module per group of verbs; importing it registers them, in the order of `graft --help`.
"""

from grafting.cli import runs, status, models, analysis, images, data, text, geneval, studies, search, bench  # noqa: I001
from grafting.cli.app import app
from grafting.cli.entry import main

__all__ = [
    "analysis",
    "app",
    "bench",
    "data",
    "geneval",
    "images",
    "main",
    "models",
    "runs",
    "search",
    "status",
    "studies",
    "text",
]

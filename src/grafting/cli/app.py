"""The command `graft`; every module of verbs registers its own here."""

from __future__ import annotations

import typer

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Edit the architecture of pretrained diffusion transformers.",
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

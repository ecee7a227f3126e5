"""The command line: `conformance run`, `certify` and `converge`."""

from __future__ import annotations

import typer

from conformance.certify.command import certify
from conformance.convergence.command import converge
from conformance.job.command import run

app = typer.Typer(
    help="Holds orthonormal optimizers to a float64 oracle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("certify")(certify)
app.add_typer(converge, name="converge")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()

"""The command line; each command lives beside what it runs."""

from __future__ import annotations

import typer

from conformance.bench.command import bench
from conformance.certify.command import certify
from conformance.convergence.command import converge
from conformance.job.command import run
from conformance.mutants.command import mutants
from conformance.plan.command import plan
from conformance.port.command import port
from conformance.port.meshes_command import meshes
from conformance.vectors.command import app as vectors

app = typer.Typer(
    help="Holds orthonormal optimizers to a float64 oracle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(run)
app.command("certify")(certify)
app.command("port")(port)
app.command("mutants")(mutants)
app.command("meshes")(meshes)
app.command("bench")(bench)
app.command("plan")(plan)
app.add_typer(vectors, name="vectors")
app.add_typer(converge, name="converge")


if __name__ == "__main__":
    app()

"""The console script, which says what to install where the command line's libraries are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; exit status 2 without its libraries, which the loader of vectors does not need."""
    try:
        from conformance.cli import app
    except ModuleNotFoundError as error:
        print(
            f"conformance: {error}; install the clone with its extra: pip install '.[conformance]'",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    app()


if __name__ == "__main__":
    main()

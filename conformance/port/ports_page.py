"""`python -m conformance.port.ports_page docs/ports.md FILE...`: puts verdicts from JSON files into the page."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from conformance.port.output import write_whole

BEGIN, END = "<!-- verdicts: made by ci/ports -->", "<!-- end of verdicts -->"
SHOWN = ("pass", "acceptable", "xfail", "fail", "error", "xpass", "undecided")


def lines_of(data: dict[str, Any]) -> list[str]:
    """A row for each (algorithm, dialect, dtype) of one port's results."""
    counted: dict[tuple[str, str, str], Counter[str]] = {}
    levels: dict[tuple[str, str, str], set[str]] = {}
    for one in data["verdicts"]:
        if one["status"] in ("not claimed", "skip"):
            continue
        key = (one["algorithm"], one["dialect"], one["dtype"])
        counted.setdefault(key, Counter())[one["status"]] += 1
        levels.setdefault(key, set()).add(one["level"])
    run = data["run"]
    rows = []
    for (algorithm, dialect, dtype), counts in counted.items():
        numbers = " | ".join(str(counts[status] or "") for status in SHOWN)
        which = ", ".join(sorted(levels[algorithm, dialect, dtype]))
        rows.append(f"| {run['port']} | {algorithm} | {dialect} | {dtype} | {which} | {numbers} |")
    return rows


def table(results: list[dict[str, Any]]) -> str:
    """The whole table, with the day of each run."""
    head = f"| port | algorithm | dialect | dtype | levels | {' | '.join(SHOWN)} |"
    rule = "|---" * 5 + "|--:" * len(SHOWN) + "|"
    rows = [row for data in results for row in lines_of(data)]
    days = sorted({data["run"]["finished"].split()[0] for data in results})
    vectors = sorted({data["run"]["vectors"] for data in results})
    made = f"Run on {', '.join(days)} with vectors {', '.join(vectors)}."
    return "\n".join([BEGIN, made, "", head, rule, *rows, END])


def main(arguments: list[str]) -> int:
    """Replaces the table; the rest of the page is written by hand."""
    page, files = Path(arguments[0]), [Path(one) for one in arguments[1:]]
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{page} has no place for the table: {BEGIN} ... {END}", file=sys.stderr)
        return 2
    made = table([json.loads(one.read_text()) for one in files])
    write_whole(page, f"{before}{made}{after}".encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

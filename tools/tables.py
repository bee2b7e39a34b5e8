"""Writes the measured tables of README.md and of docs/*.md from docs/results/*.json.

    python -m tools.tables            rewrite the tables
    python -m tools.tables --check    exit 1 when a table is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is the result file.
``<!-- table:NAME head -->`` takes only the rows that are marked as head. Rows with a goal get two
columns more. A file that is not there yet leaves a sentence that says how to make it.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table:([a-z_]+)( head)? -->\n).*?(<!-- /table -->)", re.DOTALL)
MADE_BY = {
    "evidence": "python -m recipes.evidence --record",
    "native_speed": "make bench",
    "structured": "python -m benchmarks.structured --record",
    "train_speed": "python -m benchmarks.train_speed --record",
}
"""What makes a result file that may be missing."""


def table(name: str, *, head: bool = False) -> str:
    """The Markdown table of one result file, with its command and date."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    if not path.is_file() and name in MADE_BY:
        return f"Not measured yet: `{MADE_BY[name]}` measures it and writes this table.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in result["rows"] if not head or row.get("head")]
    lines = _with_goals(result["title"], rows) if _has_goals(rows) else [
        f"| {result['title']} | | conditions |",
        "| --- | --- | --- |",
        *(f"| {row['what']} | {row['value']} | {row['conditions']} |" for row in rows),
    ]  # fmt: skip
    where = f"{result['machine']['cores']} cores of {result['machine']['processor']}"
    lines += ["", f"`{result['command']}`, {result['date']}, {where}.", ""]
    return "\n".join(lines)


def _has_goals(rows: list[Mapping[str, Any]]) -> bool:
    return any("goal" in row for row in rows)


def _with_goals(title: str, rows: list[Mapping[str, Any]]) -> list[str]:
    return [
        f"| {title} | measured | goal | reached | conditions |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['what']} | {row['value']} | {row['goal']} | {row['met']} | "
            f"{row['conditions']} |"
            for row in rows
        ),
    ]


def refreshed(text: str) -> str:
    """A document with every table made anew."""
    return BLOCK.sub(
        lambda match: match[1] + table(match[2], head=match[3] is not None) + match[4], text
    )


def main() -> int:
    """Rewrite or check the documents; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        if refreshed(text) != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(refreshed(text), encoding="utf-8")
    if stale:
        print(f"{'stale' if args.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

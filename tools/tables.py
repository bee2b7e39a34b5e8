"""Writes the measured tables of README.md and docs/formats.md from docs/results/*.json.

    python -m tools.tables            rewrite the tables
    python -m tools.tables --check    exit 1 when a table is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``; NAME is the result file.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "formats.md")
BLOCK = re.compile(r"(<!-- table:([a-z_]+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def table(name: str) -> str:
    """The Markdown table of one result file, with its command and date."""
    path = ROOT / "docs" / "results" / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"| {result['title']} | | conditions |", "| --- | --- | --- |"]
    lines += [f"| {row['what']} | {row['value']} | {row['conditions']} |" for row in result["rows"]]
    where = f"{result['machine']['cores']} cores of {result['machine']['processor']}"
    lines += ["", f"`{result['command']}`, {result['date']}, {where}.", ""]
    return "\n".join(lines)


def refreshed(text: str) -> str:
    """A document with every table made anew."""
    return BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], text)


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

"""``qnext cache``: what a server reused and why not more, and what a folder of prefixes holds."""

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from qnext.engine.blob import DamagedBlob, NewerBlob, read_header
from qnext.errors import RequestError

TIMEOUT_S = 10.0


def fetch_explanations(url: str, request_id: str | None) -> dict[str, Any]:
    """What a running server says of its last requests, or of one.

    Raises RequestError when there is no such server or it knows no such request.
    """
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"--url: expected an address such as http://127.0.0.1:8000, got {url}.")
    query = "?" + urllib.parse.urlencode({"request": request_id}) if request_id else ""
    try:
        with urllib.request.urlopen(url.rstrip("/") + "/cache/explain" + query, timeout=TIMEOUT_S) \
                as answer:  # fmt: skip
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode("utf-8", errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"{url} answers {error.code} {error.reason}; is it a qnext server?"
        raise RequestError(text) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(
            f"{url} does not answer as a qnext server does ({reason}). Start one with qnext serve, "
            "or name its address with --url."
        ) from error


def render_explanations(found: dict[str, Any]) -> str:
    """Lines for people, newest request first."""
    lines = []
    for one in found["requests"]:
        report = one["cache"]
        lines.append(
            f"{one['id']}: {report['prompt_tokens']} tokens = {report['cached']} reused "
            f"+ {report['matched_not_reused']} seen before + {report['unmatched']} new"
        )
        used, first = report["snapshot"], report["first_unmatched"]
        if used:
            lines.append(
                f"  started from the {used['why']} state at {used['at']}, "
                f"{used['age_s']:.0f} s old, from {used['tier']}"
            )
        if report["reason"]:
            detail = f" ({report['detail']})" if report["detail"] else ""
            lines.append(f"  not all of what was seen before: {report['reason']}{detail}")
        if first:
            expected = "the end" if first["expected"] is None else f"token {first['expected']}"
            where = f" in {first['where']}" if first["where"] else ""
            lines.append(
                f"  new from token {first['index']}{where}: {expected} was known there, "
                f"now it is token {first['got']}"
            )
    counts = found["counts"]
    if counts:
        lines.append("")
        lines.append("since the start: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    return "\n".join(lines) or "no requests yet"


def describe_folder(folder: str) -> list[dict[str, Any]]:
    """What every namespace of a cache folder holds, from the headers of its files.

    Raises RequestError when there is no such folder.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise RequestError(f"{folder}: there is no such folder; give that of --cache-dir.")
    found = []
    for manifest in sorted(root.glob("*/MANIFEST.json")):
        entry: dict[str, Any] = {
            "namespace": manifest.parent.name, "snapshots": 0, "pages": 0, "bytes": 0,
            "damaged": 0, "newer": 0, "longest": 0, "by_reason": {},
        }  # fmt: skip
        for path in sorted(manifest.parent.glob("*/??/*")):
            if path.suffix not in (".kv", ".st"):
                continue
            try:
                header, size = read_header(path)
            except DamagedBlob:
                entry["damaged"] += 1
                continue
            except NewerBlob:
                entry["newer"] += 1
                continue
            except FileNotFoundError:
                continue  # a running server has just removed it
            entry["bytes"] += size
            if header["kind"] == "page":
                entry["pages"] += 1
                continue
            entry["snapshots"] += 1
            entry["longest"] = max(entry["longest"], header.get("tokens", 0))
            why = header.get("why", "?")
            entry["by_reason"][why] = entry["by_reason"].get(why, 0) + 1
        found.append(entry)
    return found


def render_folder(entries: list[dict[str, Any]]) -> str:
    """Lines for people."""
    lines = []
    for one in entries:
        reasons = ", ".join(f"{count} {why}" for why, count in sorted(one["by_reason"].items()))
        lines.append(
            f"{one['namespace']}: {one['snapshots']} snapshots ({reasons or 'none'}), "
            f"{one['pages']} pages, {one['bytes']:,} bytes; the longest has {one['longest']} tokens"
        )
        if one["damaged"] or one["newer"]:
            lines.append(f"  {one['damaged']} damaged files, {one['newer']} of a later version")
    return "\n".join(lines) or "nothing is kept here"

"""Goals beside measurements: what is reached, what is missed, what was not measured."""

import json

import pytest
from tools import tables

from benchmarks import native_goals


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.9 * value, "high": 1.1 * value}


def _case(case: str, share: float, against: dict[str, float] | None = None) -> dict:
    return {
        "case": case,
        "limit_share": _spread(share),
        "bandwidth_share": share,
        "tokens_per_second": _spread(200.0),
        "milliseconds_per_step": _spread(5.0),
        "limited_by": "bytes",
        "bytes_per_token": 203e6,
        "bytes_per_step": 203e6,
        "gigabytes_per_second": 45.0,
        "experts_per_step": 40,
        "repetitions": 7,
        "against": [
            {
                "name": name,
                "ratio": _spread(ratio),
                "tokens_per_second": _spread(200.0 / ratio),
                "ratio_at_equal_bytes": 0.9 * ratio,
            }
            for name, ratio in (against or {}).items()
        ],
    }


def _rows(cases: list[dict], **more: object) -> dict[str, dict]:
    report = {
        "cases": cases,
        "rollback_share": _spread(0.01),
        "outside_kernels_share": 0.03,
        "start": {"peak_share": 1.05, "first_token_seconds": 1.5},
        **more,
    }
    return {row["what"]: row for row in native_goals.rows_of({"int4": report})}


@pytest.mark.parametrize(("share", "met"), [(0.95, "yes"), (0.90, "least"), (0.5, "no")])
def test_a_share_is_held_against_goal_and_least(share, met):
    row = _rows([_case("decode at 0", share)])["int4 decode at 0, share of the limit"]
    assert row["met"] == met
    assert row["goal"] == "at least 93% (least 88%)"
    assert row["value"].startswith(f"{share:.1%}")


def test_a_share_measured_alone_is_the_one_that_counts():
    raced, alone = ({"cases": [_case("batch 8", share)]} for share in (0.7, 0.9))
    more = {"rollback_share": _spread(0.0), "outside_kernels_share": 0.0}
    start = {"start": {"peak_share": 1.0, "first_token_seconds": 1.0}}
    reports = {"int4": {**raced, **more, **start}, "int4_alone": alone}
    rows = {row["what"]: row for row in native_goals.rows_of(reports)}
    assert rows["int4 batch 8, share of the limit"]["value"].startswith("90.0%")
    assert rows["int4 batch 8, times as fast as llama.cpp"]["value"] == "not measured"


def test_a_ratio_is_that_to_the_best_of_the_peers():
    rows = _rows([_case("decode at 4096", 0.9, {"fast": 1.6, "slow": 3.0})])
    row = rows["int4 decode at 4096, times as fast as llama.cpp"]
    assert row["value"].startswith("1.60")
    assert row["met"] == "no"
    assert "slow" in row["conditions"]
    rows = _rows([_case("decode at 0", 0.9, {"a": 1.6, "b": 1.5})])
    equal = rows["int4 decode at 0, times as fast as llama.cpp if both read as much"]
    assert (equal["value"], equal["met"]) == ("1.35", "yes")


def test_smaller_is_better_where_it_is():
    rows = _rows([_case("verify 3", 0.8)])
    assert rows["int4 verify 3, times the time its bytes need"]["met"] == "no"
    assert rows["int4: dropping drafts, share of a verifying step"]["met"] == "yes"
    assert rows["int4: time outside the native call, share of an engine's step"]["met"] == "no"
    assert rows["int4: second start to first token, seconds"]["met"] == "yes"


def test_what_was_not_measured_is_said():
    rows = {row["what"]: row for row in native_goals.rows_of({})}
    assert {row["value"] for row in rows.values()} == {"not measured"}
    assert {row["met"] for row in rows.values()} == {""}
    assert len(rows) > 40


def test_tables_with_goals_show_misses_and_can_be_cut_to_their_head(tmp_path, monkeypatch):
    rows = list(native_goals.rows_of({"int4": {"cases": [_case("decode at 0", 0.5)],
        "rollback_share": _spread(0.01), "outside_kernels_share": 0.001,
        "start": {"peak_share": 1.05, "first_token_seconds": 1.5}}}))  # fmt: skip
    result = {
        "title": "Speed", "rows": rows, "command": "make", "date": "2026-01-01",
        "machine": {"cores": 2, "processor": "some"},
    }  # fmt: skip
    folder = tmp_path / "docs" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = "<!-- table:native_speed head -->\nold\n<!-- /table -->"
    assert "Not measured yet: `make bench`" in tables.refreshed(text)
    (folder / "native_speed.json").write_text(json.dumps(result))
    head = tables.refreshed(text)
    everything = tables.refreshed(text.replace(" head", ""))
    assert "| int4 decode at 0, share of the limit | 50.0%" in head
    assert "| no |" in head
    assert len(everything.splitlines()) > len(head.splitlines()) > 8
    assert everything.splitlines()[0] == "<!-- table:native_speed -->"
    assert tables.refreshed(everything) == everything

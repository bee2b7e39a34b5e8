"""``qnext eval mini``: every score of a small model, from one command."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from qnext.config import read_json
from qnext.errors import DataError
from qnext.eval import question_tasks, text_tasks
from qnext.eval.scores import Report, share
from qnext.llm import LLM
from qnext.weights.checkpoint import load_model

TASKS = ("text", "pairs", "drafts", "arithmetic", "problems", "budget", "needles", "tools",
         "samples")  # fmt: skip
YARN_FACTOR = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured, and how thoroughly."""

    model: Path
    tasks: tuple[str, ...] = TASKS
    items: int = 50
    """Questions per cell of arithmetic and word problems."""
    pairs: Path | None = None
    """JSON lines of minimal pairs (BLiMP)."""
    per_paradigm: int = 100
    held_out: Path | None = None
    """Folder of held-out text, as ``qnext data prepare`` writes it."""
    trained_length: int | None = None
    """Longest text of the training; by default the model's limit, or what it was before YaRN."""
    needles_per_cell: int = 2
    threads: int | None = None
    backend: str = "auto"


def evaluate(options: Options, *, progress: bool | None = None) -> dict[str, Any]:
    """Run the tasks; returns the record. What cannot be measured is listed with its reason."""
    unknown = sorted(set(options.tasks) - set(TASKS))
    if unknown:
        raise DataError(f"no task is called {unknown[0]!r}; there are {', '.join(TASKS)}.")
    report = Report()
    began = time.perf_counter()
    with LLM(
        options.model, threads=options.threads, backend=options.backend, prefix_cache=False
    ) as llm:
        runners: dict[str, Callable[[], Any]] = {
            "text": lambda: _text(llm, options, report),
            "pairs": lambda: _pairs(llm, options, report),
            "drafts": lambda: _drafts(llm, options, report),
            "arithmetic": lambda: _graded(llm, question_tasks.sums(options.items)),
            "problems": lambda: _graded(llm, question_tasks.problems(options.items)),
            "budget": lambda: question_tasks.budget_curve(llm, max(1, options.items // 2)),
            "needles": lambda: _needles(llm, options),
            "tools": lambda: question_tasks.tool_calls(llm, options.items),
            "samples": lambda: question_tasks.samples(llm),
        }
        hidden = None if progress is None else not progress
        bar = tqdm(options.tasks, desc="evaluate", unit="task", disable=hidden)
        for name in bar:
            bar.set_postfix_str(name)
            start = time.perf_counter()
            found = runners[name]()
            if found is not None:
                report.results[name] = found
            report.seconds[name] = round(time.perf_counter() - start, 1)
        parameters = llm.config.to_dict()
    return {
        "model": str(options.model),
        "layers": parameters["num_hidden_layers"],
        "hidden_size": parameters["hidden_size"],
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "items_per_cell": options.items,
        "seconds": round(time.perf_counter() - began),
        "seconds_by_task": report.seconds,
        "skipped": report.skipped,
        "results": report.results,
    }


def _text(llm: LLM, options: Options, report: Report) -> dict[str, Any] | None:
    if options.held_out is None:
        report.skipped["text"] = "no held-out text; name its folder with --held-out"
        return None
    files = text_tasks.held_out_files(options.held_out)
    return {
        path.name.partition(".")[0]: text_tasks.bits_per_byte(llm, path, most_bytes=60_000)
        for path in files
    }


def _pairs(llm: LLM, options: Options, report: Report) -> dict[str, Any] | None:
    if options.pairs is None:
        report.skipped["pairs"] = "no file of minimal pairs; name one with --pairs"
        return None
    return text_tasks.minimal_pairs(llm, options.pairs, per_paradigm=options.per_paradigm)


def _drafts(llm: LLM, options: Options, report: Report) -> dict[str, Any] | None:
    if options.held_out is None:
        report.skipped["drafts"] = "no held-out stories; name their folder with --held-out"
        return None
    if not llm.config.num_mtp_layers:
        report.skipped["drafts"] = "the model has no MTP head"
        return None
    texts = text_tasks.passages(llm, options.held_out, count=max(8, 4 * options.items))
    prompts = [ids[: 1 + text_tasks.OPENING] for ids in texts]
    with LLM(
        options.model, threads=options.threads, backend=options.backend, prefix_cache=False,
        speculative_tokens=1,
    ) as drafting:  # fmt: skip
        found = text_tasks.draft_acceptance(drafting, prompts)
    model = load_model(options.model)
    return {**found, "teacher_forced": text_tasks.teacher_forced(model, texts[:40])}


def _graded(llm: LLM, groups: Any) -> dict[str, Any]:
    found, formed = question_tasks.graded(llm, groups)
    return {"by_kind": found, "well_formed": {mode: share(m) for mode, m in formed.items()}}


def _needles(llm: LLM, options: Options) -> dict[str, Any]:
    """The grid at and below the trained length, and at four times it with YaRN.

    A model that has YaRN in its settings has it at every length.
    """
    config = llm.config
    limit = config.rope.original_max_position_embeddings or config.max_position_embeddings
    longest = options.trained_length or limit
    lengths = [n for n in (256, 512, 1024, 2048, 4096, 8192) if n < longest] + [longest]
    count = options.needles_per_cell
    found = {
        "trained_length": longest,
        "plain": question_tasks.needle_grid(llm, lengths[-3:], count),
        "distractors": question_tasks.needle_grid(llm, lengths[-1:], count, distractors=3),
    }
    with TemporaryDirectory(prefix="qnext-yarn-") as folder:
        extended = extended_folder(options.model, Path(folder), longest)
        with LLM(
            extended, threads=options.threads, backend=options.backend, prefix_cache=False
        ) as longer:
            found["yarn_factor"] = YARN_FACTOR
            found["yarn"] = question_tasks.needle_grid(longer, [YARN_FACTOR * longest], count)
    return found


def extended_folder(model: Path, folder: Path, longest: int) -> Path:
    """A folder that shows a model with YaRN from ``longest`` to four times as many tokens."""
    settings = read_json(model)
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rope |= {
        "rope_type": "yarn",
        "factor": float(YARN_FACTOR),
        "original_max_position_embeddings": longest,
    }
    key = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    settings[key] = rope
    settings["max_position_embeddings"] = YARN_FACTOR * longest
    for file in model.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return folder


def table(record: dict[str, Any]) -> str:
    """The record for people."""
    lines = [f"{record['model']}, {record['date']}, {record['seconds']} s"]
    results = record["results"]
    for name, row in results.get("text", {}).items():
        lines.append(f"  bits per byte, {name:24}{row['bits_per_byte']:8.3f}")
    if "pairs" in results:
        lines.append(f"  minimal pairs            {_percent(results['pairs']['accuracy'])}")
    if "drafts" in results:
        lines.append(f"  first drafts accepted    {_percent(results['drafts'])}")
    for task in ("arithmetic", "problems"):
        if task not in results:
            continue
        lines.append(f"  {task:34}{'thinking':>24}{'direct':>24}")
        for kind, modes in results[task]["by_kind"].items():
            both = "".join(f"{_percent(modes[mode]):>24}" for mode in ("thinking", "direct"))
            lines.append(f"    {kind:32}{both}")
        formed = results[task]["well_formed"]
        both = "".join(f"{_percent(formed[mode]):>24}" for mode in ("thinking", "direct"))
        lines.append(f"    {'well formed':32}{both}")
    if "budget" in results:
        for point in results["budget"]["points"]:
            budget = "none" if point["budget"] is None else point["budget"]
            lines.append(f"  thinking budget {budget!s:>5}     {_percent(point)}")
    if "needles" in results:
        found = results["needles"]
        for kind in ("plain", "distractors", "yarn"):
            for length, cells in found[kind]["lengths"].items():
                lines.append(f"  needles, {kind:12}{length:>7} tokens{_percent(cells['all']):>24}")
    if "tools" in results:
        lines.append(f"  right tool call          {_percent(results['tools']['right_call'])}")
    for name, reason in record["skipped"].items():
        lines.append(f"  {name}: skipped, {reason}")
    return "\n".join(lines)


def _percent(row: dict[str, Any]) -> str:
    if row["share"] is None:
        return "-"
    low, high = row["interval"]
    return f"{row['share']:.1%} ({low:.0%}-{high:.0%}, {row['of']})"

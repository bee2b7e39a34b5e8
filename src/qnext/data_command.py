"""``qnext data``: prepare shards, train a tokenizer, look at what was prepared."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from qnext.data.licences import POLICIES, Licence
from qnext.errors import DataError

DESCRIPTION = """\
Turn files into shards for training:

  qnext data tokenizer FILES --vocab-size 8192 --out TOKENIZER
  qnext data prepare FILES --tokenizer TOKENIZER --out DATA
  qnext data stats DATA

Files are text (.txt), JSON lines (.jsonl) or Parquet, plain or .gz, .xz, .zst. Rows hold "text", or
"messages" for conversations, whose loss falls on the assistant only. Instead of files, --recipe
names a Python file whose function plan(folder) returns the sources."""


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "data",
        help="prepare training data",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="data_action", metavar="ACTION", required=True)
    prepare = actions.add_parser("prepare", help="files to shards")
    _sources(prepare)
    prepare.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    prepare.add_argument("--out", type=Path, required=True, help="folder for shards")
    prepare.add_argument(
        "--against", type=Path, nargs="*", default=[], metavar="FILE",
        help="evaluation files whose texts must not be in the data",
    )  # fmt: skip
    prepare.add_argument(
        "--held-out", type=int, default=100, metavar="N",
        help="keep one document in N for evaluation; 0 for none (default 100)",
    )  # fmt: skip
    prepare.add_argument(
        "--no-near", action="store_true", help="drop exact duplicates only, not near ones"
    )
    tokenizer = actions.add_parser("tokenizer", help="train a byte-level BPE")
    _sources(tokenizer)
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="rows of the embedding")
    tokenizer.add_argument("--out", type=Path, required=True, help="folder for the tokenizer")
    tokenizer.add_argument(
        "--sample", type=float, default=40e6, metavar="CHARACTERS", help="text to learn from"
    )
    stats = actions.add_parser("stats", help="what a folder of shards holds")
    stats.add_argument("folder", type=Path, help="made by qnext data prepare")
    stats.add_argument("--verify", action="store_true", help="compute all checksums")
    stats.add_argument(
        "--show", metavar="SOURCE", help="print a few documents of a source, targets marked"
    )
    stats.add_argument("--tokenizer", type=Path, help="needed by --show")
    stats.add_argument("--json", action="store_true", help="as JSON")


def _sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", metavar="FILES", help="text files")
    parser.add_argument("--recipe", type=Path, metavar="FILE.py", help="has a function plan(data)")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder the recipe reads from"
    )
    parser.add_argument("--field", default="text", help="field that holds the text")
    parser.add_argument(
        "--utf8", choices=("strict", "repair"), default="strict",
        help="what to do with bytes that are not UTF-8: stop, or put U+FFFD",
    )  # fmt: skip
    parser.add_argument(
        "--max-line", type=int, default=64, metavar="MIB", help="longest JSON line (default 64)"
    )
    parser.add_argument(
        "--licence", default="research", metavar="KIND",
        help="terms of the files: own, public domain, CC0, CC BY, Apache-2.0, MIT, BSD, CDLA, "
        "CC BY-SA, research (default: research, which only the policy research lets in)",
    )  # fmt: skip
    parser.add_argument(
        "--policy", choices=POLICIES, default="research",
        help="widest terms to let in (default research: everything)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run ``qnext data ACTION``."""
    actions = {"prepare": _prepare, "tokenizer": _tokenizer, "stats": _stats}
    return actions[arguments.data_action](arguments)


def _plan(arguments: argparse.Namespace) -> Any:
    from qnext.data.prepare import Plan, file_source

    if arguments.recipe is not None:
        if arguments.files:
            raise DataError("give files or --recipe, not both.")
        return load_plan(arguments.recipe, arguments.data)
    if not arguments.files:
        raise DataError("no files were given. Name some, or a recipe with --recipe FILE.py.")
    licence = Licence(kind=arguments.licence, text=arguments.licence, attribution="")
    sources = tuple(
        file_source(
            path, licence=licence, field_name=arguments.field, utf8=arguments.utf8,
            max_line_bytes=arguments.max_line << 20,
        )
        for path in arguments.files
    )  # fmt: skip
    return Plan(
        sources=sources,
        against=tuple(getattr(arguments, "against", ())),
        held_out=getattr(arguments, "held_out", 0),
        near=not getattr(arguments, "no_near", False),
    )


def load_plan(file: Path, data: Path) -> Any:
    """What ``plan(data)`` of a Python file returns. Raises DataError."""
    from qnext.data.prepare import Plan

    if not file.is_file():
        raise DataError(f"recipe {file} is not there.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module they are defined in.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    make = getattr(module, "plan", None)
    if not callable(make):
        raise DataError(f"recipe {file} has no function plan(data).")
    made = make(data)
    if not isinstance(made, Plan):
        raise DataError(f"{file}: plan(data) returned {type(made).__name__}, expected a Plan.")
    return made


def _tokenizer(arguments: argparse.Namespace) -> int:
    from qnext.data.prepare import checked_sources, tokenizer_texts
    from qnext.text.tokenizer import Tokenizer

    size = arguments.vocab_size
    if size < 320:
        raise DataError(f"--vocab-size {size}: 256 bytes and 26 added tokens need at least 320.")
    plan = _plan(arguments)
    checked_sources(plan.sources, arguments.policy)
    texts = tokenizer_texts(plan, int(arguments.sample))
    # A few spare rows, so that a later stage can add tokens without a new model.
    made = Tokenizer.train(texts, vocab_size=size - 10)
    made.save(arguments.out)
    print(f"{arguments.out}: {made.vocab_size:,} tokens; the model's vocab_size is {size:,}")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from qnext.data.prepare import SUMMARY, prepare

    plan = _plan(arguments)
    found = prepare(plan, arguments.tokenizer, arguments.out, policy=arguments.policy)
    total = sum(counts.tokens for counts in found.values())
    contaminated = sum(counts.contaminated for counts in found.values())
    duplicates = sum(counts.duplicates + counts.near_duplicates for counts in found.values())
    print(_table(json.loads((arguments.out / SUMMARY).read_text(encoding="utf-8"))))
    print(
        f"{total:,} tokens; left out: {duplicates:,} documents seen before, {contaminated:,} that "
        f"repeat one of {len(plan.against)} evaluation files"
    )
    return 0


def _stats(arguments: argparse.Namespace) -> int:
    from qnext.data.prepare import SUMMARY, TRAIN
    from qnext.data.shards import open_shards

    shards = open_shards(arguments.folder / TRAIN, verify=arguments.verify)
    if arguments.show:
        if arguments.show not in shards:
            raise DataError(f"no source {arguments.show!r}; there are {', '.join(shards)}.")
        if arguments.tokenizer is None:
            raise DataError("--show needs --tokenizer, the folder the shards were made with.")
        _show(shards[arguments.show], arguments.tokenizer)
        return 0
    path = arguments.folder / SUMMARY
    if not path.is_file():
        raise DataError(f"{path} is missing: the preparation did not finish. Run it again.")
    summary = json.loads(path.read_text(encoding="utf-8"))
    print(json.dumps(summary, indent=1) if arguments.json else _table(summary))
    if arguments.verify:
        print(f"{len(shards)} shards: sizes and checksums are right")
    return 0


def _table(summary: dict[str, Any]) -> str:
    lines = [
        f"{'source':24}{'documents':>10}{'tokens':>12}{'targets':>12}{'bytes/target':>13}"
        f"{'held out':>9}{'left out':>9}  licence"
    ]
    for name, row in summary["sources"].items():
        left = sum(row[k] for k in ("broken", "empty", "duplicates", "near_duplicates",
                                    "contaminated"))  # fmt: skip
        ratio = row["judged_bytes"] / max(1, row["judged_tokens"])
        lines.append(
            f"{name:24}{row['samples']:>10,}{row['tokens']:>12,}{row['judged_tokens']:>12,}"
            f"{ratio:>13.2f}{row['held_out']:>9,}{left:>9,}  {row['text']}"
        )
    return "\n".join(lines)


def _show(shard: Any, folder: Path) -> None:
    from qnext.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    for index in range(min(3, len(shard))):
        ids, weights = shard.document(index)
        print(f"--- {shard.name} {index}: {len(ids)} tokens, targets between [[ and ]]")
        text, inside = "", False
        for token, weight in zip(ids[:2000].tolist(), weights[:2000].tolist(), strict=True):
            if bool(weight) != inside:
                text += "[[" if weight else "]]"
                inside = bool(weight)
            text += tokenizer.decode([token])
        print(text + ("]]" if inside else ""))

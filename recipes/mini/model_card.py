"""Write the model card of a trained qnext-mini beside its weights.

    python -m recipes.mini.model_card --model MODEL --run runs/qnext-mini \\
        --data .data/qnext-mini/data --evaluation record.json

Every number comes from a file that a command wrote: the run's recipe and log, the summary of the
prepared data, and the record and pictures of ``qnext eval mini``.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from qnext import cost
from qnext.config import ModelConfig
from qnext.errors import DataError
from qnext.eval.run import table

COMMANDS = """\
qnext data tokenizer --recipe recipes/qnext_mini.py --data ../shared/data --policy {policy} \\
    --vocab-size {vocabulary} --out .data/qnext-mini/tokenizer
qnext data prepare --recipe recipes/qnext_mini.py --data ../shared/data --policy {policy} \\
    --tokenizer .data/qnext-mini/tokenizer --out .data/qnext-mini/data
qnext train recipes/qnext_mini.py --minutes 180 --run runs/qnext-mini
qnext train report runs/qnext-mini
qnext train export runs/qnext-mini EXPORTED
qnext quantize EXPORTED MODEL --bits 8
qnext eval mini MODEL --out record.json --plots MODEL
python -m recipes.mini.model_card --model MODEL --run runs/qnext-mini \\
    --data .data/qnext-mini/data --evaluation record.json"""


def read_json(path: Path, made_by: str) -> Any:
    """A JSON file; DataError says which command makes it."""
    if not path.is_file():
        raise DataError(f"{path} is not there. Make it with {made_by}.")
    return json.loads(path.read_text(encoding="utf-8"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a run's log; of one that was repeated after a resume, the later."""
    if not path.is_file():
        raise DataError(f"{path} is not there. Name the folder of a run of qnext train.")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    steps = {line["step"]: line for line in lines if "event" not in line}
    return [line for _, line in sorted(steps.items())]


def rows(header: tuple[str, ...], body: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in body]
    return "\n".join(lines)


def stages(log: list[dict[str, Any]]) -> str:
    """Tokens, steps and time of each stage, and its last losses."""
    body = []
    begun, began = 0, 0.0
    for name in dict.fromkeys(line["stage"] for line in log):
        mine = [line for line in log if line["stage"] == name]
        seconds = sum(sum(line["seconds"].values()) for line in mine)
        tail = mine[-max(1, len(mine) // 20) :]
        loss = sum(line["loss"] for line in tail) / len(tail)
        tokens = mine[-1]["tokens"] - begun
        begun = mine[-1]["tokens"]
        began += seconds
        body.append((name, f"{len(mine):,}", f"{tokens:,}", f"{seconds / 60:.0f}", f"{loss:.3f}"))
    body.append(("all", f"{len(log):,}", f"{begun:,}", f"{began / 60:.0f}", ""))
    return rows(("stage", "steps", "tokens", "minutes", "loss at its end"), body)


def data_table(summary: dict[str, Any], shares: dict[str, dict[str, float]]) -> str:
    """Sources with their licences, tokens and shares per stage, and attributions."""
    body = []
    for name, row in summary["sources"].items():
        parts = [f"{stage} {100 * s[name]:.1f} %" for stage, s in shares.items() if name in s]
        said = ", ".join(parts) or "prepared, not used"
        body.append((name, row["text"], f"{row['tokens']:,}", said, row["attribution"]))
    return rows(("source", "licence", "tokens", "share of the stages", "attribution"), body)


def shares_of(recipe: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Stage -> source -> share of its tokens."""
    found = {}
    for stage in recipe["stages"]:
        mixture = stage["data"]["shares"]
        total = sum(mixture.values())
        found[stage["name"]] = {name: share / total for name, share in mixture.items()}
    return found


def samples(answers: list[dict[str, Any]]) -> str:
    """Questions and unselected answers as quotations."""
    parts = []
    for one in answers:
        text = one["text"].strip().replace("<think>", "*thinks:*").replace("</think>", "")
        quoted = [f"> {line}".rstrip() for line in text.splitlines()]
        if one["finish_reason"] != "stop":
            quoted.append("> *(cut)*")
        parts.append("\n".join([f"**{one['prompt']}**", "", *quoted]))
    return "\n\n".join(parts)


def card(model: Path, run: Path, data: Path, evaluation: Path) -> str:
    """The text of README.md."""
    config = ModelConfig.from_file(model)
    total = cost.parameters(config)
    summary = read_json(data / "prepared.json", "qnext data prepare")
    record = read_json(evaluation, "qnext eval mini --out")
    recorded = read_json(run / "recipe.json", "qnext train")
    recipe = recorded.get("recipe", recorded)
    pictures = [
        f"![{path.stem.replace('_', ' ')}]({path.name})"
        for path in (model / "curves.png", model / "thinking_budget.png", model / "needles.png")
        if path.is_file()
    ]
    left_out = sum(row["contaminated"] for row in summary["sources"].values())
    sections = [
        "# qnext-mini",
        "A small Qwen3-Next model that ships with qnext: Gated DeltaNet and gated full attention "
        "in the ratio 3:1, a sparse mixture of experts, a multi-token-prediction head, thinking "
        "and direct answers in one model. It chats in simple English, tells short stories and "
        "works out small sums. It is a demonstration, not a source of facts.",
        "```\nqnext chat qnext-mini\nqnext serve qnext-mini\n```",
        "## Architecture",
        rows(("", ""), [
            ("parameters", f"{total.total + total.mtp:,}, of which {total.mtp:,} in the MTP head"),
            ("active per token", f"{cost.active_parameters(config):,}"),
            ("layers", f"{config.num_hidden_layers}, every fourth with full attention"),
            ("hidden size", config.hidden_size),
            ("experts", f"{config.num_experts} of width {config.moe_intermediate_size}, "
                        f"{config.num_experts_per_tok} per token, and a shared one"),
            ("vocabulary", f"{config.vocab_size} rows: own byte-level BPE, single digits, NFC"),
            ("context", f"{config.max_position_embeddings} tokens, four times that with YaRN"),
        ]),
        "## Training",
        stages(read_log(run / "log.jsonl")),
        "Commands, from the repository root:",
        "```\n" + COMMANDS.format(policy=summary["policy"], vocabulary=config.vocab_size) + "\n```",
        *pictures,
        "## Measured",
        f"By `qnext eval mini` on {record['date']} ({record['machine']}), "
        f"{record['items_per_cell']} questions per cell; operands, names and numbers of the "
        "questions were never trained. Definitions are in docs/training.md.",
        "```\n" + table(record) + "\n```",
        "## Data and licences",
        data_table(summary, shares_of(recipe)),
        f"{left_out} documents that repeat a text of {', '.join(summary['evaluation_files'])} were "
        f"left out ({summary['evaluation_texts']:,} texts searched, "
        f"{summary['evaluation_texts_too_short']:,} too short to be).",
        "## Samples",
        "Greedy answers in the default mode, unselected:",
        samples(record["results"].get("samples", {}).get("answers", [])),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.model_card", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/qnext-mini"))
    parser.add_argument("--data", type=Path, default=Path(".data/qnext-mini/data"))
    parser.add_argument("--evaluation", type=Path, required=True, help="made by qnext eval mini")
    parser.add_argument("--curves", type=Path, help="picture made by qnext train report")
    options = parser.parse_args(arguments)
    if options.curves is not None:
        shutil.copyfile(options.curves, options.model / "curves.png")
    text = card(options.model, options.run, options.data, options.evaluation)
    (options.model / "README.md").write_text(text, encoding="utf-8")
    print(options.model / "README.md")


if __name__ == "__main__":
    main()

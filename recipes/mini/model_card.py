"""Write the model card of a trained qnext-mini beside its weights.

    python -m recipes.mini.model_card --model MODEL --run runs/qnext-mini \\
        --data .data/qnext-mini/data --evaluation MODEL/evaluation.json

Every number comes from a file that a command wrote: the run's recipe and log, the summary of the
prepared data, and the record and pictures of ``qnext eval mini``. What is said of the training
goes into MODEL/training.json, which a run that starts from this model continues (``--continues``).
The head of the evaluation becomes the table of the README (``docs/results/qnext_mini.json``).
"""

import argparse
import json
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_result

from qnext import cost
from qnext.config import ModelConfig
from qnext.errors import DataError
from qnext.eval.run import table
from qnext.eval.scores import share

COMMANDS = """\
qnext data tokenizer --recipe recipes/qnext_mini.py --data ../shared/data --policy {policy} \\
    --vocab-size {vocabulary} --out .data/qnext-mini/tokenizer
qnext data prepare --recipe recipes/qnext_mini.py --data ../shared/data --policy {policy} \\
    --tokenizer .data/qnext-mini/tokenizer --out .data/qnext-mini/data
qnext train recipes/qnext_mini.py --run runs/qnext-mini
qnext train export runs/qnext-mini EXPORTED
qnext quantize EXPORTED MODEL --bits 8
qnext train report runs/qnext-mini --out MODEL/curves.png
qnext eval mini MODEL --held-out .data/qnext-mini/data/held-out \\
    --pairs ../shared/data/evals/blimp_100.jsonl.xz --out MODEL/evaluation.json --plots MODEL
python -m recipes.mini.model_card --model MODEL --run runs/qnext-mini \\
    --data .data/qnext-mini/data --evaluation MODEL/evaluation.json"""


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


def history(run: Path, before: Path | None) -> dict[str, Any]:
    """How the model was trained: what ``before`` says (a training.json), and then this run.

    Keys: ``stages`` (steps, tokens, minutes and last loss of each), ``shares`` (stage -> source ->
    share of its tokens), ``notes`` (what settings do not say: RUN/notes.txt).
    """
    found: dict[str, Any] = {"stages": [], "shares": {}, "notes": []}
    if before is not None:
        found = read_json(before, "git checkout")
    recorded = read_json(run / "recipe.json", "qnext train")
    for stage in recorded.get("recipe", recorded)["stages"]:
        mixture = stage["data"]["shares"]
        total = sum(mixture.values())
        found["shares"][stage["name"]] = {name: share / total for name, share in mixture.items()}
    log, ended = read_log(run / "log.jsonl"), 0
    for name in dict.fromkeys(line["stage"] for line in log):
        mine = [line for line in log if line["stage"] == name]
        tail = mine[-max(1, len(mine) // 20) :]
        found["stages"].append({
            "stage": name,
            "steps": len(mine),
            "tokens": mine[-1]["tokens"] - ended,
            "minutes": round(sum(sum(line["seconds"].values()) for line in mine) / 60, 1),
            "loss": round(sum(line["loss"] for line in tail) / len(tail), 3),
        })  # fmt: skip
        ended = mine[-1]["tokens"]
    notes = run / "notes.txt"
    if notes.is_file():
        found["notes"] += notes.read_text(encoding="utf-8").strip().split("\n\n")
    return found


def stages(found: list[dict[str, Any]]) -> str:
    """Tokens, steps and time of each stage, and its last losses."""
    sums = {key: sum(one[key] for one in found) for key in ("steps", "tokens", "minutes")}
    body = [
        (one["stage"], f"{one['steps']:,}", f"{one['tokens']:,}", f"{one['minutes']:.0f}",
         f"{one['loss']:.3f}" if "loss" in one else "")
        for one in [*found, {"stage": "all", **sums}]
    ]  # fmt: skip
    return rows(("stage", "steps", "tokens", "minutes", "loss at its end"), body)


def data_table(summary: dict[str, Any], shares: dict[str, dict[str, float]]) -> str:
    """Sources with their licences, tokens and shares per stage, and attributions."""
    body = []
    for name, row in summary["sources"].items():
        parts = [f"{stage} {100 * s[name]:.1f} %" for stage, s in shares.items() if name in s]
        said = ", ".join(parts) or "prepared, not used"
        body.append((name, row["text"], f"{row['tokens']:,}", said, row["attribution"]))
    return rows(("source", "licence", "tokens", "share of the stages", "attribution"), body)


def samples(answers: list[dict[str, Any]]) -> str:
    """Questions and unselected answers as quotations."""
    parts = []
    for one in answers:
        text = one["text"].replace("<think>\n\n</think>\n\n", "").strip()
        text = text.replace("<think>", "*thinks:*").replace("</think>", "")
        quoted = [f"> {line}".rstrip() for line in text.splitlines()]
        if one["finish_reason"] != "stop":
            quoted.append("> *(cut)*")
        parts.append("\n".join([f"**{one['prompt']}**", "", *quoted]))
    return "\n\n".join(parts)


def card(model: Path, trained: dict[str, Any], data: Path, evaluation: Path) -> str:
    """The text of README.md; ``trained`` as ``history`` makes it."""
    config = ModelConfig.from_file(model)
    total = cost.parameters(config)
    summary = read_json(data / "prepared.json", "qnext data prepare")
    record = read_json(evaluation, "qnext eval mini --out")
    pictures = [
        f"![{path.stem.replace('_', ' ')}]({path.name})"
        for path in (*sorted(model.glob("curves*.png")), model / "thinking_budget.png",
                     model / "needles.png")
        if path.is_file()
    ]  # fmt: skip
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
            ("context", f"{config.max_position_embeddings} tokens"),
        ]),
        "## Training",
        stages(trained["stages"]),
        *trained["notes"],
        "Commands, from the repository root:",
        "```\n" + COMMANDS.format(
            policy=summary["policy"], vocabulary=config.vocab_size
        ) + "\n```",
        *pictures,
        "## Measured",
        f"By `qnext eval mini` on {record['date']} ({record['machine']}), "
        f"{record['items_per_cell']} questions per cell; operands, names and numbers of the "
        "questions were never trained. Definitions are in docs/training.md.",
        "```\n" + table(record) + "\n```",
        "## Limits",
        "- Facts are unreliable. Of most things it knows next to nothing.\n"
        "- Sums, word problems and tool calls are right for the kinds it was trained on; other "
        "wordings often fail.\n"
        "- Greedy decoding sometimes repeats itself in stories; the defaults sample.\n"
        "- It answers in simple English only and writes no code.\n"
        "- No row of its training was longer than 4,096 tokens; longer texts work through YaRN and "
        "are measured with needles alone.\n"
        "- Books of the nineteenth and early twentieth century and crowd-written small talk are "
        "part of its text; a word list kept slurs out, nothing kept out the views of their time.",
        "## Data and licences",
        "The weights and files of this folder are under the Apache License 2.0, like qnext itself. "
        "No corpus is included. Sources that ask for share-alike were left out on purpose. Text "
        "was cut into pieces, typographic quotes were made plain, unsuitable pieces were dropped, "
        "and questions were formed from dictionary and country entries; these are changes in the "
        "sense of the CC BY licence.",
        data_table(summary, trained["shares"]),
        "CC BY 4.0: https://creativecommons.org/licenses/by/4.0/. CDLA-Sharing-1.0: "
        "https://cdla.dev/sharing-1-0/. The authors of the single picture books are named in the "
        "Global African Storybook Project collections "
        "(https://github.com/global-asp/asp-source, https://github.com/global-asp/pb-source).",
        f"{left_out} documents that repeat a text of {', '.join(summary['evaluation_files'])} were "
        f"left out ({summary['evaluation_texts']:,} texts searched, "
        f"{summary['evaluation_texts_too_short']:,} too short to be).",
        "## Samples",
        "Greedy answers in the default mode, unselected:",
        samples(record["results"].get("samples", {}).get("answers", [])),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def pooled(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The share of several cells together."""
    return share(n < cell["right"] for cell in cells for n in range(cell["of"]))


def head(
    record: dict[str, Any], config: ModelConfig, first: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows for the README: what was measured, the goal, and whether it was reached.

    ``first`` holds the bits per byte of the first embedded model, by the same command.
    """
    found, rows = record["results"], []
    total = cost.parameters(config)

    def row(
        what: str, value: str, conditions: str, goal: str = "", met: bool | None = None
    ) -> None:
        said = "" if met is None else "yes" if met else "no"
        rows.append({"what": what, "value": value, "goal": goal, "met": said,
                     "conditions": conditions})  # fmt: skip

    def rate(what: str, cells: list[dict[str, Any]], conditions: str, goal: float) -> float:
        one = pooled(cells)
        low, high = one["interval"]
        row(what, f"{one['share']:.1%} ({low:.0%} to {high:.0%})", f"{conditions}, {one['of']:,}",
            f"{goal:.0%}", one["share"] >= goal)  # fmt: skip
        return one["share"]

    row("Parameters", f"{total.total + total.mtp:,}",
        f"{cost.active_parameters(config):,} active per token, MTP head {total.mtp:,}")  # fmt: skip
    text, before = found["text"], first["results"]["text"]
    ratios = {name: text[name]["bits_per_byte"] / before[name]["bits_per_byte"] for name in before}
    for name in ("tinystories", "children_classics", "textbooks", "self_dialogue"):
        row(f"Bits per byte, held-out {name.replace('_', ' ')}",
            f"{text[name]['bits_per_byte']:.3f}",
            f"the first model: {before[name]['bits_per_byte']:.3f}")  # fmt: skip
    mean = exp(sum(map(log, ratios.values())) / len(ratios))
    row("Bits per byte beside the first model's", f"{1 - mean:.1%} lower",
        f"geometric mean of {len(ratios)} sources; {sum(r <= 0.95 for r in ratios.values())} of "
        f"them 5 % lower; from {1 - max(ratios.values()):.1%} to {1 - min(ratios.values()):.1%}",
        "5 % lower", mean <= 0.95)  # fmt: skip
    rate("BLiMP", [found["pairs"]["accuracy"]], "pairs, ties wrong", 0.70)
    rate("First drafts accepted", [found["drafts"]], "greedy stories, drafts", 0.60)
    needles = found["needles"]
    longest = str(needles["trained_length"])
    rate(f"Needles among {longest} tokens", [needles["plain"]["lengths"][longest]["all"]],
         "11 depths, exact", 0.95)  # fmt: skip
    four = str(needles["yarn_factor"] * needles["trained_length"])
    rate(f"Needles among {four} tokens with YaRN", [needles["yarn"]["lengths"][four]["all"]],
         "11 depths, exact", 0.80)  # fmt: skip
    kinds = {**found["arithmetic"]["by_kind"], **found["problems"]["by_kind"]}

    def cells(mode: str, *beginnings: str) -> list[dict[str, Any]]:
        return [modes[mode] for kind, modes in kinds.items() if kind.startswith(beginnings)]

    for mode in ("thinking", "direct"):
        rate(f"Addition and subtraction to 3 digits, {mode}", cells(mode, "add", "subtract"),
             "operands never trained", 0.95)  # fmt: skip
    for what, beginning in (("2 × 2-digit products", "multiply, 2x2"),
                            ("Word problems of two steps", "word problem")):  # fmt: skip
        with_it = rate(f"{what}, thinking", cells("thinking", beginning), "never trained", 0.85)
        without = pooled(cells("direct", beginning))
        row(f"{what}, direct", f"{without['share']:.1%}", f"never trained, {without['of']}",
            "20 points below thinking", with_it - without["share"] >= 0.2)  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.model_card", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/qnext-mini"))
    parser.add_argument("--continues", type=Path, metavar="TRAINING.json",
                        help="record of the model that the run started from")  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path(".data/qnext-mini/data"))
    parser.add_argument("--evaluation", type=Path, required=True, help="made by qnext eval mini")
    options = parser.parse_args(arguments)
    trained = history(options.run, options.continues)
    text = card(options.model, trained, options.data, options.evaluation)
    record_file = json.dumps(trained, indent=1) + "\n"
    (options.model / "training.json").write_text(record_file, encoding="utf-8")
    (options.model / "README.md").write_text(text, encoding="utf-8")
    record = read_json(options.evaluation, "qnext eval mini --out")
    first = read_json(RESULTS / "qnext_mini_first.json", "git checkout")
    rows = head(record, ModelConfig.from_file(options.model), first)
    write_result("qnext_mini", "qnext-mini, the embedded model", rows,
                 command="qnext eval mini", date=record["date"])  # fmt: skip
    print(options.model / "README.md")


if __name__ == "__main__":
    main()

"""Write the model card, the loss curve and the samples beside the weights.

    python -m recipes.mini.card --model src/qnext/models/qnext-mini

Every number comes from a file that a command wrote: the run's log, the evaluation, the shards'
manifest.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import write_result
from recipes.mini import sources
from recipes.mini.export import read_state
from recipes.mini.train import ALLOCATOR

from qnext import cost
from qnext.config import ModelConfig

KEPT_LINES = 400
"""Lines of the training log that are shipped as the loss curve."""


def read_log(path: Path) -> list[dict]:
    """The lines of a training log; of a step that was repeated after a resume, the later one."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [by_step for _, by_step in sorted({line["step"]: line for line in lines}.items())]


def smoothed(lines: list[dict], key: str, width: int) -> tuple[list[float], list[float]]:
    """(tokens in millions, mean of ``key`` over ``width`` steps), steps without it left out."""
    found = [line for line in lines if key in line]
    x, y = [], []
    for start in range(0, len(found) - width + 1, max(1, width // 2)):
        window = found[start : start + width]
        x.append(window[-1]["tokens"] / 1e6)
        y.append(sum(line[key] for line in window) / width)
    return x, y


def draw_curve(lines: list[dict], path: Path) -> None:
    """Loss over tokens as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), dpi=110)
    width = max(2, len(lines) // 120)
    axes.plot(*smoothed(lines, "loss", width), label="next token")
    axes.plot(*smoothed(lines, "mtp_loss", width), label="token after next (MTP)")
    switch = next((ln["tokens"] / 1e6 for ln in lines if ln["stage"] == "finetuning"), None)
    if switch is not None:
        axes.axvline(switch, color="0.6", linestyle=":", label="fine-tuning begins")
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss, nats per judged token")
    axes.set_title("qnext-mini: training loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _licences(manifest: dict) -> str:
    rows = []
    for entry in sources.SOURCES:
        counts = manifest["pretraining"].get(entry.name) or manifest["finetuning"][entry.name]
        rows.append(
            (
                f"{entry.name} ({counts['documents']:,} documents)",
                entry.licence,
                f"{entry.pretrain:.0%} / {entry.finetune:.0%}",
                entry.attribution,
            )
        )
    return _table(("source", "licence", "share in pretraining / fine-tuning", "attribution"), rows)


def _samples(samples: list[dict]) -> str:
    parts = []
    for sample in samples:
        lines = [f"**{sample['prompt']}**", ""]
        if sample["reasoning"] and sample["reasoning"].strip():
            lines += [f"> *thinks:* {' '.join(sample['reasoning'].split())}", ">"]
        lines += [f"> {line}".rstrip() for line in sample["text"].strip().splitlines()]
        if sample["finish_reason"] != "stop":
            lines.append(f"> *(cut after {sample['tokens']} tokens)*")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def card(model_dir: Path, run: Path, shards: Path) -> str:
    """The text of README.md."""
    config = ModelConfig.from_file(model_dir)
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    state = read_state(run / "state.safetensors")
    lines = read_log(run / "log.jsonl")
    total = cost.parameters(config)
    finetuned = sum(
        later["tokens"] - earlier["tokens"]
        for earlier, later in pairwise(lines)
        if later["stage"] == "finetuning"
    )
    heldout = [
        (name, f"{row['bits_per_byte']:.3f}", f"{row['loss_per_token']:.3f}", f"{row['tokens']:,}")
        for name, row in found["heldout"].items()
    ]
    mtp = [
        (name, f"{row['right']:.1%}", f"{row['same_as_main_head']:.1%}", f"{row['tokens']:,}")
        for name, row in found["mtp"].items()
    ]
    sums = [
        (kind, f"{row['thinking']:.0%}", f"{row['plain']:.0%}")
        for kind, row in found["arithmetic"].items()
    ]
    stop = found["stopping"]
    sections = [
        "# qnext-mini",
        "A very small Qwen3-Next model that ships with qnext, so that everything in the package "
        "can "
        "be tried at once: Gated DeltaNet and gated full attention in the ratio 3:1, a sparse "
        "mixture of experts in every layer, and a multi-token-prediction head. It chats in simple "
        "English sentences and tells short stories. It is a demonstration, not a source of facts.",
        "```\nqnext chat qnext-mini\nqnext serve qnext-mini\n```",
        "## Architecture",
        _table(
            ("", ""),
            [
                (
                    "parameters",
                    f"{total.total + total.mtp:,}, of which {total.mtp:,} in the MTP head",
                ),
                ("active per token", f"{cost.active_parameters(config):,}"),
                ("layers", f"{config.num_hidden_layers}: {_pattern(config)}"),
                ("hidden size", config.hidden_size),
                (
                    "Gated DeltaNet",
                    f"{config.linear_num_key_heads} key and {config.linear_num_value_heads} value "
                    f"heads of {config.linear_key_head_dim}",
                ),
                (
                    "attention",
                    f"{config.num_attention_heads} query and {config.num_key_value_heads} "
                    f"key/value "
                    f"heads of {config.head_dim}, rotary on {config.rotary_dim} dimensions, gated",
                ),
                (
                    "experts",
                    f"{config.num_experts} of width {config.moe_intermediate_size}, "
                    f"{config.num_experts_per_tok} per token, and a shared one of width "
                    f"{config.shared_expert_intermediate_size}",
                ),
                (
                    "vocabulary",
                    f"{config.vocab_size} rows: own byte-level BPE, single digits, NFC, the 26 "
                    f"added "
                    "tokens of Qwen with own ids",
                ),
                ("context", f"{config.max_position_embeddings} positions; trained up to 1,024"),
                ("weights", "bfloat16, decay terms float32"),
            ],
        ),
        "## Training",
        f"{state['tokens']:,} tokens in {state['steps']:,} steps and "
        f"{state['elapsed'] / 60:.0f} minutes on two CPU cores shared with other work, the last "
        f"{finetuned:,} tokens fine-tuning on conversations (loss on the assistant only, "
        f"{state['plan']['replay']:.0%} pretraining text mixed in). Muon for matrices and AdamW "
        f"for the rest, peak learning rate {state['plan']['peak_rate']:g}, bfloat16 with float32 "
        f"masters. The MTP head joined after {state['plan']['mtp_from']:.0%} of the time with "
        f"weight {state['plan']['mtp_weight']}.",
        *_notes(run),
        "![training loss](loss_curve.png)",
        "The points of the curve are in `loss_curve.jsonl`. Commands, from the repository root:",
        "```\npython -m recipes.mini.data --data ../shared/data\n"
        f"{ALLOCATOR} \\\n  python -m recipes.mini.train --minutes {_minutes(state)} --workers 2\n"
        "python -m recipes.mini.export\npython -m recipes.mini.evaluate\n"
        "python -m recipes.mini.card\n```",
        "## Measured",
        f"By `python -m recipes.mini.evaluate` on {found['date']} ({found['machine']}); greedy "
        "decoding or likelihoods throughout.",
        "Held-out text: one story, dialogue or piece in a hundred, never trained on. Dialogues, "
        "and rows ending in `.chat`, count the assistant's words only. A few old tales stand in "
        "two of the collections in different wording, so the rows of fairy tales may be a little "
        "too good.",
        _table(("source", "bits per byte", "loss per token", "tokens"), heldout),
        "Multi-token prediction on held-out stories: how often the head's first choice is the "
        "token after next, and how often it is what the main head says one token later (what "
        "greedy speculative decoding would accept).",
        _table(("MTP head", "right", "same as main head", "tokens"), mtp),
        f"Arithmetic, {found['arithmetic_items']} questions each; pairs of two digits were never "
        "trained on, in either order.",
        _table(("kind", "thinking", "plain"), sums),
        f"Of {stop['prompts']} held-out chat prompts, {stop['stopped']:.1%} of the answers ended "
        f"by themselves within 300 tokens and {stop['one_closed_think_block']:.1%} had exactly one "
        "closed think block.",
    ]
    if "blimp" in found:
        pairs = found["blimp"]
        sections.append(
            f"BLiMP ({pairs['pairs']:,} minimal pairs, {pairs['paradigms']} paradigms, sum of "
            f"log-probabilities, ties wrong): {pairs['accuracy']:.1%}."
        )
    sections += [
        "## Samples",
        "Greedy answers in the default mode, unselected:",
        _samples(found["samples"]),
        "## Limits",
        "- Facts are unreliable. It was trained on capitals and word meanings and still mixes them "
        "up; of anything else it knows next to nothing.\n"
        "- Sums are right for small numbers and get worse with every digit.\n"
        "- It answers single questions. In a longer conversation it keeps to small talk: a sum or "
        "a story asked for after other turns often gets a wrong answer, because fine-tuning seldom "
        "mixed kinds in one conversation. Start a new chat for a new topic.\n"
        "- It answers in simple English only, writes no code, and has seen no tool calls.\n"
        "- Many answers to everyday questions repeat the fine-tuning text word for word, and "
        "stories asked for by hero follow a handful of plots.\n"
        "- Children's books of the nineteenth century and crowd-written small talk are part of its "
        "training text; a word list kept slurs out, nothing kept out the views of their time.",
        "## Licence and training data",
        "The weights and files of this folder are under the Apache License 2.0, like qnext itself. "
        "No corpus is included. Sources that ask for share-alike were left out on purpose. Text "
        "was cut into pieces, typographic quotes were made plain, unsuitable pieces were dropped, "
        "and questions were formed from dictionary and country entries; these are changes in the "
        "sense of the CC BY licence.",
        _licences(manifest),
        "CC BY 4.0: https://creativecommons.org/licenses/by/4.0/. CDLA-Sharing-1.0: "
        "https://cdla.dev/sharing-1-0/. The authors of the single picture books are named in the "
        "Global African Storybook Project collections "
        "(https://github.com/global-asp/asp-source, https://github.com/global-asp/pb-source).",
    ]
    return "\n\n".join(sections) + "\n"


def _pattern(config: ModelConfig) -> str:
    short = {"linear_attention": "delta", "full_attention": "attention"}
    return ", ".join(short[kind] for kind in config.layer_types)


def _notes(run: Path) -> list[str]:
    """What happened to this run that its settings do not say, if anything did."""
    path = run / "notes.txt"
    return [path.read_text(encoding="utf-8").strip()] if path.is_file() else []


def _minutes(state: dict) -> int:
    return round(state["elapsed"] / 60)


def write(model_dir: Path, run: Path, shards: Path) -> None:
    """README.md, loss_curve.png, loss_curve.jsonl and samples.json in the model folder."""
    lines = read_log(run / "log.jsonl")
    step = max(1, len(lines) // KEPT_LINES)
    kept = "".join(json.dumps(line) + "\n" for line in lines[::step])
    (model_dir / "loss_curve.jsonl").write_text(kept, encoding="utf-8")
    draw_curve(lines, model_dir / "loss_curve.png")
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    text = json.dumps(found["samples"], indent=1, ensure_ascii=False)
    (model_dir / "samples.json").write_text(text + "\n", encoding="utf-8")
    (model_dir / "README.md").write_text(card(model_dir, run, shards), encoding="utf-8")


def record(found: dict, config: ModelConfig) -> None:
    """docs/results/qnext_mini.json: the head of the evaluation, for the table of the README."""
    head, sums = found["mtp"]["trained"], found["arithmetic"]["addition, 2 digits"]
    rows = [
        ("Parameters", f"{cost.parameters(config).total + cost.parameters(config).mtp:,}",
         "MTP head included"),
        ("Bits per byte, held-out TinyStories", found["heldout"]["tinystories"]["bits_per_byte"],
         "never trained on"),
        ("Bits per byte, held-out children's classics",
         found["heldout"]["children_classics"]["bits_per_byte"], "never trained on"),
        ("MTP head right about the token after next", f"{head['right']:.1%}",
         f"held-out stories; untrained head {found['mtp']['untrained head']['right']:.1%}"),
        ("MTP head agrees with the main head", f"{head['same_as_main_head']:.1%}",
         "held-out stories, teacher-forced"),
        ("BLiMP", f"{found['blimp']['accuracy']:.1%}",
         f"{found['blimp']['pairs']:,} pairs, sum of log-probabilities, ties wrong"),
        ("Answers that stop by themselves", f"{found['stopping']['stopped']:.1%}",
         f"{found['stopping']['prompts']} held-out prompts"),
        ("Sums of two digits, thinking", f"{sums['thinking']:.0%}", "operands never trained on"),
    ]  # fmt: skip
    write_result(
        "qnext_mini",
        "qnext-mini, the embedded model",
        [{"what": what, "value": str(value), "conditions": how} for what, value, how in rows],
        command="python -m recipes.mini.evaluate",
        date=found["date"],
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.card", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/qnext/models/qnext-mini"))
    parser.add_argument("--run", type=Path, default=Path("runs/mini"))
    parser.add_argument("--shards", type=Path, default=Path(".data/mini"))
    options = parser.parse_args(arguments)
    write(options.model, options.run, options.shards)
    found = json.loads((options.run / "evaluation.json").read_text(encoding="utf-8"))
    record(found, ModelConfig.from_file(options.model))
    print(options.model / "README.md")


if __name__ == "__main__":
    main()

"""Corpora to packed shards: train the tokenizer, encode every document, write flat arrays.

    python -m recipes.mini.data --data ../shared/data --out .data/mini

One shard is four files: ``NAME.ids.npy`` (uint16, documents end to end), ``NAME.judged.npy``
(uint8, 1 where the token counts in the loss), ``NAME.ends.npy`` (int64, where each document ends)
and ``NAME.bytes.npy`` (int64, UTF-8 bytes of each document's judged text). They are read
memory-mapped.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
from recipes.mini import chats, documents, sources, tokenizer
from tokenizers import Tokenizer
from tqdm import tqdm

from qnext.errors import DataError

SEED = 20261121
TOKENIZER_SAMPLE_CHARACTERS = 30_000_000
STAGES = ("pretraining", "finetuning", "heldout")


@dataclass(frozen=True, slots=True)
class Shard:
    """The encoded documents of one source, memory-mapped."""

    name: str
    ids: np.ndarray
    judged: np.ndarray
    ends: np.ndarray
    bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, judged) of document ``index``."""
        start = int(self.ends[index - 1]) if index else 0
        end = int(self.ends[index])
        return self.ids[start:end], self.judged[start:end]


def encode_item(
    item: documents.Item, coder: Tokenizer, *, every_turn: bool
) -> tuple[list[int], list[int]]:
    """(ids, judged). Plain text stands between two ``<|endoftext|>``; the first is context only."""
    if isinstance(item, chats.Chat):
        return chats.encode(item, coder, every_turn=every_turn)
    end = coder.token_to_id("<|endoftext|>")
    ids = coder.encode(item, add_special_tokens=False).ids
    return [end, *ids, end], [0, *([1] * len(ids)), 1]


def judged_bytes(item: documents.Item) -> int:
    """UTF-8 bytes of the text the model is judged on, special tokens left out."""
    if isinstance(item, chats.Chat):
        return sum(len(text.encode()) for role, text in item.messages if role == "assistant")
    return len(item.encode())


def write_shard(
    folder: Path,
    name: str,
    items: Iterable[documents.Item],
    coder: Tokenizer,
    *,
    every_turn: bool = False,
) -> dict:
    """Encode ``items`` into one shard; returns its counts."""
    ids: list[int] = []
    judged: list[int] = []
    ends: list[int] = []
    sizes: list[int] = []
    for item in items:
        new_ids, new_judged = encode_item(item, coder, every_turn=every_turn)
        ids += new_ids
        judged += new_judged
        ends.append(len(ids))
        sizes.append(judged_bytes(item))
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.ids.npy", np.array(ids, dtype=np.uint16))
    np.save(folder / f"{name}.judged.npy", np.array(judged, dtype=np.uint8))
    np.save(folder / f"{name}.ends.npy", np.array(ends, dtype=np.int64))
    np.save(folder / f"{name}.bytes.npy", np.array(sizes, dtype=np.int64))
    return {
        "documents": len(ends),
        "tokens": len(ids),
        "judged_tokens": int(sum(judged)),
        "judged_bytes": int(sum(sizes)),
    }


def open_shards(folder: Path) -> dict[str, Shard]:
    """The shards of one stage by source name. Raises DataError if there are none."""
    names = sorted(path.name[: -len(".ids.npy")] for path in folder.glob("*.ids.npy"))
    if not names:
        raise DataError(f"no shards in {folder}. Run `python -m recipes.mini.data` first.")
    parts = ("ids", "judged", "ends", "bytes")
    return {
        name: Shard(name, *(np.load(folder / f"{name}.{p}.npy", mmap_mode="r") for p in parts))
        for name in names
    }


def sample_texts(by_source: dict[str, list[documents.Item]], limit: int) -> Iterator[str]:
    """Texts for the tokenizer: every source in its share of the whole mixture, ``limit``
    characters.
    """
    total = sum(s.pretrain + s.finetune for s in sources.SOURCES)
    for name, items in by_source.items():
        entry = sources.source(name)
        budget = limit * (entry.pretrain + entry.finetune) / total
        order = list(range(len(items)))
        Random(f"{SEED}/{name}/tokenizer").shuffle(order)
        for index in order:
            if budget <= 0:
                break
            item = items[index]
            texts = (
                [item]
                if isinstance(item, str)
                else [c for _, c in item.messages] + [item.reasoning]
            )
            for text in texts:
                budget -= len(text)
                yield text


def build(data_dir: Path, out: Path, vocab_size: int) -> dict:
    """Run the whole preparation; returns and writes the manifest."""
    stages: dict[str, dict[str, list[documents.Item]]] = {stage: {} for stage in STAGES}
    for entry in tqdm(sources.SOURCES, desc="reading", unit="source"):
        rows = sources.read_rows(entry, data_dir) if entry.file else []
        for stage, share, make in (
            ("pretraining", entry.pretrain, documents.pretraining),
            ("finetuning", entry.finetune, documents.finetuning),
        ):
            if not share:
                continue
            kept: list[documents.Item] = []
            held: list[documents.Item] = []
            for document in make(entry, rows, SEED):
                target = held if documents.is_held_out(document.id) else kept
                target.append(document.item)
            stages[stage][entry.name] = kept
            if held:
                suffix = "" if stage == "pretraining" else ".chat"
                stages["heldout"][entry.name + suffix] = held
    merged = {
        s.name: stages["pretraining"].get(s.name, []) + stages["finetuning"].get(s.name, [])
        for s in sources.SOURCES
    }
    coder = tokenizer.train_tokenizer(sample_texts(merged, TOKENIZER_SAMPLE_CHARACTERS), vocab_size)
    tokenizer.save_tokenizer(coder, out / "tokenizer")
    manifest: dict = {
        "seed": SEED,
        "vocab_size": vocab_size,
        "tokenizer_sha256": hashlib.sha256(
            (out / "tokenizer/tokenizer.json").read_bytes()
        ).hexdigest(),
        "sources": [asdict(s) for s in sources.SOURCES],
    }
    for stage, by_source in stages.items():
        manifest[stage] = {}
        for name, items in tqdm(by_source.items(), desc=stage, unit="shard"):
            manifest[stage][name] = write_shard(
                out / stage, name, items, coder, every_turn=stage == "pretraining"
            )
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.data", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of corpora"
    )
    parser.add_argument("--out", type=Path, default=Path(".data/mini"), help="where shards go")
    parser.add_argument("--vocab-size", type=int, default=tokenizer.VOCAB_SIZE)
    options = parser.parse_args(arguments)
    manifest = build(options.data, options.out, options.vocab_size)
    for stage in STAGES:
        print(f"{stage}:")
        for name, counts in manifest[stage].items():
            ratio = counts["judged_bytes"] / max(1, counts["judged_tokens"])
            print(
                f"  {name:22} {counts['documents']:>7} documents {counts['tokens']:>9} tokens "
                f"{ratio:5.2f} bytes per judged token"
            )


if __name__ == "__main__":
    main()

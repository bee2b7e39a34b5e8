"""What quantising a model cost: ``certificate.json`` and ``certificate.md`` of a packed folder.

Source and packed weights run over the same text in float32: how far the distributions of the next
token are apart (KL divergence), how often the likeliest token is the same, the perplexity of both,
and how often the MTP head's draft would be accepted. Besides, the error of the weights themselves,
layer by layer, read back from the files. A model too large to run here gets the latter alone.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qnext import __version__, native
from qnext.errors import CheckpointError, DataError
from qnext.model.batch import TokenBatch
from qnext.model.model import CausalLM
from qnext.quantization import TILE_ROWS, Bits, tile_bytes
from qnext.text.tokenizer import Tokenizer
from qnext.weights.calibrate import calibrate
from qnext.weights.checkpoint import load_model
from qnext.weights.formats import PackedExperts, PackedMatrix, unpack
from qnext.weights.packed import PackedModel, Part, open_packed, parts, unpack_into_model
from qnext.weights.quantize import Quantised, finish, quantize
from qnext.weights.source import SourceReader

TEXT = Path(__file__).with_name("certificate_text.txt")
"""The text a certificate is measured on unless another is given."""
CERTIFICATES = ("certificate.json", "certificate.md")
ROW_TOKENS = 512
"""The text is cut into rows of at most so many tokens."""
KEPT_LOGITS = 500_000_000
"""Most logits of the source that are kept for the comparison; longer texts are cut."""
SAMPLED_EXPERTS = 16
_STRIP_ROWS = 128 * TILE_ROWS
_MAPPED_BYTES = 500_000_000
_CALIBRATION_TOKENS = 16_384
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def quantize_with_certificate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: Bits,
    *,
    calibration: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    forward: bool | None = None,
) -> str:
    """Quantise, certify, and return the certificate as readable text.

    ``calibration`` is a text file that rounding is weighted by, ``text`` the one the certificate is
    measured on. ``forward`` None runs the models if the source fits into the memory that is free.
    Raises CheckpointError and DataError.
    """
    reader = SourceReader(source)
    if native.unfit() is None:
        native.load().set_threads(os.cpu_count() or 1)
    runs = _fits(reader) if forward is None else forward
    rows, described = read_rows(reader, text)
    importance: Mapping[str, Tensor] = {}
    calibrated = None
    if calibration is not None:
        rows_seen, calibrated = read_rows(reader, calibration, most=_CALIBRATION_TOKENS)
        model = load_model(reader.folder, dtype="float32")
        importance = calibrate(model, rows_seen)
        del model
    written = quantize(source, target, bits, importance=importance)
    found = _certify(reader, written, rows, described, calibrated, runs)
    folder = written.model.folder
    for name, content in zip(
        CERTIFICATES, (json.dumps(found, indent=2) + "\n", render(found)), strict=True
    ):
        (folder / name).write_text(content, encoding="utf-8")
    finish(folder)
    return render(found)


def _certify(
    reader: SourceReader,
    written: Quantised,
    rows: Sequence[Tensor],
    text: dict[str, Any],
    calibrated: dict[str, Any] | None,
    runs: bool,
) -> dict[str, Any]:
    packed = written.model
    source_bytes = sum(file.stat().st_size for file in reader.files)
    found: dict[str, Any] = {
        "certificate": 1,
        "qnext": __version__,
        "date": date.today().isoformat(),
        "source": reader.folder.name,
        "bits": asdict(packed.bits),
        "bytes": {"source": source_bytes, "packed": packed.num_bytes},
        "files": dict(written.checksums),
        "calibrated_on": calibrated,
        "text": text,
        "weights": weight_errors(reader, packed.folder),
    }
    if runs:
        found["forward"] = compare(
            reader.folder, lambda model: unpack_into_model(model, packed), rows
        )
    else:
        need = _forward_bytes(reader)
        found["forward"] = None
        found["left_out"] = (
            "KL divergence, top-1 agreement, perplexity and MTP acceptance: both models would have "
            f"to run in float32, which takes {need / 1e9:.1f} GB. --forward runs them anyway."
        )
    return found


# -- running both --------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    source: Path, change: Callable[[CausalLM], None], rows: Sequence[Tensor]
) -> dict[str, Any]:
    """Run a model in float32 over rows of token ids, before and after ``change`` altered it."""
    model = load_model(source, dtype="float32")
    most = max(2, KEPT_LOGITS // model.config.vocab_size)
    rows = list(_at_most(rows, most))
    kept = [_forward(model, row) for row in rows]
    change(model)
    divergence: list[Tensor] = []
    same = total = 0
    nats = [0.0, 0.0]
    accepted, drafted = [0, 0], 0
    for row, (before, drafts_before) in zip(rows, kept, strict=True):
        after, drafts_after = _forward(model, row)
        divergence.append((before.exp() * (before - after)).sum(-1).clamp_min(0))
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        total += len(row)
        for i, logprobs in enumerate((before, after)):
            nats[i] -= float(logprobs[:-1].gather(-1, row[1:, None]).double().sum())
        pairs = ((before, drafts_before), (after, drafts_after))
        for i, (logprobs, drafts) in enumerate(pairs):
            if drafts is not None:
                accepted[i] += int((drafts == logprobs.argmax(-1)[1:-1]).sum())
        drafted += 0 if drafts_before is None else len(drafts_before)
    each = torch.cat(divergence)
    predicted = total - len(rows)
    found: dict[str, Any] = {
        "tokens": total,
        "kl_mean": float(each.mean()),
        "kl_median": float(each.median()),
        "kl_99_percent": float(each.kthvalue(max(1, round(0.99 * len(each))))[0]),
        "kl_largest": float(each.max()),
        "top_1_agreement": same / total,
        "perplexity_source": math.exp(nats[0] / predicted),
        "perplexity_packed": math.exp(nats[1] / predicted),
        "mtp": None,
    }
    if drafted:
        before, after = (count / drafted for count in accepted)
        found["mtp"] = {
            "drafts": drafted,
            "accepted_source": before,
            "accepted_packed": after,
            "drift": after - before,
        }
    return found


def _forward(model: CausalLM, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities [T, V] float32, and what the MTP head takes for tokens 2 ... T - 1."""
    batch = TokenBatch.pack([row])
    hidden_PD = model.run(batch)
    logprobs = model.lm_logits(hidden_PD).float().log_softmax(-1)
    if model.mtp is None:
        return logprobs, None
    # The last token has no successor; the rows that are kept do not see it.
    next_ids = torch.cat((row[1:], row[-1:]))
    drafts = model.lm_logits(model.run_mtp(batch, next_ids, hidden_PD))
    return logprobs, drafts[:-2].argmax(-1)


def _fits(reader: SourceReader) -> bool:
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.M)
    return available is not None and _forward_bytes(reader) < 0.8 * int(available[1]) * 1024


def _forward_bytes(reader: SourceReader) -> int:
    """Float32 parameters and the logits that are kept."""
    stored = sum(math.prod(slot.shape) for slot in reader.slots.values())
    return 4 * (stored + 2 * KEPT_LOGITS // 4)


# -- weights -------------------------------------------------------------------------------------


def weight_errors(reader: SourceReader, folder: Path) -> list[dict[str, Any]]:
    """Relative error of every packed weight: root of the squared error over the squared weights.

    Of layers with more than 16 experts, 16 at equal distances are compared.
    """
    found = []
    packed, seen = open_packed(folder), 0
    for part in parts(reader.config, packed.bits):
        if part.format is None:
            continue
        # A new mapping from time to time, so that the pages that were read do not add up.
        seen += math.prod(part.stored_shape)
        if seen > _MAPPED_BYTES:
            packed, seen = open_packed(folder), 0
        error = norm = 0.0
        for before, after in _pairs(part, reader, packed):
            error += float((after - before).square().sum(dtype=torch.float64))
            norm += float(before.square().sum(dtype=torch.float64))
        entry: dict[str, Any] = {
            "name": part.name,
            "format": part.format,
            "relative_error": math.sqrt(error / norm) if norm else 0.0,
        }
        if part.kind == "experts" and part.shape[0] > SAMPLED_EXPERTS:
            entry["experts_compared"] = SAMPLED_EXPERTS
        found.append(entry)
    return found


def _pairs(
    part: Part, reader: SourceReader, packed: PackedModel
) -> Iterator[tuple[Tensor, Tensor]]:
    """(before, after) of every published tensor of a part, or of those that are compared."""

    def before(name: str) -> Tensor:
        value = reader.read(name).float()
        reader.done_with(name)
        return value

    if part.kind == "experts":
        gate_up, down = (packed[f"{part.name}.{n}_proj"] for n in ("gate_up", "down"))
        assert isinstance(gate_up, PackedExperts)
        assert isinstance(down, PackedExperts)
        count = part.shape[0]
        sampled = min(count, SAMPLED_EXPERTS)
        for e in (i * count // sampled for i in range(sampled)):
            gate, up, back = part.inputs[3 * e : 3 * e + 3]
            yield torch.cat((before(gate), before(up))), unpack(gate_up.one(e))[0]
            yield before(back), unpack(down.one(e))[0]
        return
    weight = packed[part.name]
    if isinstance(weight, PackedMatrix):
        # In strips: an output head in float32 would be the largest thing in memory.
        stored, tile = reader.read(part.name), tile_bytes(weight.format, weight.cols)
        for first in range(0, weight.rows, _STRIP_ROWS):
            rows = stored[first : first + _STRIP_ROWS].float()
            start = first // TILE_ROWS * tile
            data = weight.data[start : start + _STRIP_ROWS // TILE_ROWS * tile]
            yield rows, unpack(PackedMatrix(weight.format, len(rows), weight.cols, data))
        reader.done_with(part.name)
        return
    assert isinstance(weight, PackedExperts)
    yield torch.cat([before(name) for name in part.inputs]), unpack(weight)[0]


# -- texts ---------------------------------------------------------------------------------------


def read_rows(
    reader: SourceReader, text: str | os.PathLike[str] | None, *, most: int | None = None
) -> tuple[list[Tensor], dict[str, Any]]:
    """A text file as rows of ids, and what to say of it; random ids without a tokenizer."""
    config = reader.config
    if not any((reader.folder / name).is_file() for name in _TOKENIZER_FILES):
        if text is not None:
            raise CheckpointError(
                f"{reader.folder} has no tokenizer, so {text} cannot be read. Leave the text out: "
                "random tokens are used instead."
            )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (1024,), generator=generator)
        described: dict[str, Any] = {"name": "random tokens, seed 0: there is no tokenizer"}
    else:
        file = TEXT if text is None else Path(text)
        content = _read(file)
        found = Tokenizer.from_folder(reader.folder).encode(content, allow_added=False)
        if len(found) < 3:
            raise DataError(f"{file} has {len(found)} tokens; a longer text is needed.")
        ids = torch.tensor(found)
        digest = hashlib.sha256(content.encode()).hexdigest()
        described = {"name": file.name, "sha256": digest}
    length = min(ROW_TOKENS, config.max_position_embeddings)
    rows = [row for row in ids[:most].split(length) if len(row) > 2]
    return rows, {**described, "tokens": sum(len(row) for row in rows)}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}. Give a text file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}).") from error


def _text(file: str) -> str:
    path = Path(file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _at_most(rows: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    for row in rows:
        if len(row[:tokens]) < 3:
            return
        yield row[:tokens]
        tokens -= len(row)


# -- readable ------------------------------------------------------------------------------------


def render(found: Mapping[str, Any]) -> str:
    """The certificate for a reader, in Markdown."""
    size, bits = found["bytes"], found["bits"]
    lines = [
        f"# Quantisation certificate: {found['source']}",
        "",
        f"Written by qnext {found['qnext']} on {found['date']}. "
        f"{size['source'] / 1e9:.2f} GB became {size['packed'] / 1e9:.2f} GB.",
        "",
        "Bits: " + ", ".join(f"{name} {value}" for name, value in bits.items()) + ".",
        "",
    ]
    if found["calibrated_on"]:
        seen = found["calibrated_on"]
        lines += [f"Rounding was weighted by {seen['tokens']} tokens of {seen['name']}.", ""]
    run = found["forward"]
    if run is None:
        lines += [f"Left out: {found['left_out']}", ""]
    else:
        lines += [
            f"Measured on {run['tokens']} tokens of {found['text']['name']}:",
            "",
            "| | source | packed |",
            "|---|---|---|",
            f"| perplexity | {run['perplexity_source']:.4f} | {run['perplexity_packed']:.4f} |",
        ]
        if run["mtp"]:
            before, after = run["mtp"]["accepted_source"], run["mtp"]["accepted_packed"]
            lines.append(f"| MTP drafts accepted | {before:.1%} | {after:.1%} |")
        lines += [
            "",
            f"KL divergence of the next token, in nats: mean {run['kl_mean']:.5f}, median "
            f"{run['kl_median']:.5f}, 99th percentile {run['kl_99_percent']:.5f}, largest "
            f"{run['kl_largest']:.5f}.",
            f"The likeliest token is the same for {run['top_1_agreement']:.1%} of the tokens.",
            "",
        ]
    lines += ["| weight | format | relative error | |", "|---|---|---|---|"]
    for entry in found["weights"]:
        sampled = entry.get("experts_compared")
        remark = f"{sampled} experts compared" if sampled else ""
        lines.append(
            f"| {entry['name']} | {entry['format']} | {entry['relative_error']:.4f} | {remark} |"
        )
    return "\n".join(lines) + "\n"

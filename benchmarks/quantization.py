"""Our int4 and int8 against llama.cpp's Q4_0 and Q8_0: errors of the weights and of the answers.

    python -m benchmarks.quantization [--record]

The same weights of the same models are rounded by both: qnext-mini, and a model of its shape with
random weights. llama.cpp's rounding is that of its own ``gguf`` package. The embedding is left
alone, everything else that either would round is rounded. Not a matter of speed.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from torch import Tensor

from benchmarks.harness import write_result
from qnext.certificate import compare, read_rows
from qnext.config import read_json
from qnext.model.model import CausalLM
from qnext.quantization import Bits
from qnext.weights.calibrate import calibrate
from qnext.weights.checkpoint import load_model, save_model
from qnext.weights.formats import PackedMatrix, pack, unpack
from qnext.weights.layout import slots
from qnext.weights.packed import parts
from qnext.weights.source import SourceReader
from qnext.weights.synth import synthesise

Round = Callable[[str, Tensor], tuple[Tensor, float]]
"""(name, weight) -> the weight it becomes and the bytes it takes."""
THEIRS = {"Q4_0": GGMLQuantizationType.Q4_0, "Q8_0": GGMLQuantizationType.Q8_0}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way of rounding did to one model."""

    model: str
    format: str
    bits_per_weight: float
    relative_error: float
    """Root of the squared error over the squared weights, all rounded weights together."""
    kl_mean: float
    top_1_agreement: float
    perplexity_source: float
    perplexity_packed: float


def ours(format: str, importance: dict[str, Tensor] | None = None) -> Round:
    """``q4`` or ``q8`` of this project."""

    def rounded(name: str, weight: Tensor) -> tuple[Tensor, float]:
        packed: PackedMatrix = pack(format, weight, (importance or {}).get(name))
        return unpack(packed), packed.data.numel()

    return rounded


def theirs(name: str) -> Round:
    """A format of llama.cpp."""

    def rounded(_: str, weight: Tensor) -> tuple[Tensor, float]:
        data = gguf_quants.quantize(weight.contiguous().numpy(), THEIRS[name])
        return torch.from_numpy(gguf_quants.dequantize(data, THEIRS[name])), data.nbytes

    return rounded


@torch.no_grad()
def measure(folder: Path, label: str, format: str, rounding: Round) -> Outcome:
    """Round every weight of a model that is ever rounded, but the embedding, and run it."""
    reader = SourceReader(folder)
    names = [
        name
        for part in parts(reader.config, Bits.all(4))
        if part.format is not None
        for name in part.inputs
    ]
    rows, _ = read_rows(reader, None)
    error = norm = size = count = 0.0

    def change(model: CausalLM) -> None:
        nonlocal error, norm, size, count
        parameters, places = dict(model.named_parameters()), slots(model)
        for name in names:
            place = places[name].of(parameters[places[name].parameter])
            value, taken = rounding(name, place)
            error += float((value - place).double().square().sum())
            norm += float(place.double().square().sum())
            size += taken
            count += place.numel()
            place.copy_(value)

    found = compare(folder, change, rows)
    return Outcome(
        model=label,
        format=format,
        bits_per_weight=8 * size / count,
        relative_error=math.sqrt(error / norm),
        kl_mean=found["kl_mean"],
        top_1_agreement=found["top_1_agreement"],
        perplexity_source=found["perplexity_source"],
        perplexity_packed=found["perplexity_packed"],
    )


def unpacked(folder: Path) -> Path:
    """The embedded model, which ships in 8 bits, in bfloat16: what is rounded again here."""
    save_model(load_model("qnext-mini", dtype="bfloat16"), folder)
    return folder


def outcomes(scratch: Path) -> Iterator[Outcome]:
    """Every model with every format."""
    mini = unpacked(scratch / "qnext-mini")
    random = synthesise(read_json(mini), scratch / "random", 16, progress=False)
    reader = SourceReader(mini)
    # Calibrated on another text than the one that is measured.
    seen, _ = read_rows(reader, Path(__file__).parents[1] / "README.md", most=4096)
    importance = calibrate(load_model(mini, dtype="float32"), seen)
    for folder, label in ((mini, "qnext-mini"), (random, "random weights")):
        for format in ("q4", "q8"):
            yield measure(folder, label, format, ours(format))
        for name in THEIRS:
            yield measure(folder, label, f"llama.cpp {name}", theirs(name))
    yield measure(mini, "qnext-mini", "q4, calibrated", ours("q4", importance))


def main() -> int:
    """Print the outcomes, or record them as docs/results/quantization.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="write docs/results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = list(outcomes(Path(scratch)))
    if not arguments.record:
        print(json.dumps([asdict(one) for one in found], indent=2))
        return 0
    rows = [
        {
            "what": f"{one.model}, {one.format}",
            "value": f"KL {one.kl_mean:.3g}",
            "conditions": f"{one.bits_per_weight:.3f} bits, weight error {one.relative_error:.4f}, "
            f"top-1 {one.top_1_agreement:.1%}, perplexity {one.perplexity_source:.2f} -> "
            f"{one.perplexity_packed:.2f}",
        }
        for one in found
    ]
    write_result("quantization", "KL divergence of rounded weights, in nats", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Loading needs hardly more memory than the model itself; measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qnext.config import ModelConfig
from qnext.model.model import CausalLM
from qnext.weights.checkpoint import save_model

RAW = {
    "model_type": "qwen3_next",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "torch_dtype": "bfloat16",
}
LARGEST_RATIO = 1.15

# VmHWM is the largest resident size there ever was; file pages that are mapped count in it.
MEASURE = """
import sys
from pathlib import Path
from qnext.weights.checkpoint import load_model

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

load_model(sys.argv[2], dtype=sys.argv[3])  # whatever is imported or started on first use
before = status("VmRSS")
model = load_model(sys.argv[1], dtype=sys.argv[3])
size = sum(p.nbytes for p in model.parameters())
assert model.mtp is not None
print((status("VmHWM") - before) / size, size, status("VmRSS") - before)
print("mapped" if sys.argv[1] in Path("/proc/self/maps").read_text() else "released")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model of about 370 MB in one file and in shards, and a tiny one; experts one by one."""
    config = ModelConfig.from_dict(RAW)
    with torch.device("meta"):
        model = CausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    place = tmp_path_factory.mktemp("memory")
    save_model(model, place / "single")
    save_model(model, place / "sharded", max_shard_bytes=100_000_000)
    tiny = {**RAW, "vocab_size": 16, "hidden_size": 16, "num_experts": 4}
    small = CausalLM(ModelConfig.from_dict(tiny)).bfloat16()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.uniform_(-0.1, 0.1, generator=generator)
    save_model(small, place / "tiny")
    return {name: place / name for name in ("single", "sharded", "tiny")}


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads the peak memory from /proc (Linux)"
)
@pytest.mark.parametrize(("layout", "dtype"), [("single", "bfloat16"), ("sharded", "float32")])
def test_the_peak_is_hardly_more_than_the_model(folders, layout, dtype, record_property):
    """Run ``pytest -s`` to see the ratio of peak memory to the size of the parameters."""
    command = [sys.executable, "-c", MEASURE, str(folders[layout]), str(folders["tiny"]), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    numbers, mapped = done.stdout.splitlines()
    ratio, size, after = (float(word) for word in numbers.split())
    record_property("peak_ratio", ratio)
    print(f"{layout} {dtype}: {size / 1e6:.0f} MB of parameters, peak {ratio:.3f} x, ", end="")
    print(f"afterwards {after / size:.3f} x, files {mapped}")
    assert size > 300e6
    assert 0.9 < ratio <= LARGEST_RATIO, "below 0.9 the measurement itself is wrong"
    assert mapped == "released"
    assert done.stderr == ""


QUANTISE = """
import sys
from pathlib import Path
from qnext.weights.quantize import quantize

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

quantize(sys.argv[1], sys.argv[2] + "-first", 4)  # whatever is imported or started on first use
before = status("VmRSS")
quantize(sys.argv[3], sys.argv[2], 4)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads the peak memory from /proc (Linux)"
)
def test_quantising_holds_a_part_of_the_model_only(folders, tmp_path) -> None:
    source = folders["sharded"]
    command = [sys.executable, "-c", QUANTISE, folders["tiny"], str(tmp_path / "out"), source]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    # One matrix, its packed form, what rounding needs, and the pages that were read last; the
    # same for any model. Source and result together would be 480 MB.
    assert size > 370e6
    assert int(done.stdout) < 330e6

"""``qnext bench`` end to end on a tiny model: options, keys, refusals."""

import json
import sys

import pytest

from qnext import native
from qnext.cli import build_parser, main
from qnext.quantization import Bits

needs_native = pytest.mark.skipif(native.unfit() is not None, reason=str(native.unfit()))
KEYS = {
    "what", "model", "format", "isa", "threads", "tokens_per_second", "gigabytes_per_second",
    "bandwidth_share", "limit_share", "limited_by", "bytes_per_token", "context", "machine",
    "cases",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _small_reads(monkeypatch):
    """Little to read: this is not about the numbers."""
    monkeypatch.setattr("qnext.bench.race.READ_BYTES", 1 << 20)
    monkeypatch.setattr("qnext.bench.report.STEPS", 3)


def bench(capsys, *words: str) -> dict:
    assert main(["bench", *words, "--json", "--threads", "1", "--repetitions", "2"]) == 0
    return json.loads(capsys.readouterr().out)


def test_options_have_defaults():
    found = build_parser().parse_args(["bench", "decode"])
    assert (found.model, found.context, found.repetitions) == ("qnext-mini", [0], 7)
    assert found.against is None
    assert not found.json


@pytest.mark.parametrize(
    "words",
    [["decode", "--context", "-1"], ["decode", "--against", "nothing"], ["sideways"], []],
)
def test_mistakes_are_refused(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    assert caught.value.code == 2
    assert "bench" in capsys.readouterr().err


@needs_native
def test_decode_reports_every_context(tiny_folder, capsys):
    found = bench(capsys, "decode", str(tiny_folder), "--context", "0", "100")
    assert set(found) >= KEYS
    speed = found["tokens_per_second"]
    assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert found["threads"] == 1
    assert found["isa"] in native.ISAS
    assert [row["context"] for row in found["cases"]] == [0, 100]
    assert found["cases"][1]["bytes_per_token"] > found["bytes_per_token"]
    assert found["format"] == "float32"
    # 2 of 6 experts in each of 4 layers, on every step.
    assert found["experts_per_step"] == 8
    assert 0 < found["outside_kernels_share"] < 1


@needs_native
def test_other_commands_report_their_cases(tiny_folder, capsys):
    found = bench(capsys, "batch", str(tiny_folder), "--sequences", "3", "2")
    assert [row["case"] for row in found["cases"]] == ["batch 3", "batch 2"]
    assert 8 <= found["experts_per_step"] <= 24
    found = bench(capsys, "prefill", str(tiny_folder), "--tokens", "70")
    assert found["rows"] == 70
    assert found["operations_per_step"] > 0
    found = bench(capsys, "verify", str(tiny_folder), "--context", "30")
    assert found["case"] == "verify 3 at 30"
    assert set(found["rollback_share"]) == {"median", "low", "high"}


@needs_native
def test_kernels_of_a_packed_model(tiny_folder, tmp_path, capsys, monkeypatch):
    from qnext.bench import kernels
    from qnext.bench.ours import Subject
    from qnext.bench.race import Machine
    from qnext.weights.packed import pack_model

    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 18)
    monkeypatch.setattr(kernels, "BATCH_S", 1e-4)
    subject = Subject(tiny_folder, threads=1)
    subject.packed = pack_model(tiny_folder, Bits.all(4))
    rows = kernels.measure_kernels(subject, repetitions=1, machine=Machine(), rows=(1, 5))
    names = {row["case"] for row in rows}
    # Gate and up of an expert: 16 rows each, padded to 32.
    assert {"q4 64 x 32, 1 row", "q4 64 x 32, 5 rows", "f32 8 x 32, 1 row"} <= names
    assert all(row["microseconds"]["median"] > 0 for row in rows)
    found = bench(capsys, "kernels", str(tiny_folder))
    assert found["cases"]
    assert "tokens_per_second" in found


@needs_native
def test_a_context_beyond_the_model_is_refused(tiny_folder, capsys):
    assert main(["bench", "decode", str(tiny_folder), "--context", "510"]) == 2
    assert "513 tokens are more than the 512" in capsys.readouterr().err
    assert main(["bench", "verify", str(tiny_folder), "--tokens", "9"]) == 2
    assert "expected 2 to 5" in capsys.readouterr().err
    assert main(["bench", "kernels", str(tiny_folder), "--against", "llama.cpp"]) == 2
    assert "leave out --against" in capsys.readouterr().err


@needs_native
def test_a_picture_is_drawn(tiny_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    picture = tmp_path / "speed.png"
    bench(capsys, "decode", str(tiny_folder), "--context", "0", "64", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_kernels_it_says_what_to_install(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(native, "_module", lambda: (None, "the native kernels are not installed."))
    assert main(["bench", "decode", str(tiny_folder)]) == 2
    assert "native kernels are not installed" in capsys.readouterr().err


@needs_native
@pytest.mark.parametrize(
    ("module", "peer", "remedy"),
    [
        ("llama_cpp", "llama.cpp", "pip install llama-cpp-python"),
        ("transformers", "transformers", "pip install transformers"),
    ],
)
def test_a_peer_that_is_not_installed_is_said(
    tiny_folder, capsys, monkeypatch, module, peer, remedy
):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["bench", "decode", str(tiny_folder), "--against", peer, "--threads", "1"]) == 2
    said = capsys.readouterr().err
    assert "not installed" in said
    assert remedy in said

"""Our reading and writing of safetensors against the library, and damaged files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import assert_same_bits

from qnext.errors import CheckpointError
from qnext.weights.safetensors_file import DTYPES, MappedFile, OutTensor, read_header, write_file

EVERYTHING = {
    f"{name} {shape}": torch.arange(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)
    .remainder(2 if dtype == torch.bool else 100)
    .view(dtype)
    .view(shape)
    for name, dtype in DTYPES.items()
    for shape in ((3, 5), (1,), (2, 1, 3), (0, 4))
}


def test_we_read_what_the_library_writes(tmp_path):
    save_file(EVERYTHING, tmp_path / "a", metadata={"format": "pt"})
    with MappedFile(tmp_path / "a") as mapped:
        got = {name: mapped.tensor(i).clone() for name, i in read_header(tmp_path / "a").items()}
    assert_same_bits(got, EVERYTHING)


def test_the_library_reads_what_we_write(tmp_path):
    out = [OutTensor(name, tensor, tensor.dtype) for name, tensor in EVERYTHING.items()]
    write_file(tmp_path / "a", out)
    assert_same_bits(load_file(tmp_path / "a"), EVERYTHING)
    with safe_open(tmp_path / "a", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_tensors_are_converted_and_need_not_be_contiguous(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).t()
    write_file(tmp_path / "a", [OutTensor("x", tensor, torch.bfloat16)])
    assert_same_bits(load_file(tmp_path / "a"), {"x": tensor.bfloat16().contiguous()})


def test_bytes_may_lie_anywhere(tmp_path):
    """Some writers do not pad the header, which leaves every tensor misaligned."""
    save_file({"x": torch.arange(7.0)}, tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for extra in (1, 3):
        head = data[8 : 8 + length] + b" " * extra
        file = tmp_path / str(extra)
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
        with MappedFile(file) as mapped:
            got = mapped.tensor(read_header(file)["x"]).clone()
        assert torch.equal(got, torch.arange(7.0))


def test_values_do_not_change_when_pages_are_given_back(tmp_path):
    save_file({"x": torch.arange(10_000.0)}, tmp_path / "a")
    with MappedFile(tmp_path / "a") as mapped:
        x = mapped.tensor(read_header(tmp_path / "a")["x"])
        assert torch.equal(x, torch.arange(10_000.0))
        mapped.done_with(2**40)
        assert torch.equal(x, torch.arange(10_000.0))


def write_raw(file: Path, header: object, data: bytes) -> Path:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)
    return file


def entry(begin: int, end: int, **change: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [begin, end], **change}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{not json", b"", "its header is not JSON"),
        (b"\xff\xfe", b"", "its header is not JSON"),
        ([1], b"", "its header is not a JSON object"),
        ({"x": entry(0, 4)}, b"123", r"is truncated: its header promises \d+ bytes"),
        ({"x": entry(0, 4)}, b"12345", "1 bytes follow the last tensor"),
        ({"x": entry(4, 8)}, b"12345678", "the bytes of x overlap another tensor or leave a gap"),
        ({"x": entry(0, 4), "y": entry(2, 6)}, b"123456", "the bytes of y overlap"),
        ({"x": entry(0, 8)}, b"12345678", r"x is F32 \[1\] but occupies 8 bytes"),
        ({"x": entry(-4, 0)}, b"", "are not natural numbers"),
        ({"x": entry(0, 4, shape=[True])}, b"1234", "are not natural numbers"),
        ({"x": entry(0, 4, dtype="F4")}, b"1234", "x has dtype 'F4', which is not supported"),
        ({"x": {"dtype": "F32"}}, b"", "x lacks dtype, shape or data_offsets"),
        ({"x": 5}, b"", "x lacks dtype, shape or data_offsets"),
    ],
)
def test_damaged_headers_are_named(header, data, message, tmp_path):
    file = write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("data", [b"PK\x03\x04 a zip file, as torch.save makes", b"", b"\x80\x02"])
def test_other_files_are_refused(data, tmp_path):
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a valid safetensors file: it does not begin"):
        read_header(tmp_path / "m")

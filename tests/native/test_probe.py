"""The probes of the machine give plausible numbers and refuse what they cannot measure."""

import pytest
import torch


def test_reading_a_buffer_gives_bytes_per_second(kernels):
    buffer = torch.ones(8 << 20, dtype=torch.uint8)
    assert 1e7 < kernels.read_bandwidth(buffer) < 1e13


def test_peaks_are_operations_per_second(kernels):
    assert 1e7 < kernels.peak_bf16() < 1e16
    assert 1e7 < kernels.peak_int8() < 1e16


def test_a_buffer_that_cannot_be_read_in_lines_is_refused(kernels):
    buffer = torch.ones(2048, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at a multiple of 64"):
        kernels.read_bandwidth(buffer[1:1025])
    with pytest.raises(ValueError, match="at least 512 bytes"):
        kernels.read_bandwidth(buffer[:100])

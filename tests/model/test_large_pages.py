"""Advice about pages changes no value and passes over what is not in memory."""

import torch

from qnext.model.large_pages import ask_for_large_pages


def test_values_stay_and_other_devices_are_passed_over():
    written, small = torch.arange(1 << 20), torch.arange(3)
    ask_for_large_pages([written, small, torch.empty(1 << 20, device="meta"), torch.empty(0)])
    assert torch.equal(written, torch.arange(1 << 20))
    assert small.tolist() == [0, 1, 2]

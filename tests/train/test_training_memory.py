"""What training asks of the C library and of the system."""

import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROGRAM = """
import sys
from qnext.train_command import keep_freed_memory
keep_freed_memory()
import torch

def held(name):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

before = held("Rss")
x = torch.ones(32 << 20)
print(held("AnonHugePages"), held("Rss") - before)
del x
print(held("Rss") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and Linux only")
def test_memory_is_kept_and_lies_in_large_pages():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    large, used, kept = map(int, done.stdout.split())
    size = 128 << 10  # KiB of the tensor
    assert used < 1.5 * size, "reserving must not use memory"
    assert kept > 0.9 * size
    if "[never]" not in PAGES.read_text():
        assert large > 0.5 * size

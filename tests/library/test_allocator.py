import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from library.allocator import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    tensors = [torch.ones(5 << 20) for _ in range(8)]
step()
before = faults()
for _ in range(5):
    step()
print((faults() - before) * resource.getpagesize() / (5 * 8 * 20 * 2**20))
"""


def share_of_new_pages(*words: str) -> float:
    """Return which share of the memory that a repeated step asks for comes anew from the system."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, *words], check=True, capture_output=True, text=True)
    return float(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="acts on glibc alone")
def test_a_repeated_step_gets_its_memory_from_what_it_freed():
    assert share_of_new_pages("keep") < 0.05 < share_of_new_pages()

import platform
import resource
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from lungssl.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = None
for _ in range(20):
    if _ == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc isn't glibc's")
def test_a_tensor_gets_the_pages_of_the_one_before() -> None:
    def faults(how: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout
        )

    pages = 10 * (40 << 20) // resource.getpagesize()
    assert faults("leave") > pages / 2
    assert faults("keep") < pages / 100

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks as large as a small recurrent state; the last one keeps the heap's end where it is.
PROGRAM = """
import psutil
from nanorun.runtime.process.heap import return_to_system
blocks = [bytearray(20_000) for _ in range(5000)]
end = bytearray(20_000)
del blocks
before = psutil.Process().memory_info().rss
return_to_system()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give it back")
def test_freed_memory_leaves_the_process() -> None:
    output = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert int(output.stdout) > 80_000_000

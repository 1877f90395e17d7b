import sys

import pytest

from tests.support.warm_python import run_warm

_PROGRAM = """
import psutil
from fingpt_lightning.profiling.host_memory import keep_freed_memory

assert keep_freed_memory()
bytearray(2**27)
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to keep memory")
def test_freed_memory_stays_with_the_process() -> None:
    rss = {}
    for keeps in (True, False):
        program = _PROGRAM if keeps else _PROGRAM.replace("assert keep_freed_memory()\n", "")
        done = run_warm(["-c", program], timeout=60)
        assert done.returncode == 0, done.stderr
        rss[keeps] = int(done.stdout)
    assert rss[True] - rss[False] > 2**26

"""Memory that becomes resident while something is loaded, measured in processes of its own."""

from __future__ import annotations

import statistics
import subprocess
import sys

_SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
{imports}
def touched():
    with open("/proc/self/status") as file:
        rows = [line.split() for line in file if line.startswith(("RssAnon", "RssFile"))]
    return sum(int(row[1]) for row in rows) * 1024
def run(folder):
    {body}
small = run({small!r})  # imports of the first call are not counted
before = touched()
start = time.perf_counter()
large = run({large!r})
print(touched() - before, time.perf_counter() - start)
"""


def touched(imports: str, body: str, *, small: str, large: str) -> tuple[int, float]:
    """Return the bytes that become resident and the seconds, medians of three processes; at least a page.

    Args:
        imports: code of the imports.
        body: statement of a function of ``folder``, which returns what is to stay in memory.
        small: a folder of the same kind, which is loaded first.
        large: the folder to measure.
    """
    script = _SCRIPT.format(imports=imports, body=body, small=small, large=large)
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        runs.append([float(number) for number in done.stdout.split()[-2:]])
    memory, seconds = (statistics.median(column) for column in zip(*runs, strict=True))
    return max(int(memory), 4096), seconds

"""A real server in a process of its own, on loopback, for the checkpoints under a folder."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from nightshift.fixed.config import ROOT


@contextmanager
def server(root: Path, **environment: str):
    """Yields (address, process); the process is ended afterwards."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", "nightshift.cli", "serve", "--root", str(root), "--port", "18000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
    )
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                yield found.group(), process
                break
        else:
            raise RuntimeError("the server did not start")
    finally:
        process.terminate()
        process.wait(20)

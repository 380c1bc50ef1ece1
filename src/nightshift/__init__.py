import os

# Before torch loads OpenMP, so here. A thread that waits by spinning takes the core of the thread
# that it waits for as soon as anything else runs: measured 3,500 against 176 ms a step on 2 busy
# cores, and no difference on idle ones (LOG 2026-11-23).
os.environ.setdefault("GOMP_SPINCOUNT", "0")

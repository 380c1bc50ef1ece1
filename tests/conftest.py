import sys
from pathlib import Path

import torch

import nightshift  # noqa: F401  before torch: it calms OpenMP's threads

sys.path.insert(0, str(Path(__file__).parent))  # tests import tiny.py, edited.py and the like
torch.set_num_threads(1)  # tests use tensors so small that a second thread only costs

"""The job that Hydra's Optuna sweeper launches: asks the benchmark that started it for a number.

Run by hydra_sweeper.py in the sweeper's own environment.
"""

import json
import os
import socket

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(version_base="1.3", config_path=None)
def main(config: DictConfig) -> float:
    with socket.socket(socket.AF_UNIX) as benchmark:
        benchmark.connect(os.environ["SEARCH_SOCKET"])
        with benchmark.makefile("rw") as lines:
            lines.write(json.dumps(OmegaConf.to_container(config)) + "\n")
            lines.flush()
            return float(lines.readline())


if __name__ == "__main__":
    main()

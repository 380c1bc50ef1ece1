"""A multirun through real Hydra: one parent, a child for each job."""

import subprocess
import sys

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from nightshift.fixed.config import Tracking
from nightshift.fixed.tracking import open_store
from nightshift.sweep import MlflowParent

CONFIG = """
defaults:
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
seed: 1
parent_run_id: null
tracking: {enabled: true, uri: null, experiment: nightshift}
hydra:
  callbacks:
    mlflow_parent:
      _target_: nightshift.sweep.MlflowParent
"""
JOB = """
import hydra
from omegaconf import OmegaConf
from nightshift.fixed.config import Tracking
from nightshift.fixed.tracking import open_store

@hydra.main(config_path=".", config_name="config", version_base="1.3")
def main(config):
    store = open_store(Tracking(**OmegaConf.to_container(config.tracking)))
    run = store.start(f"seed {config.seed}", "pretrain", config.parent_run_id)
    run.close("FAILED" if config.seed == 2 else "FINISHED")
    if config.seed == 2:
        raise ValueError("seed 2 is broken")
main()
"""


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('sweep')}/mlflow.db"
    return Tracking(enabled=True, uri=uri, experiment="nightshift")


def hydra_config(tracking, *overrides):
    return OmegaConf.create({"tracking": tracking.model_dump(), "parent_run_id": None,
                             "hydra": {"overrides": {"task": list(overrides)}}})  # fmt: skip


def sweep(callback, tracking, jobs):
    """What Hydra does around the jobs of one process; returns the task overrides and the parent."""
    config = hydra_config(tracking, "seed=1,2", f"tracking.uri={tracking.uri}")
    callback.on_multirun_start(config)
    parent = callback.run.run_id
    for job in jobs:
        callback.on_job_end(config, job)
    callback.on_multirun_end(config)
    return config.hydra.overrides.task, parent


def job(status, value=None) -> JobReturn:
    return JobReturn(status=status, _return_value=value)


@pytest.mark.slow
def test_one_failed_job_neither_hides_the_others_nor_leaves_the_parent_running(tmp_path, tracking):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "job.py").write_text(JOB)
    command = [sys.executable, "job.py", "-m", "seed=1,2,3", f"tracking.uri={tracking.uri}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
    store = open_store(tracking)
    (parent,) = store.find(kind="sweep")
    assert (parent.info.run_name, parent.info.status) == ("seed=1,2,3", "FAILED")
    children = {r.info.run_name: r.info.status for r in store.children(parent.info.run_id)}
    assert children == {"seed 1": "FINISHED", "seed 2": "FAILED", "seed 3": "FINISHED"}


def test_the_parent_is_finished_when_all_jobs_are_and_its_id_is_quoted(tracking):
    overrides, parent = sweep(MlflowParent(), tracking, [job(JobStatus.COMPLETED, 0)])
    assert overrides[-1] == f"parent_run_id='{parent}'"
    assert open_store(tracking).client.get_run(parent).info.status == "FINISHED"


@pytest.mark.parametrize("bad", [job(JobStatus.FAILED), job(JobStatus.COMPLETED, 2)])
def test_a_job_that_fails_before_its_run_exists_counts(tracking, bad):
    _, parent = sweep(MlflowParent(), tracking, [job(JobStatus.COMPLETED), bad])
    assert open_store(tracking).client.get_run(parent).info.status == "FAILED"


def test_a_given_parent_is_left_alone(tracking):
    config = hydra_config(tracking, "seed=1")
    config.parent_run_id = "abc"
    callback = MlflowParent()
    callback.on_multirun_start(config)
    callback.on_multirun_end(config)
    assert callback.run is None and list(config.hydra.overrides.task) == ["seed=1"]


def test_a_tracker_that_cannot_be_opened_ends_the_sweep_with_one_line(tracking):
    """Hydra turns an Exception of a callback into a warning and would run the jobs as orphans."""
    bad = tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    with pytest.raises(SystemExit, match="127.0.0.1:9") as caught:
        MlflowParent().on_multirun_start(hydra_config(bad))
    assert "\n" not in str(caught.value)

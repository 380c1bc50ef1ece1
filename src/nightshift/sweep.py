"""Hydra callback: a multirun gets one MLflow parent, its jobs are the children.

`nightshift pretrain -m optim.matrix_lr=0.01,0.02` opens the parent before the first job and appends
`parent_run_id='<id>'` to the task overrides, which reaches the jobs of every launcher. Hydra turns
an exception of a callback into a warning, so a tracker that cannot be opened ends the command here.
"""

import atexit

from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf, flag_override

from nightshift.fixed.config import ConfigError, Tracking, check

NAME_CHARS = 80
NOT_IN_NAME = ("tracking", "runtime", "sandbox", "hydra", "run_name")


class MlflowParent(Callback):
    """Opens the parent; closes it FINISHED, or FAILED if any job failed."""

    def __init__(self):
        self.store = self.run = None
        self.failed = False

    def on_multirun_start(self, config, **_):
        if not config.tracking.enabled or config.parent_run_id:
            return
        from nightshift.fixed.tracking import open_store

        task = config.hydra.overrides.task
        try:
            self.store = open_store(check(OmegaConf.to_container(config.tracking), Tracking))
            self.run = self.store.start(_name(task), "sweep")
        except ConfigError as error:
            raise SystemExit(str(error)) from None  # not an Exception: Hydra lets it through
        with flag_override(task, ["struct", "readonly"], [False, False]):
            # Quoted: a bare hex id such as 92557101e12 would compose to a float.
            task.append(f"parent_run_id='{self.run.run_id}'")
        atexit.register(self._close, "FAILED")  # hydra 1.3 skips on_multirun_end after a failure

    def on_job_end(self, config, job_return, **_):
        """Seen only for jobs of this process; the children tell of the others."""
        failed = job_return.status == JobStatus.FAILED
        self.failed |= failed or job_return.return_value not in (None, 0)  # its exit status

    def on_multirun_end(self, config, **_):
        if self.run:
            children = self.store.children(self.run.run_id)
            failed = self.failed or any(c.info.status != "FINISHED" for c in children)
            self._close("FAILED" if failed else "FINISHED")

    def _close(self, status: str) -> None:
        if self.run:
            self.run.close(status)
            self.run = None

    def __getstate__(self):
        """Launchers with worker processes pickle the callback; the parent stays here."""
        return {"store": None, "run": None, "failed": False}


def _name(overrides) -> str:
    said = [o for o in overrides if not o.startswith(NOT_IN_NAME)]
    return " ".join(said)[:NAME_CHARS] or "sweep"

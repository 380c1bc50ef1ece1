"""A proposal in the making while a trial runs, in a thread of its own.

One such thread at a time, and while it lives the model's ledger, conversation and worktree of
checks are its alone: the loop waits for its end before it asks the model itself. Nothing of it is
on disk but what each call costs, so after a kill the proposal is simply asked for again.
"""

import threading
from collections.abc import Callable

from agent.journal import Proposal
from agent.trial import Stop

POLL_S = 0.05


class Thought:
    """What comes of asking the model, once it has come."""

    def __init__(self):
        self.now = Stop()  # ends it in mid-call, whose cost is then unknown
        self.soon = Stop()  # ends it before its next call
        self.proposal: Proposal | None = None
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None

    def begin(self, ask: Callable[[], Proposal | None]) -> None:
        self.thread = threading.Thread(target=self._run, args=(ask,), daemon=True, name="ahead")
        self.thread.start()

    def _run(self, ask: Callable[[], Proposal | None]) -> None:
        try:
            self.proposal = ask()
        except BaseException as error:  # for `result`; a cap, above all
            self.error = error

    def wait(self, stop: Stop) -> None:
        """Until it has ended. Raises Interrupted."""
        while self.thread.is_alive():
            stop.check()
            self.thread.join(POLL_S)

    def result(self, stop: Stop) -> Proposal | None:
        """Raises what was raised in the thread, and Interrupted."""
        self.wait(stop)
        if self.error:
            raise self.error
        return self.proposal

    def end(self) -> None:
        """Leaves no thread behind, nor a worktree of a check."""
        self.now.requested = True
        self.thread.join()

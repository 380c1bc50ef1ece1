"""Calls of a language model as MLflow traces of their trial's run; off with study.llm.trace=false.

Made from the ledger and the conversation after the trial, like all of MLflow: a trace has an
identity of its own, so writing it again after a kill changes nothing.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from agent.costs import Ledger
from agent.journal import Trial
from agent.lines import read_lines
from nightshift.fixed.tracking import RunLog

CONVERSATIONS = "conversations"  # in the study's folder: NNN.jsonl, a message a line
MAX_TRACE_CHARS = 60_000  # of one message


def write_traces(child: RunLog, folder: Path, study_id: str, trial: Trial) -> None:
    """`folder`: the study's."""
    if trial.proposal.usage is None:
        return
    exchanges = exchanges_of(folder / CONVERSATIONS / f"{trial.number:03d}.jsonl")
    for call in Ledger(folder).of_trial(trial.number):
        inputs, outputs = exchanges.get(call["call"], ([], None))
        child.trace(call["purpose"], f"{study_id}/{call['call']}", facts_of(call, inputs, outputs))


def facts_of(call: dict[str, Any], inputs: list, outputs: Any) -> dict[str, Any]:
    lost = None if "ended" in call else "cut off: the study was killed or stopped during this call"
    return {
        "inputs": {"messages": inputs},
        "outputs": outputs,
        "message": lost or call.get("message"),
        "started_s": datetime.fromisoformat(call["started"]).timestamp(),
        "seconds": call.get("seconds", 0.0),
        "usage": {name: call.get(name, 0) for name in ("input_tokens", "output_tokens")},
        "tags": {
            "trial": f"{call['trial']:03d}",
            "model": call["model"],
            "dollars": call.get("dollars"),
        },
    }


def exchanges_of(path: Path) -> dict[int, tuple[list, Any]]:
    """Call -> (what was said since the answer before, the answer)."""
    exchanges, said = {}, []
    for line in read_lines(path):
        if line["role"] == "system":  # asked anew after a kill
            said = []
        message = {"role": line["role"], "content": line["text"][:MAX_TRACE_CHARS]}
        message |= {"tool_calls": line["calls"]} if "calls" in line else {}
        if "call" in line:
            exchanges[line["call"]] = (said, message)
            said = []
        else:
            said.append(message)
    return exchanges

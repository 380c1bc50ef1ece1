"""A small language model as the researcher: how many answers apply, with and without schema?

    python benchmarks/small_model.py http://127.0.0.1:8080/v1 [20]    # docs/researcher.md

The stand-in project of the tests with a baseline and five trials; the real prompt of the form, the
real client, the server at the address. Each answer counts as applicable if the form takes it and it
applies to a worktree. Without a schema the same prompt is sent, and a second count cuts the JSON
out of the text around it. What applies joins the record, as it would in a study.
"""

import json
import random
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from langchain_core.messages import HumanMessage, SystemMessage  # noqa: E402
from recorded import a_trial, recorded_study  # noqa: E402

from agent.answer import StudyFiles, check_answer, read_answer  # noqa: E402
from agent.form import SYSTEM, Form  # noqa: E402
from agent.journal import Proposal  # noqa: E402
from agent.proposers.llm import Researcher  # noqa: E402
from agent.settings import LlmSettings  # noqa: E402
from agent.trial import Stop  # noqa: E402
from agent.workspace import Refused  # noqa: E402
from nightshift.fixed.config import check  # noqa: E402


def settings_of(url: str) -> LlmSettings:
    given = yaml.safe_load((ROOT / "conf/study.yaml").read_text())["study"]["llm"]
    given |= {"model": "openai:local", "base_url": url, "timeout_s": 900.0, "output": "schema"}
    return check(given, LlmSettings)


def record(files: StudyFiles, overrides: dict) -> None:
    """One more trial of these values, discarded."""
    number = len(files.journal)
    [(key, value)] = overrides.items()
    proposal = Proposal(title=f"{key} -> {value}", hypothesis="h", source="x", overrides=overrides)
    trial = a_trial(number, proposal, gain=round(random.gauss(-0.004, 0.003), 4))
    trial.changed, trial.shape = overrides, files.journal.incumbent.shape
    files.journal.trials.append(trial)


def judge(files: StudyFiles, form: Form, text: str) -> dict | str:
    """The overrides of an answer that applies, else the kind of its refusal."""
    try:
        answer = read_answer(form.read(text))
        return check_answer(files, answer, "llm").proposal.overrides
    except Refused as refusal:
        return re.sub(r"^\S+ (\(.*?\))?:?", "...", str(refusal))[:60]


def measure(files: StudyFiles, researcher: Researcher, constrained: bool, count: int) -> None:
    caller, outcomes, cut_out, seconds, keys = researcher.caller, Counter(), 0, [], Counter()
    if not constrained:
        caller.model = caller.model.bind(extra_body={"max_tokens": 256})
    for _ in range(count):
        form = Form(files)
        messages = [SystemMessage(SYSTEM), HumanMessage(form.message([], 2048))]
        schema = form.schema() if constrained else None
        text = caller.ask(1, "proposal", messages, [], schema).content
        print(" ", json.dumps(text)[:150], flush=True)
        found = judge(files, form, text)
        outcomes["applies" if isinstance(found, dict) else found] += 1
        inside = re.search(r"\{.*?\}\s*\}", text, re.DOTALL)
        lenient = judge(files, form, inside.group()) if inside else ""
        cut_out += isinstance(lenient, dict)
        if isinstance(found, dict):
            keys.update(found)
            record(files, found)
    calls = caller.ledger.calls[-count:]
    seconds = [call["seconds"] for call in calls]
    print(f"schema={constrained}: {dict(outcomes)}; JSON cut out of the text applies: {cut_out}")
    print(f"  keys {dict(keys)}")
    print(f"  seconds median {statistics.median(seconds):.1f}, most {max(seconds):.1f};", end=" ")
    sizes = [statistics.median(c[n] for c in calls) for n in ("input_tokens", "output_tokens")]
    print(f"tokens in, out: {sizes}; most in {max(c['input_tokens'] for c in calls)}", flush=True)


def main(url: str, count: int = 20) -> None:
    random.seed(0)
    for constrained in (True, False):
        with tempfile.TemporaryDirectory() as place:
            files = recorded_study(Path(place) / "project")
            for key, value in (("optim.beta1", 0.7), ("optim.matrix_lr", 0.03),
                               ("model.softcap", 12.0), ("optim.head_lr", 0.02),
                               ("schedule.warmdown_frac", 0.8)):  # fmt: skip
                record(files, {key: value})
            measure(files, Researcher(settings_of(url), files, Stop()), constrained, int(count))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A small language model as the researcher: which answers apply, and are they more than chance?

    python benchmarks/small_model.py http://127.0.0.1:8080/v1 [20]    # docs/researcher.md
    python benchmarks/small_model.py lot       # the lot as a server, for a study of its own

Three arms, each on the stand-in project of the tests with a baseline and five trials, with the
real prompt of the form and the real client: the model under the form's schema, the model without,
and a lot: a server that draws a key of the same schema and one of its values. An answer is
applicable if the form takes it and it applies to a worktree; then it joins the record, with a gain
that is made up. A second count cuts the JSON out of the text around it.
"""

import json
import random
import re
import statistics
import sys
import tempfile
import threading
from bisect import bisect
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from langchain_core.messages import HumanMessage, SystemMessage  # noqa: E402
from recorded import a_trial, recorded_study  # noqa: E402
from scripted_llm import Reply, ScriptedServer, say  # noqa: E402

from agent.answer import StudyFiles, check_answer, read_answer  # noqa: E402
from agent.form import SYSTEM, Form  # noqa: E402
from agent.journal import Proposal  # noqa: E402
from agent.proposers.llm import Researcher  # noqa: E402
from agent.settings import LlmSettings  # noqa: E402
from agent.trial import Stop  # noqa: E402
from agent.workspace import Refused  # noqa: E402
from nightshift.fixed.config import check  # noqa: E402

RECORD = {
    "optim.beta1": 0.7,
    "optim.matrix_lr": 0.03,
    "model.softcap": 12.0,
    "optim.head_lr": 0.02,
    "schedule.warmdown_frac": 0.8,
}


def settings_of(url: str) -> LlmSettings:
    given = yaml.safe_load((ROOT / "conf/study.yaml").read_text())["study"]["llm"]
    given |= {"model": "openai:local", "base_url": url, "timeout_s": 900.0, "output": "schema"}
    return check(given, LlmSettings)


def draw(request: dict) -> Reply:
    """A key of the request's schema and one of its values, each with the same chance."""
    changes = request["response_format"]["schema"]["properties"]["overrides"]["anyOf"]
    [(key, rule)] = random.choice(changes)["properties"].items()
    answer = {"overrides": {key: random.choice(rule["enum"])}, "hypothesis": "drawn by lot"}
    return say(json.dumps(answer))


def record(files: StudyFiles, overrides: dict) -> None:
    """One more trial of these values, discarded."""
    number = len(files.journal)
    [(key, value)] = overrides.items()
    proposal = Proposal(title=f"{key} -> {value}", hypothesis="h", source="x", overrides=overrides)
    trial = a_trial(number, proposal, gain=round(random.gauss(-0.004, 0.003), 4))
    trial.changed, trial.shape = overrides, files.journal.incumbent.shape
    files.journal.trials.append(trial)


def judge(files: StudyFiles, form: Form, text: str) -> Proposal | str:
    """The proposal of an answer that applies, else the kind of its refusal."""
    try:
        answer = read_answer(form.read(text))
        return check_answer(files, answer, "llm").proposal
    except Refused as refusal:
        return re.sub(r"^\S+ (\(.*?\))?:?", "...", str(refusal))[:60]


class Answers:
    """What one arm answered, and what there was to choose from."""

    def __init__(self):
        self.outcomes, self.keys, self.words = Counter(), Counter(), Counter()
        self.cut_out = self.upward = self.steps = self.named = 0
        self.upward_by_lot = self.steps_by_lot = 0.0

    def add(self, form: Form, found: Proposal | str) -> None:
        if isinstance(found, str):
            self.outcomes[found] += 1
            return
        self.outcomes["applies"] += 1
        [(key, value)] = found.overrides.items()
        values, present = form.options[key], form.values[key]
        self.keys[key] += 1
        self.words[found.hypothesis] += 1
        self.named += key.split(".")[-1].replace("_", " ") in found.hypothesis.replace("_", " ")
        self.upward += value > present
        self.upward_by_lot += sum(v > present for v in values) / len(values)
        places = [n + 0.5 - bisect(values, present) for n in range(len(values))]
        self.steps += abs(places[values.index(value)])
        self.steps_by_lot += statistics.mean(map(abs, places))

    def show(self) -> None:
        print(f"  outcomes {dict(self.outcomes)}; JSON cut out of text applies: {self.cut_out}")
        print(f"  keys {dict(self.keys.most_common())}")
        print(f"  upward {self.upward}, a lot on the same keys {self.upward_by_lot:.1f};", end=" ")
        count = max(1, self.outcomes["applies"])
        print(f"values from the present one {self.steps / count:.1f},", end=" ")
        print(f"a lot {self.steps_by_lot / count:.1f}")
        print(f"  hypotheses: {len(self.words)} different, {self.named} name their setting")


def measure(files: StudyFiles, researcher: Researcher, constrained: bool, count: int) -> None:
    caller, answers = researcher.caller, Answers()
    if not constrained:
        caller.model = caller.model.bind(extra_body={"max_tokens": 256})
    for _ in range(count):
        form = Form(files)
        messages = [SystemMessage(SYSTEM), HumanMessage(form.message([], 2048))]
        schema = form.schema() if constrained else None
        text = caller.ask(1, "proposal", messages, [], schema).content
        print("   ", json.dumps(text)[:250], flush=True)
        found = judge(files, form, text)
        answers.add(form, found)
        inside = re.search(r"\{.*\}", text, re.DOTALL)
        lenient = judge(files, form, inside.group()) if inside else ""
        answers.cut_out += isinstance(lenient, Proposal)
        if isinstance(found, Proposal):
            record(files, found.overrides)
    answers.show()
    calls = caller.ledger.calls[-count:]
    seconds = [call["seconds"] for call in calls]
    print(f"  seconds median {statistics.median(seconds):.1f}, most {max(seconds):.1f};", end=" ")
    sizes = [statistics.median(c[n] for c in calls) for n in ("input_tokens", "output_tokens")]
    print(f"tokens in, out: {sizes}; most in {max(c['input_tokens'] for c in calls)}", flush=True)


def main(url: str, count: int = 20) -> None:
    with ScriptedServer([draw]) as lot:
        if url == "lot":
            print(f"study.llm.base_url={lot.url}", flush=True)
            threading.Event().wait()
        for name, address, constrained in (
            ("schema", url, True),
            ("no schema", url, False),
            ("lot", lot.url, True),
        ):
            random.seed(0)
            with tempfile.TemporaryDirectory() as place:
                files = recorded_study(Path(place) / "project")
                for key, value in RECORD.items():
                    record(files, {key: value})
                print(f"{name}:")
                measure(files, Researcher(settings_of(address), files, Stop()), constrained, count)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

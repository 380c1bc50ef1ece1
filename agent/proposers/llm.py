"""A language model proposes: it looks at the study with tools and answers with one proposal.

The loop owns the model, not the reverse: it is asked, it has a bounded number of calls, and the one
way to answer is the tool `propose`, whose arguments are agent.answer.Answer. What does not apply
goes back with the exact reason; after `max_refusals` of these, or when there is no answer at all,
another source takes the trial. A failed trial is repaired by a new trial whose proposal says
`repairs`, at most MAX_REPAIRS times for one idea.

With study.llm.ahead it is asked for trial n + 1 while trial n runs (`think_ahead`), from a journal
in which n is running. When n has ended, what came of it is used. It is dropped, and the model asked
again, if n was kept and it does not apply to what n left, or if n is the model's and failed.

What happened stands in the ledger (agent/costs.py) and, for each trial, in its proposal: model,
usage, events, notes that were shown. The conversation itself is in conversations/NNN.jsonl.
"""

import copy
import json
import time
from pathlib import Path
from typing import Any

from agent import prompt, tools
from agent.answer import Answer, StudyFiles, check_anew, check_answer, read_answer
from agent.costs import Ledger
from agent.form import SYSTEM as FORM_RULES
from agent.form import Form
from agent.journal import Proposal
from agent.lines import append_line, read_lines
from agent.notes import MAX_NOTES, read_notes
from agent.proposers import Context
from agent.proposers.ahead import Thought
from agent.provider import Caller, CallFailed
from agent.quote import plain
from agent.settings import LlmSettings, StudyError
from agent.similar import Similar
from agent.traces import CONVERSATIONS
from agent.trial import Stop
from agent.workspace import Refused

SOURCE = "llm"
MAX_CALLS_AT_ONCE = 8  # tools asked for in one answer
MAX_RESULT_CHARS = 30_000  # of one tool
MAX_KEPT_CHARS = 30_000  # of one answer of the model, in what it is sent again
MAX_EVENT_CHARS = 400
LESSONS_FILE = "lessons.jsonl"
NO_PROPOSAL = "that was no proposal: only a call of the tool `propose` is read. Call it now."


class Researcher:
    """The model and what it remembers of one study, while the study runs."""

    def __init__(self, settings: LlmSettings, files: StudyFiles, stop: Stop):
        self.settings, self.files = settings, files
        self.ledger = Ledger(files.folder)
        self.caller = Caller(settings, self.ledger, stop)
        self.similar = Similar()
        self.shown: dict[int, list[int]] = {}  # trial -> notes
        self.waited_s: dict[int, float] = {}  # trial -> at the end of thinking ahead
        self.thought: Thought | None = None  # of the next trial, while one runs

    def propose(self, context: Context) -> Proposal | None:
        """None when it has no valid answer; the ledger has the reason. Raises Paused."""
        if self.thought is None:
            return self._ask(context)
        began = time.monotonic()
        proposal = self._recall(self.thought, context)
        self.waited_s[context.number] = round(time.monotonic() - began, 3)
        return proposal

    def _recall(self, thought: Thought, context: Context) -> Proposal | None:
        """What was thought of meanwhile; where that is of no use, what is thought of now."""
        before = context.number - 1
        try:
            proposal = self._still_good(thought)
        except (Refused, StudyError) as why:
            self.thought = None
            title = f" ('{thought.proposal.title}')" if thought.proposal else ""
            dropped = f"what was thought of while trial {before} ran{title} is dropped: {why}"
            self.ledger.event(context.number, _cut(dropped))
            return self._ask(context)
        self.thought = None  # not before: `close` ends what is waited for
        if proposal:
            proposal.events = [f"thought of while trial {before} ran"]
        return proposal

    def think_ahead(self, context: Context) -> None:
        """Begin with the proposal of this context, whose journal ends with the trial that runs; the
        next `propose` is for the same number and has what came of it."""
        self.thought = thought = Thought()
        beside = copy.copy(self)
        beside.files = self.files._replace(journal=context.journal)
        beside.caller = self.caller.beside(thought.now, thought.soon)
        thought.begin(lambda: beside._ask(context))

    def close(self) -> None:
        if self.thought:
            self.thought.end()

    def _still_good(self, thought: Thought) -> Proposal | None:
        """What was thought of, now that the trial has ended. Raises Refused: why it is dropped."""
        last, stop = self.files.journal.trials[-1], self.caller.stop
        if self.settings.output == "tools" and prompt.failed_idea(self.files.journal) is last:
            thought.soon.requested = True
            thought.wait(stop)
            raise Refused("that trial failed, and whether to repair it comes first")
        proposal = thought.result(stop)
        if proposal and last.decision == "keep":
            proposal = check_anew(self.files, proposal, self.similar).proposal
        return proposal

    def _ask(self, context: Context) -> Proposal | None:
        number = context.number
        try:
            if self.settings.output == "schema":
                return self._fill_form(number)
            lessons = self._lessons(number)
            return self._converse(number, lessons)
        except CallFailed as failed:
            self._give_up(number, str(failed))
            context.note(f"the model gave no proposal ({failed}); another source goes on")
            return None

    def sign(self, number: int, proposal: Proposal) -> None:
        """Write into the trial's proposal what the model had to do with it, whoever made it."""
        usage = self.ledger.usage(number)
        proposal.events = [*self.ledger.events.get(number, []), *proposal.events]
        if usage.calls or proposal.events:
            usage.waited_s = self.waited_s.get(number)
            proposal.model, proposal.usage = self.settings.model, usage
            proposal.notes = self.shown.get(number, [])

    def _converse(self, number: int, lessons: str) -> Proposal | None:
        from langchain_core.messages import HumanMessage, SystemMessage

        notes = read_notes(self.files.folder)[-MAX_NOTES:]
        self.shown[number] = [note["number"] for note in notes]
        messages: list[Any] = [
            SystemMessage(prompt.SYSTEM),
            HumanMessage(prompt.first_message(self.files, notes, lessons, number)),
        ]
        talk = Talk(self.files.folder, number, messages)
        refused = 0
        for call in range(self.settings.max_calls):
            left = self.settings.max_calls - call
            offered = schemas(look=left > self.settings.max_refusals + 1)
            answer = self.caller.ask(number, "proposal", messages, offered)
            talk.add(shortened(answer), self.ledger.last)
            proposal, reasons = self._hear(answer, talk)
            for reason in reasons:
                refused += 1
                self.ledger.event(number, f"answer {refused} refused: {_cut(reason)}")
            if proposal:
                return proposal
            if refused > self.settings.max_refusals:
                return self._give_up(number, f"{refused} answers did not apply")
        return self._give_up(number, f"no valid proposal within {self.settings.max_calls} calls")

    def _fill_form(self, number: int) -> Proposal | None:
        """Each attempt is asked anew, so that it fits; it is told what was refused before."""
        from langchain_core.messages import HumanMessage, SystemMessage

        notes, form = read_notes(self.files.folder)[-MAX_NOTES:], Form(self.files)
        self.shown[number] = [note["number"] for note in notes]
        attempts = min(self.settings.max_calls, self.settings.max_refusals + 1)
        for attempt in range(1, attempts + 1):
            if not (schema := form.schema()):
                return self._give_up(number, "every value of space was tried from this incumbent")
            asked = form.message(notes, self.settings.context_tokens)
            messages = [SystemMessage(FORM_RULES), HumanMessage(asked)]
            talk = Talk(self.files.folder, number, messages)
            answer = self.caller.ask(number, "proposal", messages, [], schema)
            talk.add(shortened(answer), self.ledger.last)
            values = None
            try:
                values = form.read(_text(answer.content))
                return self._check(values)
            except (Refused, StudyError) as refusal:
                form.refuse(str(refusal), values)
                self.ledger.event(number, f"answer {attempt} refused: {_cut(str(refusal))}")
        return self._give_up(number, f"{attempts} answers did not apply")

    def _give_up(self, number: int, why: str) -> None:
        self.ledger.event(number, f"{self.settings.model} gave no proposal: {_cut(why)}")

    def _hear(self, answer: Any, talk: "Talk") -> tuple[Proposal | None, list[str]]:
        """The proposal, if it is in the answer; else why not, where it tried. Answers its tools."""
        from langchain_core.messages import HumanMessage

        if not (answer.tool_calls or answer.invalid_tool_calls):
            reason = _words_of_refusal(answer) or self._cut_off(answer) or NO_PROPOSAL
            talk.add(HumanMessage(NO_PROPOSAL))
            return None, [reason]
        reasons = []
        for place, call in enumerate(answer.tool_calls):
            if place >= MAX_CALLS_AT_ONCE:
                talk.reply(call, {"error": f"at most {MAX_CALLS_AT_ONCE} tools at once"})
            elif call["name"] == "propose":
                try:
                    return self._check(call["args"]), reasons
                except (Refused, StudyError) as refusal:
                    reasons.append(str(refusal))
                    talk.reply(call, {"error": f"not accepted: {refusal}"})
            else:
                talk.reply(call, tools.call(self.files, call["name"], call["args"]))
        for call in answer.invalid_tool_calls:
            why = self._cut_off(answer) or f"the arguments of {call['name']} are no JSON object"
            reasons.append(why)
            talk.reply(call, {"error": "the arguments are no JSON object; write them again"})
        return None, reasons

    def _cut_off(self, answer: Any) -> str | None:
        if not _ends(answer) & {"length", "max_tokens", "max_output_tokens"}:
            return None
        limit = self.settings.longest_answer
        return f"the answer was cut off at {limit} tokens (study.llm.max_output_tokens)"

    def _check(self, values: Any) -> Proposal:
        return check_answer(self.files, read_answer(values), SOURCE, self.similar).proposal

    # ---- lessons ----

    def _lessons(self, number: int) -> str:
        """The newest ones; written anew every `lessons_every` trials. Without an answer the old."""
        path, every = self.files.folder / LESSONS_FILE, self.settings.lessons_every
        known = {"trial": 0, "text": ""}
        known |= (read_lines(path) or [{}])[-1]
        last = [t for t in self.files.journal.trials if t.status != "running"][-1].number
        if not every or last - known["trial"] < every:
            return known["text"]
        try:
            text = self._distil(number, known)
        except CallFailed:  # in the ledger; the proposal is asked for all the same
            return known["text"]
        append_line(path, {"trial": last, "text": text})
        return text

    def _distil(self, number: int, known: dict[str, Any]) -> str:
        from langchain_core.messages import HumanMessage, SystemMessage

        asked = prompt.lessons_message(self.files.journal, known["text"], known["trial"] + 1)
        messages = [SystemMessage(prompt.LESSONS), HumanMessage(asked)]
        talk = Talk(self.files.folder, number, messages)
        answer = self.caller.ask(number, "lessons", messages, [])
        talk.add(shortened(answer), self.ledger.last)
        return plain(_text(answer.content))[: prompt.MAX_LESSONS_CHARS]


class Talk:
    """The messages of one conversation, also written down as they come."""

    def __init__(self, folder: Path, number: int, messages: list):
        self.path = folder / CONVERSATIONS / f"{number:03d}.jsonl"
        self.messages = messages
        for message in messages:
            self._write(message)

    def add(self, message: Any, call: int | None = None) -> None:
        """`call`: of the ledger, whose answer this is."""
        self.messages.append(message)
        self._write(message, call)

    def reply(self, call: dict[str, Any], result: dict[str, Any]) -> None:
        """The result of a tool, as JSON."""
        from langchain_core.messages import ToolMessage

        text = json.dumps(result, ensure_ascii=False, allow_nan=False)[:MAX_RESULT_CHARS]
        self.add(ToolMessage(text, tool_call_id=call["id"] or "", name=call["name"]))

    def _write(self, message: Any, call: int | None = None) -> None:
        line = {"time": round(time.time(), 3), "role": message.type, "text": _text(message.content)}
        if calls := getattr(message, "tool_calls", None):
            line["calls"] = [{"name": call["name"], "arguments": call["args"]} for call in calls]
        if call is not None:
            line["call"] = call
        append_line(self.path, line, sync=False)


def schemas(look: bool) -> list[dict[str, Any]]:
    """The tools as the provider wants them. `look`: also those that are not the answer."""
    offered = {"propose": (Answer, "Your answer: the proposal for this trial.")}
    if look:
        offered |= {name: (tool.arguments, tool.description) for name, tool in tools.TOOLS.items()}
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": description,
                "parameters": arguments.model_json_schema(),
            },
        }
        for name, (arguments, description) in offered.items()
    ]


def shortened(answer: Any) -> Any:
    """The answer as it is sent again and written down: valid calls, and nothing far too long.

    Servers refuse broken arguments or an empty message in what was said before.
    """
    text, calls, broken = _text(answer.content), answer.tool_calls, answer.invalid_tool_calls
    if len(text) > MAX_KEPT_CHARS:
        answer = answer.model_copy(update={"content": text[:MAX_KEPT_CHARS] + " [cut]"})
    if not (text or calls or broken):
        return answer.model_copy(update={"content": "(no answer)"})
    if len(json.dumps(calls)) > MAX_KEPT_CHARS:
        calls = [call | {"args": {"cut": "too long"}} for call in calls]
    elif not broken:
        return answer
    calls = calls + [
        {
            "name": call["name"] or "",
            "args": {"cut": "no JSON"},
            "id": call["id"],
            "type": "tool_call",
        }
        for call in broken
    ]
    # Other kinds of content, and the provider's raw copy, repeat the calls.
    update = {"content": text[:MAX_KEPT_CHARS], "tool_calls": calls, "invalid_tool_calls": []}
    return answer.model_copy(update=update | {"additional_kwargs": {}})


def _text(content: Any) -> str:
    """Of a message: text, or the text parts of a list."""
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, str) else part.get("text", "") for part in content]
    return "".join(parts)


def _words_of_refusal(answer: Any) -> str | None:
    """Beside the content, as a part of it, or as why the answer ended."""
    parts = [part for part in answer.content if isinstance(part, dict)]
    words = [part["refusal"] for part in parts if part.get("refusal")]
    refusal = answer.additional_kwargs.get("refusal") or " ".join(map(str, words))
    if refusal or _ends(answer) & {"content_filter", "refusal"}:
        return f"the model refused: {refusal or 'stopped by the provider'}"
    return None


def _ends(answer: Any) -> set:
    """Why the answer ended, in the words of whichever provider."""
    about = answer.response_metadata
    names = ("finish_reason", "stop_reason", "done_reason")
    return {about.get(name) for name in names} | set(
        (about.get("incomplete_details") or {}).values()
    )


def _cut(text: str) -> str:
    text = " ".join(plain(text).split())
    return text if len(text) <= MAX_EVENT_CHARS else text[: MAX_EVENT_CHARS - 3] + "..."

"""What a language model cost: a ledger of every call, prices, and caps that pause a study.

`calls.jsonl` in the study's folder has a line before each call and one after it, both synced. So a
kill in mid-call leaves a call without an end: it is counted as lost, and against a cap as the most
that it can have cost. Tokens are the provider's own count. The journal gets the sums of a trial
(`Usage`) with its proposal; the ledger also has what a killed or paused trial spent.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from agent.journal import Trial, Usage
from agent.lines import append_line, read_lines
from agent.settings import Caps, LlmSettings
from agent.trial import Interrupted

LEDGER_FILE = "calls.jsonl"
PRICES = Path(__file__).parent / "prices.yaml"
CHARS_PER_TOKEN = 3  # for what is not sent yet: English and code have three to four
LEVELS = ("call", "trial", "study")


class Paused(Interrupted):
    """A cap is reached. The study stops as after Ctrl-C and goes on with a higher cap."""


class Prices:
    """Dollars per million tokens of one model; `known` is False where there is no price."""

    def __init__(self, settings: LlmSettings, path: Path = PRICES):
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        provider = str(settings.model).split(":")[0]
        found = table.get(settings.model) if settings.base_url is None else None
        found = (
            settings.price.model_dump() if settings.price else found or table.get(f"{provider}:*")
        )
        self.known = found is not None
        self.values = found or {}

    def dollars(
        self, input_tokens: int, output_tokens: int, cached: int = 0, written: int = 0
    ) -> float | None:
        """Of the input tokens, `cached` are those that the provider had already, `written` those
        that it keeps from now on."""
        if not self.known:
            return None
        price = self.values
        paid = (input_tokens - cached - written) * price["input"] + output_tokens * price["output"]
        paid += cached * price.get("cached", price["input"])
        paid += written * price.get("written", price["input"])
        return round(paid / 1e6, 9)


class Ledger:
    """The calls of one study, in order."""

    def __init__(self, folder: Path):
        self.path = folder / LEDGER_FILE
        self.calls: list[dict[str, Any]] = []
        self.events: dict[int, list[str]] = {}
        for line in read_lines(self.path):
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self.events.setdefault(line["trial"], []).append(line["event"])
        elif "ended" in line:
            self.calls[line["call"]] |= line
        else:
            self.calls.append(line)

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.path, line)
        self._take(line)

    @property
    def last(self) -> int:
        return len(self.calls) - 1

    def begin(self, trial: int, purpose: str, model: str, most: dict[str, Any]) -> int:
        """`most`: tokens and dollars that the call can cost; counted if it never ends."""
        number = len(self.calls)
        self._write({"call": number, "trial": trial, "purpose": purpose, "model": model,
                     "most": most, "started": _now()})  # fmt: skip
        return number

    def end(self, number: int, status: str, **facts: Any) -> None:
        self._write({"call": number, "status": status, "ended": _now(), **facts})

    def event(self, trial: int, text: str) -> None:
        """Something that the proposal's record should say."""
        self._write({"trial": trial, "event": text})

    def of_trial(self, trial: int) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["trial"] == trial]

    def usage(self, trial: int | None = None) -> Usage:
        """Of one trial; of the study if left out."""
        calls = self.calls if trial is None else self.of_trial(trial)
        return total([_usage(call) for call in calls])

    def spent(self, trial: int | None = None) -> tuple[int, float]:
        """(tokens, dollars) for the caps; a lost call counts as the most that it can have cost."""
        calls = self.calls if trial is None else self.of_trial(trial)
        facts = [call if "ended" in call else call["most"] for call in calls]
        tokens = sum(f.get("input_tokens", 0) + f.get("output_tokens", 0) for f in facts)
        return tokens, sum(f.get("dollars") or 0.0 for f in facts)

    def must_fit(self, trial: int, most: dict[str, Any], settings: LlmSettings) -> None:
        """Raises Paused if this call could pass a cap."""
        before = {"call": (0, 0.0), "trial": self.spent(trial), "study": self.spent()}
        tokens, dollars = most["input_tokens"] + most["output_tokens"], most["dollars"] or 0.0
        for level in LEVELS:
            used_tokens, used_dollars = before[level]
            _must_fit("tokens", level, used_tokens, tokens, settings.cap_tokens)
            _must_fit("dollars", level, used_dollars, dollars, settings.cap_dollars)


def _must_fit(unit: str, level: str, used: float, more: float, caps: Caps) -> None:
    cap = getattr(caps, level)
    if cap is not None and used + more > cap:
        shown = f"{used:,.4f} and {more:,.4f}" if unit == "dollars" else f"{used:,} and {more:,}"
        raise Paused(
            f"study.llm.cap_{unit}.{level} ({cap:g}): {shown} more at most for the next call would "
            f"pass it. The study is paused; give a higher cap to go on"
        )


def _usage(call: dict[str, Any]) -> Usage:
    ended = "ended" in call
    return Usage(
        calls=1,
        failed=int(ended and call["status"] != "ok"),
        lost=int(not ended),
        input_tokens=call.get("input_tokens", 0),
        output_tokens=call.get("output_tokens", 0),
        dollars=call.get("dollars"),
        seconds=call.get("seconds", 0.0),
    )


def total(usages: list[Usage]) -> Usage:
    """Dollars are those that are known; null if none are."""
    dollars = [usage.dollars for usage in usages if usage.dollars is not None]
    names = ("calls", "failed", "lost", "input_tokens", "output_tokens", "seconds")
    sums = {name: sum(getattr(usage, name) for usage in usages) for name in names}
    sums["seconds"] = round(sums["seconds"], 3)
    if any(usage.waited_s is not None for usage in usages):
        sums["waited_s"] = round(sum(usage.waited for usage in usages), 3)
    return Usage(**sums, dollars=round(sum(dollars), 9) if dollars else None)


def of_trials(trials: list[Trial]) -> Usage | None:
    """Their sum; None where no model was asked."""
    usages = [trial.proposal.usage for trial in trials if trial.proposal.usage]
    return total(usages) if usages else None


def in_words(usage: Usage) -> str:
    """'12 calls (2 failed), 40,211 + 1,890 tokens, $0.0521, 31 s (28 of them while a trial ran)'"""
    parts = [
        f"{usage.failed} failed" if usage.failed else "",
        f"{usage.lost} lost" if usage.lost else "",
    ]
    troubles = ", ".join(filter(None, parts))
    words = f"{usage.calls} calls" + (f" ({troubles})" if troubles else "")
    words += f", {usage.input_tokens:,} + {usage.output_tokens:,} tokens"
    if usage.dollars is not None:
        words += f", ${usage.dollars:.4f}"
    words += f", {usage.seconds:.0f} s"
    beside = usage.seconds - usage.waited
    return words + (f" ({beside:.0f} of them while a trial ran)" if beside >= 1 else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")

"""All trials of a study on a page or two, whatever their number: what a proposer has to know.

A thousand trials cost what fifty cost: each section has a fixed number of rows, each row a fixed
length. Whole are the last RECENT trials; of the others the kept ones, the near misses, how often
what was tried, and the reasons of failures with their counts. The rest is found with the tools.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable

from agent.answer import outcome
from agent.journal import Journal, Proposal, Trial
from agent.quote import plain
from agent.similar import units_of

KEPT, MISSES, FAILURES, UNITS, RECENT = 10, 8, 6, 40, 10
STEP = 8  # rows
TITLE, HYPOTHESIS, REASON, EDIT = 100, 200, 220, 300  # characters


def digest(journal: Journal) -> str:
    trials = journal.trials
    parts = [
        _counts(journal),
        _section(f"Kept (of {len(journal.lineage)})", _kept(journal.lineage)),
        _section("Near misses: discarded, by estimated gain", _misses(trials)),
        _section("Failures by reason: count, reason, the last one", _failures(trials)),
        _section("What was tried: key or file, times, kept, best gain", _units(trials)),
        _section(f"The last {RECENT} trials", [_whole(t) for t in trials[-RECENT:]]),
    ]
    return "\n\n".join(filter(None, parts))


def rows(journal: Journal, room: int, size: Callable[[str], int]) -> str:
    """As many of the newest trials as fit into `room` by `size`, newest last; then the counts.

    In this order a prompt grows at its end, and a server reuses what it computed for its start. So
    once not all fit, the first row moves by STEP at a time, where that leaves half of them.
    """
    counts, kept = _counts(journal), []
    if (room := room - size(counts)) < 0:
        return ""
    for trial in reversed(journal.trials[1:]):
        room -= size(line := _row(trial)) + 1
        if room < 0:
            break
        kept.insert(0, line)
    first = len(journal.trials) - len(kept)
    left_out = -first % STEP if first > 1 else 0
    if 2 * left_out <= len(kept):
        kept = kept[left_out:]
    return "\n".join([*kept, counts])


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title}:", *lines]) if lines else ""


def _counts(journal: Journal) -> str:
    status = Counter(trial.status for trial in journal.trials)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(status.items()))
    best, baseline = journal.incumbent, journal.trials[0]
    return (
        f"{len(journal)} trials ({counts}). Baseline {baseline.score:.4f}, incumbent is trial "
        f"{best.number} with {best.score:.4f} bits per byte ({best.target})."
    )


def _kept(lineage: list[Trial]) -> list[str]:
    """The best by estimated gain, and the last two whatever they gained."""
    best = sorted(lineage[1:-2], key=lambda t: -(t.estimate or 0))[: KEPT - 2]
    shown = {t.number: t for t in [*best, *lineage[1:][-2:]]}
    return [_row(shown[number]) for number in sorted(shown)]


def _misses(trials: list[Trial]) -> list[str]:
    missed = [t for t in trials if t.status == "ok" and t.decision == "discard"]
    missed.sort(key=lambda t: -(t.estimate if t.estimate is not None else t.gain or -1.0))
    return [_row(trial) for trial in missed[:MISSES]]


def _row(trial: Trial) -> str:
    return f"- {trial.number} {_cut(trial.proposal.heading, TITLE)} ({outcome(trial)})"


def _failures(trials: list[Trial]) -> list[str]:
    groups: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.failed:
            groups[_kind_of_failure(trial)].append(trial)
    worst = sorted(groups.items(), key=lambda item: -len(item[1]))[:FAILURES]
    return [f"- {len(found)} x {kind}; trial {found[-1].number}" for kind, found in worst]


def _kind_of_failure(trial: Trial) -> str:
    """Numbers and quoted names left out, so that the same mistake is one kind."""
    text = re.sub(r"'[^']*'|\d+", "*", plain(trial.reason).split("\n")[0])
    return f"{trial.status}: {_cut(text, 120)}"


def _units(trials: list[Trial]) -> list[str]:
    tried: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        for name in units_of(trial.proposal):
            tried[name].append(trial)
    often = sorted(tried.items(), key=lambda item: (-len(item[1]), item[0]))[:UNITS]
    return [_unit(name, found) for name, found in often]


def _unit(name: str, found: list[Trial]) -> str:
    gains = [trial.gain for trial in found if trial.gain is not None]
    kept = sum(trial.decision == "keep" for trial in found)
    best = f"{max(gains):+.4f}" if gains else "none ran"
    return f"- {_cut(name, 60)}: {len(found)}, {kept}, {best}"


def _whole(trial: Trial) -> str:
    proposal = trial.proposal
    lines = [
        f"- {trial.number} {_cut(proposal.heading, TITLE)} [{proposal.source}]: {outcome(trial)}",
        f"  why: {_cut(proposal.hypothesis, HYPOTHESIS)}",
        f"  result: {_cut(trial.reason, REASON)}",
    ]
    if changes := changes_of(proposal):
        lines.insert(2, f"  change: {changes}")
    if proposal.repairs is not None:
        lines.append(f"  repairs trial {proposal.repairs}")
    return "\n".join(lines)


def changes_of(proposal: Proposal) -> str:
    """Values as they are, of edits what comes in."""
    parts = [f"{key}={_cut(str(value), 60)}" for key, value in proposal.overrides.items()]
    parts += [f"{edit.path}: {_cut(edit.replace, EDIT)}" for edit in proposal.edits]
    return _cut("; ".join(parts), 2 * EDIT)


def _cut(text: str, limit: int) -> str:
    text = " ".join(plain(text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""The morning report of a study: chart, table, summary. Made from the journal alone.

nightshift report first      # -> outputs/studies/first/report/
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from agent import early, promotion_report, replays, strategy
from agent.costs import in_words, of_trials
from agent.decide import measure_noise, spent
from agent.journal import Journal, Trial, counted
from agent.proposers import mixed
from agent.target import TARGETS, VAL, Target
from agent.tracking import Mirror, number, read_identity, read_settings
from nightshift.fixed.config import ROOT, ConfigError, Tracking, nearest
from nightshift.fixed.tracking import load_tracking, open_store

STUDIES = ROOT / "outputs/studies"
CHART_FILES = ("progress.png", "progress.svg")
TABLE_FILE = "results.tsv"
SUMMARY_FILE = "summary.md"

# Okabe and Ito's palette: these stay apart for every kind of colour vision.
KEPT, DISCARDED, FAILED, BAND = "#0072B2", "#999999", "#D55E00", "#56B4E9"
LABEL_CHARS = 28
MAX_EVENTS = 50  # trials whose troubles with the model are listed

# What a language model cost for the trial, and where Usage has it.
MODEL_COLUMNS = {
    "model_calls": "calls",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "dollars": "dollars",
    "model_s": "seconds",
}

# autoresearch's columns, in its order, then ours. Its `status` is keep, discard or crash. A study
# of chat_bpb has that in place of val_bpb.
COLUMNS = (
    "commit", "val_bpb", "memory_gb", "status", "description",
    "trial", "decision", "run_status", "gain", "parent", "source", "change", "seeds", "steps",
    "tokens", "tokens_per_s", "mfu", "num_params", "train_s", "wall_s", "lines_added",
    "lines_removed", "started_at", "estimate", "low", "high", "evidence", "parent_runs", "drift",
    "short_behind", "hypothesis", "reason", *MODEL_COLUMNS,
)  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nightshift report", description=__doc__.splitlines()[0])
    parser.add_argument("study", help="name of the study")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line
    args = parser.parse_args(argv)
    try:
        study_folder = find_study(args.study, STUDIES)
        journal = Journal(study_folder / "journal.jsonl")
        folder = write_report(study_folder, journal, read_settings(study_folder))
    except ValueError as error:  # ConfigError and a damaged journal
        print(error, file=sys.stderr)
        return 1
    print(f"report: {folder / SUMMARY_FILE}")
    attach(study_folder, args.study, folder)
    return 0


def find_study(name: str, studies: Path) -> Path:
    """The study's folder; a ConfigError names the studies that exist."""
    known = sorted(path.parent.name for path in studies.glob("*/journal.jsonl"))
    if name in known:
        return studies / name
    if not known:
        raise ConfigError(f"study ({name}): there is none yet in {studies}. Run: nightshift study")
    raise ConfigError(
        f"study ({name}): there is no such study.{nearest(name, known)} Studies: {', '.join(known)}"
    )


def attach(study_folder: Path, name: str, report: Path) -> None:
    """The report on the study's MLflow run, if it has one."""
    if mirror := mirror_of(study_folder, name):
        mirror.attach_report(report)


def mirror_of(study_folder: Path, name: str) -> Mirror | None:
    """The mirror of a study that this process does not run; None where it has none. A tracker that
    is down is one line."""
    identity = read_identity(study_folder)
    if not identity:
        return None
    tracking = Tracking(
        **{
            **load_tracking().model_dump(),
            "uri": identity["uri"],
            "experiment": identity["experiment"],
        }
    )
    try:
        mirror = Mirror(open_store(tracking), name, study_folder)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return None
    mirror.attach()
    return mirror


def write_report(study_folder: Path, journal: Journal, settings: dict[str, Any]) -> Path:
    """Write progress.png, progress.svg, results.tsv and summary.md; returns their folder."""
    folder = Path(study_folder) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    if not journal.trials:
        raise ConfigError(f"{journal.path}: no trial yet; the report needs at least the baseline")
    name = settings.get("name") or Path(study_folder).name
    target, paths = target_of(settings), [folder / file for file in CHART_FILES]
    draw_progress(journal, settings.get("sigma"), name, paths, target)
    (folder / TABLE_FILE).write_text(results_tsv(journal, target), encoding="utf-8")
    replayed = replays.section(Path(study_folder), journal.path)
    text = summary(journal, settings, name, replayed)
    text += promotion_report.section(study_folder, folder)
    (folder / SUMMARY_FILE).write_text(text, encoding="utf-8")
    return folder


def target_of(settings: dict[str, Any]) -> Target:
    """What the study was judged by; older ones had no choice."""
    return TARGETS[settings.get("study", {}).get("target", VAL.name)]


# -- chart ---------------------------------------------------------------------------------------


def draw_progress(
    journal: Journal, sigma: float | None, name: str, paths: list[Path], target: Target = VAL
) -> None:
    """Every trial by number; the kept ones joined, two sigma of noise around the incumbent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trials = journal.trials
    figure, axes = plt.subplots(figsize=(10, 5.2), layout="constrained")
    floor, ceiling = _limits(trials, journal.lineage, sigma)
    axes.set_ylim(floor, ceiling)
    axes.set_xlim(-0.6, len(trials) - 0.4 + max(1.5, 0.12 * len(trials)))
    if journal.lineage:
        _draw_incumbent(axes, journal.lineage, len(trials), sigma)
    _draw_discarded(axes, trials, ceiling)
    _draw_failed(axes, trials)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{target.name} (bits per byte, lower is better)")
    axes.set_title(_headline(journal, name), loc="left", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6, frameon=False, fontsize=9)
    for path in paths:
        figure.savefig(path, dpi=160)
    plt.close(figure)


def _limits(trials: list[Trial], kept: list[Trial], sigma: float | None) -> tuple[float, float]:
    """Room for the lineage and its labels; trials far above it are drawn at the top edge."""
    numbers = [t.score for t in trials if t.score is not None] or [0.0, 1.0]
    low, baseline = min(numbers), kept[0].score if kept else max(numbers)
    span = max(baseline - low, 6 * (sigma or 0), 1e-3)
    return low - 0.15 * span, baseline + 0.75 * span


def _draw_incumbent(axes, kept: list[Trial], num_trials: int, sigma: float | None) -> None:
    x = [t.number for t in kept] + [num_trials - 0.4]
    y = [t.score for t in kept] + [kept[-1].score]
    if sigma:
        low, high = [v - 2 * sigma for v in y], [v + 2 * sigma for v in y]
        axes.fill_between(
            x,
            low,
            high,
            step="post",
            color=BAND,
            alpha=0.2,
            linewidth=0,
            label="one seed (2 sigma)",
        )
    axes.step(x, y, where="post", color=KEPT, linewidth=1.6, label="incumbent")
    axes.plot(x[:-1], y[:-1], "o", color=KEPT, markersize=7, label="kept")
    for trial in kept:
        axes.annotate(
            _short(trial.proposal.heading),
            (trial.number, trial.score),
            rotation=28,
            xytext=(5, 6),
            textcoords="offset points",
            fontsize=8.5,
            color="#222222",
        )


def _draw_discarded(axes, trials: list[Trial], ceiling: float) -> None:
    seen = [t for t in trials if t.score is not None and t.decision == "discard"]
    inside = [t for t in seen if t.score <= ceiling]
    beyond = [t for t in seen if t.score > ceiling]
    beyond += [t for t in trials if t.status == "stopped"]
    axes.plot(
        [t.number for t in inside],
        [t.score for t in inside],
        "o",
        color=DISCARDED,
        markersize=5,
        label="discarded",
    )
    if beyond:
        axes.plot(
            [t.number for t in beyond],
            [0.975] * len(beyond),
            "^",
            color=DISCARDED,
            markersize=6,
            transform=axes.get_xaxis_transform(),
            label="discarded, above",
        )


def _draw_failed(axes, trials: list[Trial]) -> None:
    failed = [t for t in trials if t.failed]
    if failed:
        axes.plot(
            [t.number for t in failed],
            [0.975] * len(failed),
            "x",
            color=FAILED,
            markersize=7,
            markeredgewidth=1.8,
            transform=axes.get_xaxis_transform(),
            label="not ok",
        )
    for trial in failed:
        axes.annotate(
            trial.status,
            (trial.number, 0.975),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, -8),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
            color=FAILED,
            rotation=90,
        )


def _headline(journal: Journal, name: str) -> str:
    kept, counts = journal.lineage, "{} trials, {} kept".format(*counted(journal.trials))
    if not kept:
        return f"{name}: {counts}"
    return f"{name}: {kept[0].score:.4f} -> {kept[-1].score:.4f} bits per byte, {counts}"


def _short(title: str) -> str:
    return title if len(title) <= LABEL_CHARS else title[: LABEL_CHARS - 3].rstrip() + "..."


# -- table ---------------------------------------------------------------------------------------


def results_tsv(journal: Journal, target: Target = VAL) -> str:
    """One line a trial; a missing number is empty, never 0."""
    columns = [target.name if name == "val_bpb" else name for name in COLUMNS]
    lines = ["\t".join(columns)]
    for trial in journal.trials:
        row = _row(trial) | {target.name: trial.score}
        lines.append("\t".join(_cell(row[name]) for name in columns))
    return "\n".join(lines) + "\n"


def _row(trial: Trial) -> dict[str, Any]:
    first = trial.runs[0] if trial.runs else None
    row = {
        name: getattr(first, name, None)
        for name in ("steps", "tokens", "tokens_per_s", "mfu", "num_params", "train_s")
    }
    usage = trial.proposal.usage
    row |= {column: getattr(usage, name, None) for column, name in MODEL_COLUMNS.items()}
    return row | {
        "commit": (trial.commit or "")[:7],
        "memory_gb": first.peak_memory_gb if first else None,
        "status": "crash" if trial.failed else trial.decision,
        "description": trial.proposal.heading,
        "trial": trial.number,
        "decision": trial.decision,
        "run_status": trial.status,
        "gain": trial.gain,
        "parent": trial.parent,
        "source": trial.proposal.source,
        "change": trial.proposal.kind,
        "seeds": " ".join(map(str, trial.seeds)),
        "wall_s": trial.wall_s,
        "lines_added": trial.lines_added,
        "lines_removed": trial.lines_removed,
        "started_at": trial.started_at,
        "estimate": trial.estimate,
        "low": trial.low,
        "high": trial.high,
        "evidence": trial.evidence,
        "parent_runs": len(trial.parent_runs),
        "drift": trial.drift,
        "short_behind": trial.rung and trial.rung.behind,
        "hypothesis": trial.proposal.hypothesis,
        "reason": trial.reason,
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if abs(value) < 100 else f"{value:.1f}"
    return "" if value is None else " ".join(str(value).split())


# -- summary -------------------------------------------------------------------------------------


def summary(
    journal: Journal, settings: dict[str, Any], name: str, replayed: str | None = None
) -> str:
    kept, target = journal.lineage, target_of(settings)
    parts = [
        f"# Study {name}",
        _opening(journal, settings.get("sigma")),
        _origin(settings.get("after")),
        _trust(journal.trials, settings),
        "![progress](progress.png)",
    ]
    if kept:
        columns = ("trial", target.name, "gain", "estimate", "seeds", "what", "hypothesis")
        parts += ["## Kept", _table(kept, columns)]
    if shorter := [t for t in kept if t.lines_removed > t.lines_added]:
        parts += ["## What was deleted", "\n".join(map(_deletion, shorter))]
    parts += [
        "## All trials",
        _table(journal.trials, ("trial", target.name, "gain", "decision", "what", "reason")),
    ]
    failed = [trial for trial in journal.trials if trial.failed]
    if passed := [trial for trial in journal.trials if trial.behind is not None]:
        parts += ["## Stopped early", early.in_words(passed)]
    if failed:
        parts += ["## What failed, and why", "\n".join(_failure(trial) for trial in failed)]
    if usage := of_trials(journal.trials):
        parts += ["## The language model", f"{in_words(usage)}.", _events(journal.trials)]
    if len({t.proposal.source for t in journal.trials[1:]}) > 1:
        parts += ["## Sources", _sources(journal.trials[1:])]
    parts += [replayed, "## Reproduce", _reproduce(settings, name, kept)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _opening(journal: Journal, sigma: float | None) -> str:
    kept, counts = journal.lineage, "{} trials, {} kept.".format(*counted(journal.trials))
    noise = "" if sigma is None else f" Noise of one seed: sigma {sigma:.4f}."
    if not kept:
        return counts + noise
    baseline, best = kept[0].score, kept[-1].score
    return (
        f"Baseline {baseline:.4f} -> best {best:.4f} bits per byte: "
        f"gain {baseline - best:+.4f} ({(baseline - best) / baseline:+.1%}). {counts}{noise}"
    )


def _origin(after: dict[str, Any] | None) -> str:
    if not after:
        return ""
    promotion = after["promotion"]
    champion = f"promotion {promotion}" if promotion else f"trial {after['trial']}"
    return f"It began from {champion} of study {after['study']}, commit {after['commit'][:7]}."


def _trust(trials: list[Trial], settings: dict[str, Any]) -> str:
    """What the gains are worth: their honest sum, the noise of a pair, false keeps to expect."""
    lines = []
    if kept := [t for t in trials if t.decision == "keep" and t.estimate is not None]:
        total = sum(t.estimate for t in kept)
        half = math.hypot(*((t.high - t.low) / 2 for t in kept))
        lines.append(
            f"Estimated sum of the kept gains: {total:+.4f} ({total - half:+.4f} to "
            f"{total + half:+.4f}, 95 %)."
        )
    if ahead := strategy.unproven(trials):
        lines.append(
            f"Ahead on one seed and not proven: {number(ahead)}, by {ahead.differences[0]:+.4f}."
        )
    paired = measure_noise([t.differences for t in trials])
    if paired.sigma is not None:
        lines.append(f"Noise of a paired difference: sigma {paired.sigma:.4f}, {paired.df} df.")
    if (budget := settings.get("study", {}).get("false_keeps")) and len(trials) > 1:
        lines.append(f"False keeps to expect so far: at most {spent(trials, budget):.3f}.")
    for trial in trials:
        if trial.drifted:
            lines.append(f"Before trial {number(trial)} the machine drifted: {trial.drift:+.4f}.")
    return " ".join(lines)


def _deletion(trial: Trial) -> str:
    fewer = trial.lines_removed - trial.lines_added
    return f"- {number(trial)} {_markdown(trial.proposal.title)}: {fewer} lines fewer"


def _interval(trial: Trial) -> str:
    if trial.estimate is None:
        return ""
    return f"{trial.estimate:+.4f} ({trial.low:+.4f} to {trial.high:+.4f})"


def _table(trials: list[Trial], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for trial in trials:
        cells = {
            "trial": number(trial),
            columns[1]: trial.status if trial.score is None else f"{trial.score:.4f}",
            "gain": "" if trial.gain is None else f"{trial.gain:+.4f}",
            "estimate": _interval(trial),
            "seeds": str(len(trial.runs)),
            "decision": trial.decision,
            "what": trial.proposal.heading,
            "hypothesis": trial.proposal.hypothesis,
            "reason": trial.reason,
        }
        lines.append("| " + " | ".join(_markdown(cells[name]) for name in columns) + " |")
    return "\n".join(lines)


def _sources(trials: list[Trial]) -> str:
    """What each source brought, and what its trials took (mixed.py shares turns out by that)."""
    lines = ["| source | trials | kept | estimated gain | run_s |", "|---|---|---|---|---|"]
    gains = mixed.gains_of(trials)
    for source in sorted({t.proposal.source for t in trials}):
        mine = [t for t in trials if t.proposal.source == source]
        kept = sum(t.decision == "keep" for t in mine)
        gain = sum(gains.get(t.number, 0.0) for t in mine)
        cost = sum(t.cost_s for t in mine)
        lines.append(f"| {source} | {len(mine)} | {kept} | {gain:+.4f} | {cost:.0f} |")
    return "\n".join(lines)


def _failure(trial: Trial) -> str:
    messages = [run.message for run in trial.runs if run.message]
    why = messages[0] if messages else trial.reason
    return f"- {number(trial)} {_markdown(trial.proposal.title)}: {trial.status}. {_markdown(why)}"


def _events(trials: list[Trial]) -> str:
    """What calls and answers ran into, the last trials first."""
    lines = [
        f"- {number(trial)} ({trial.proposal.source}) {_markdown('; '.join(trial.proposal.events))}"
        for trial in reversed(trials)
        if trial.proposal.events and trial.proposal.model
    ]
    more = [f"- and {len(lines) - MAX_EVENTS} more trials: the journal has them"]
    return "\n".join(lines[:MAX_EVENTS] + (more if len(lines) > MAX_EVENTS else []))


def _reproduce(settings: dict[str, Any], name: str, kept: list[Trial]) -> str:
    branch = settings.get("branch") or f"study/{name}"
    lines = ["```", f"git checkout {branch} && dvc repro {target_of(settings).stage}", "```"]
    if base := settings.get("base_commit"):
        lines += ["", f"Against the baseline: `git diff {base[:7]} {branch}`."]
    if kept:
        lines += [
            "",
            f"Trial {number(kept[-1])} is its head; discarded trials stay under "
            f"`refs/trials/{name}/<number>`.",
        ]
    return "\n".join(lines)


def _markdown(text: str) -> str:
    """One table cell: no line breaks, no cell ends."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

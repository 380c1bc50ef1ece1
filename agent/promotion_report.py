"""What people see of a promotion: the model's card, the table of verdicts, the chart.

Written into promotions/<n>/ once it is through, and from there into MLflow and the study's report.
"""

import math
import os
import shutil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml

from agent.journal import Journal, Run
from agent.promotion import RULE, Promotion, changes_of, folder_of, read_promotions
from nightshift.fixed.config import digest
from nightshift.fixed.result import CONFIG_FILE

if TYPE_CHECKING:
    from agent.study import Study

CARD_FILE, TABLE_FILE, CHART_FILE = "CARD.md", "verdicts.tsv", "promoted.png"
MODEL_NAME = "nightshift"  # in MLflow's registry; the alias `champion` is on the newest promotion
BASELINE, CHAMPION = "#999999", "#0072B2"  # Okabe and Ito, as report.py
COLUMNS = (
    "change", "title", "verdict", "gain", "estimate", "low", "high", "evidence", "seeds",
    "before", "before_low", "before_high", "reason",
)  # fmt: skip


def write(study: "Study", promotion: Promotion) -> list[Path]:
    """Card, table and chart; returns their paths."""
    folder = folder_of(study.folder, promotion.number)
    paths = [folder / name for name in (CARD_FILE, TABLE_FILE, CHART_FILE)]
    text = card(study.folder, study.name, study.journal, promotion)
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text(verdicts_tsv(promotion), encoding="utf-8")
    draw(promotion, study.name, paths[2])
    return paths


def verdicts_tsv(promotion: Promotion) -> str:
    lines = ["\t".join(COLUMNS)]
    for verdict in promotion.verdicts:
        row = vars(verdict) | {"seeds": len(verdict.differences)}
        row["change"] = "all" if verdict.change is None else f"{verdict.change:03d}"
        lines.append("\t".join(_cell(row[name]) for name in COLUMNS))
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6f}"
    return "" if value is None else " ".join(str(value).split())


def table(promotion: Promotion) -> str:
    """Markdown."""
    lines = [
        "| trial | change | gain in the study | gain at this scale | verdict |",
        "|---|---|---|---|---|",
    ]
    for v in promotion.verdicts:
        number = "all" if v.change is None else f"{v.change:03d}"
        now = _interval(v.gain, v.low, v.high) if v.gain is not None else _plain(v.reason)
        before = _interval(v.before, v.before_low, v.before_high)
        lines.append(f"| {number} | {_plain(v.title)} | {before} | {now} | {v.verdict} |")
    return "\n".join(lines)


def _interval(gain: float | None, low: float | None, high: float | None) -> str:
    if gain is None:
        return ""
    return f"{gain:+.4f}" + ("" if low is None else f" ({low:+.4f} to {high:+.4f})")


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def numbers_table(promotion: Promotion) -> str:
    """val_bpb of each configuration over its seeds, and test."""
    lines = ["| configuration | val_bpb, mean | seeds |", "|---|---|---|"]
    for arm in promotion.arms:
        each = ", ".join(f"{run.seed}: {run.val_bpb:.4f}" for run in arm.runs if run.val_bpb)
        mean = f"{fmean(arm.numbers):.4f}" if arm.numbers else _plain(arm.problem or "-")
        lines.append(f"| {arm.name} | {mean} | {each} |")
    noise = "" if promotion.sigma is None else f" One seed's sigma: {promotion.sigma:.4f}."
    return "\n".join(lines) + f"\n\n{test_line(promotion)}{noise}"


def test_line(promotion: Promotion) -> str:
    if promotion.test_bpb is None:
        return f"test_bpb: none ({promotion.test_note or 'it was not promoted, so not read'})."
    return f"test_bpb {promotion.test_bpb:.4f}, of the first seed's weights, read once."


def card(study_folder: Path, name: str, journal: Journal, promotion: Promotion) -> str:
    """The model's card, Markdown."""
    trial = journal.trials[promotion.order.trial]
    run = promotion.arm("champion").runs[0]
    config = yaml.safe_load((study_folder / run.folder / CONFIG_FILE).read_text(encoding="utf-8"))
    parts = [
        f"# {name}, promotion {promotion.number}: {promotion.verdict.verdict}",
        what_it_is(name, run, config),
        "## Data",
        data(config, trial.data_digest),
        "## Numbers",
        numbers_table(promotion),
        "## Lineage",
        table(promotion),
        f"Rule. {RULE}. Verdicts are not corrected for their number.",
        lineage(journal, promotion),
        "## Reproduce",
        reproduce(name, promotion),
        "## Load",
        "```python\nimport mlflow\n\n"
        f'model = mlflow.pyfunc.load_model("models:/{MODEL_NAME}@champion")\n'
        'model.predict({"messages": [{"role": "user", "content": "Hello"}]})\n```',
        "## Limits",
        "A small model for research, pretrained and not tuned to chat: asked in the chat format it "
        "goes on with text like its corpus, and what it says is often false. It has seen no other "
        "language, and what its texts say of people it repeats. Gains were measured on one corpus "
        "at two scales; nothing is said about a third.",
    ]
    return "\n\n".join(parts) + "\n"


def what_it_is(name: str, run: Run, config: dict[str, Any]) -> str:
    model, budget = config["model"], config["budget"]
    heads = math.ceil(model["depth"] * model["aspect_ratio"] / model["head_dim"])
    return (
        f"A decoder-only transformer that nightshift's study `{name}` found: {model['depth']} "
        f"layers, width {heads * model['head_dim']}, context {model['seq_len']} tokens, "
        f"{run.num_params or 0:,} parameters, byte-level BPE of "
        f"{config['tokenizer']['vocab_size']:,} tokens. Trained on "
        f"{run.tokens or 0:,} tokens in {run.steps or 0:,} steps (budget: "
        f"{budget['amount']:,.0f} {budget['kind']}), seed {run.seed}."
    )


def data(config: dict[str, Any], data_digest: str | None) -> str:
    corpus = config["corpus"]
    source = corpus["repo"] or corpus["path"] or corpus["source"]
    shares = ", ".join(f"{split} {corpus[f'{split}_frac']:g}" for split in ("dev", "val", "test"))
    return (
        f"Corpus `{source if corpus['source'] != 'folder' else 'folder'}`; held out by documents: "
        f"{shares}. Digest of the training tokens of its trial: {data_digest}."
    )


def lineage(journal: Journal, promotion: Promotion) -> str:
    changes = changes_of(journal, journal.trials[promotion.order.trial])
    lines = [f"- {t.number:03d} {_plain(t.proposal.hypothesis)}" for t in changes]
    scale = ", ".join(f"{key}={value}" for key, value in promotion.scale.items())
    return "\n".join(lines) + f"\n\nSet for this scale: {scale}."


def reproduce(name: str, promotion: Promotion) -> str:
    if not promotion.commit:
        return "It was not promoted: the baseline is better at this scale."
    return (
        f"```\n{checkout(name, promotion)}\n"
        "dvc repro evaluate                      # nothing to do\n"
        "dvc repro -f --no-run-cache evaluate    # trains it again; same digits on a CPU\n"
        f"```\n\nWeights: DVC {promotion.dvc_md5}, sha256 {promotion.weights_sha256}."
    )


def checkout(name: str, promotion: Promotion) -> str:
    """The branch may move on; the commit is the same for ever."""
    where = f"   # study/{name} when it was promoted" if promotion.is_head else ""
    return f"git checkout {promotion.commit[:12]}{where}"


def draw(promotion: Promotion, name: str, path: Path) -> None:
    """val_bpb of baseline and champion in the study and at the larger scale, 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    sigmas = (promotion.study_sigma, promotion.sigma)
    for arm, color, shift in (("baseline", BASELINE, -0.06), ("champion", CHAMPION, 0.06)):
        groups = (promotion.small[arm], promotion.arm(arm).numbers)
        found = [(x, g, s) for x, (g, s) in enumerate(zip(groups, sigmas, strict=True)) if g]
        axes.errorbar(
            [x + shift for x, _, _ in found],
            [fmean(g) for _, g, _ in found],
            yerr=[1.96 * (s or 0.0) / math.sqrt(len(g)) for _, g, s in found],
            fmt="o-", color=color, capsize=4, label=arm,
        )  # fmt: skip
        for x, group, _ in found:
            axes.plot([x + shift] * len(group), group, ".", color=color, alpha=0.5, markersize=4)
    axes.set_xticks([0, 1], ["in the study", "promoted"])
    axes.set_xlim(-0.4, 1.4)
    axes.set_ylabel("val_bpb (bits per byte, lower is better)")
    verdict = promotion.verdict
    axes.set_title(f"{name}: {verdict.verdict}, {verdict.reason}", loc="left", fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- into MLflow and the report ----


def tags(promotion: Promotion) -> dict[str, Any]:
    """Of the registered version, and of the promotion's run."""
    found = {
        "promotion": promotion.number,
        "verdict": promotion.verdict.verdict,
        "trial": f"{promotion.order.trial:03d}",
        "commit": promotion.commit,
        "dvc_md5": promotion.dvc_md5,
        "weights_sha256": promotion.weights_sha256,
        "test_bpb": None if promotion.test_bpb is None else f"{promotion.test_bpb:.6f}",
    }
    return {key: value for key, value in found.items() if value is not None}


def entry(promotion: Promotion) -> dict[str, Any]:
    """What MLflow's run of the promotion says."""
    whole = promotion.verdict
    metrics = {
        name: getattr(whole, name) for name in ("gain", "estimate", "low", "high", "evidence")
    }
    metrics |= {
        "test_bpb": promotion.test_bpb,
        "sigma": promotion.sigma,
        "wall_s": promotion.wall_s,
    }
    for arm in promotion.arms:
        if arm.numbers:
            metrics["val_bpb" if arm.name == "champion" else f"val_bpb_{arm.name}"] = fmean(
                arm.numbers
            )
    for verdict in promotion.verdicts[1:]:
        metrics[f"gain_of_{verdict.change:03d}"] = verdict.gain
    return {
        "name": f"promotion {promotion.number} {whole.verdict}",
        "digest": digest([promotion.number, promotion.commit, promotion.ended_at]),
        "tags": tags(promotion) | {"mlflow.source.git.commit": promotion.commit},
        "metrics": metrics,
        "params": promotion.scale,
        "note": f"{_sentence(promotion)}\n\n{table(promotion)}\n\n{test_line(promotion)}",
    }


def _sentence(promotion: Promotion) -> str:
    whole = promotion.verdict
    return f"Trial {promotion.order.trial} {whole.verdict} at the larger scale: {whole.reason}."


def section(study_folder: Path, report: Path) -> str:
    """`## Promoted` for the study's summary, its charts beside it; '' where there is nothing."""
    parts = []
    for promotion in read_promotions(study_folder):
        chart = folder_of(study_folder, promotion.number) / CHART_FILE
        parts.append(f"### Promotion {promotion.number}\n\n{_sentence(promotion)}")
        if chart.exists():
            name = f"promoted_{promotion.number:03d}.png"
            shutil.copyfile(chart, report / name)
            parts.append(f"![promotion {promotion.number}]({name})")
        parts += [numbers_table(promotion), table(promotion), reproduce_line(promotion)]
    return "\n\n".join(["\n## Promoted", *parts, f"Rule. {RULE}."]) + "\n" if parts else ""


def reproduce_line(promotion: Promotion) -> str:
    if not promotion.commit:
        return "Not promoted: the baseline is better at this scale."
    return f"Commit `{promotion.commit[:12]}`, MLflow `models:/{MODEL_NAME}@champion`."


def told(promotion: Promotion, study_folder: Path, tracked: bool) -> str:
    """The block at the end, on the terminal."""
    name = study_folder.name
    lines = ["---", f"{'all:':12} {promotion.verdict.verdict}: {promotion.verdict.reason}"]
    for v in promotion.verdicts[1:]:
        lines.append(f"{f'trial {v.change}:':12} {v.verdict}: {v.title}: {v.reason}")
    lines.append(f"{'test:':12} {test_line(promotion)}")
    where = Path(os.path.relpath(folder_of(study_folder, promotion.number)))
    lines.append(f"{'card:':12} {where / CARD_FILE}")
    if not promotion.commit:
        return "\n".join([*lines, "not promoted: the baseline is better at this scale"])
    where = f"models:/{MODEL_NAME}@champion" if tracked else "not registered: tracking=off"
    lines.append(f"{'model:':12} {where}")
    place = f"study/{name}" if promotion.is_head else promotion.commit[:12]
    lines.append(f"{'reproduce:':12} git checkout {place} && dvc repro evaluate")
    return "\n".join(lines)

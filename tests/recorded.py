"""A study of the stand-in project whose baseline is written down, not run: ready for trial 1."""

from pathlib import Path

from omegaconf import OmegaConf
from standin import make_project, overrides

from agent import study, workspace
from agent.answer import StudyFiles
from agent.journal import Journal, Proposal, Run, Trial
from agent.loop import BASELINE
from agent.settings import read_plan

NOISE = {1: 0.0, 2: 0.002, 3: -0.002}  # as the stand-in's evaluation has it


def recorded_study(folder: Path, *arguments: str) -> StudyFiles:
    """`arguments`: what the study is started with, without its number of trials."""
    repo = make_project(folder)
    plan = read_plan(repo / "conf", overrides(0, *arguments))
    place = repo / "outputs/studies/first"
    place.mkdir(parents=True)
    settings = study.begin(repo, place, plan, workspace.base_commit(repo))
    files = StudyFiles(repo, place, Journal(place / "journal.jsonl"))
    with workspace.worktree(repo, place / "trials/000/worktree", settings["first_commit"]) as tree:
        config = workspace.resolve(tree)
        digest = workspace.state_digest(tree, config)
    runs = [
        Run(seed=seed, status="ok", val_bpb=2.2 + noise, tokens_per_s=3000.0, wall_s=1.0,
            folder=f"trials/000/seed_{seed}", work=1.0 / 300 / 111.111 * 1e6 / 10)
        for seed, noise in NOISE.items()
    ]  # fmt: skip
    (place / "trials/000").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config.model_dump()), place / "trials/000/config.yaml")
    files.journal.append(
        Trial(number=0, proposal=BASELINE, parent=None, status="ok", decision="keep",
              reason="baseline", val_bpb=2.2, runs=runs, commit=settings["first_commit"],
              digest=digest, started_at="2026-01-01T00:00:00+00:00", wall_s=3.0)
    )  # fmt: skip
    return files


def a_trial(number: int, proposal: Proposal, **facts) -> Trial:
    given = {
        "parent": 0,
        "status": "ok",
        "decision": "discard",
        "reason": "not better",
        "gain": -0.01,
    }
    return Trial(number=number, proposal=proposal, **given | facts)

"""A study of chat_bpb: what it may change, where its base comes from, how its number is named."""

import os
import signal
import types
from dataclasses import asdict

import pytest
import torch
import yaml
from edited import changed_values, edited_files
from standin import edit, journal_of, make_project, overrides, run_git, script, values
from test_loop import assert_nothing_is_left, started, study_folder, wait_for
from tiny import config

from agent import workspace
from agent.base import recipe
from agent.journal import Proposal, Run, Trial, trial_from_json
from agent.loop import main
from agent.proposers.recipes import folder_of, read_recipes
from agent.settings import differences, read_plan
from agent.target import CHAT
from agent.tracking import study_note, trial_metrics
from agent.workspace import Refused
from nightshift.fixed.config import CONF, ROOT, ConfigError
from nightshift.model import GPT

CHAT_STUDY = "study.target=chat_bpb"
TWO_SEEDS = "study.baseline_seeds=[1,2]"


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path / "project")


def tuning(before: float, after: float) -> Proposal:
    """A change of the tuning step worth after - before bits per byte."""
    proposal = edit(f"BONUS = {before}", f"BONUS = {after}")
    proposal.edits[0].path, proposal.title = "src/nightshift/tuning.py", f"to {after}"
    return proposal


# ---- what may change ----


@pytest.mark.parametrize(
    ("proposal", "words"),
    [
        (edit('BEHAVIOUR = "ok"', "BEHAVIOUR = 1"), "model.py is not editable. Editable: src/"),
        (values(optim__matrix_lr=0.03), "override optim.matrix_lr: not editable. Editable: the"),
        (values(sft__lr_scale=99), "sft.lr_scale"),
    ],
)
def test_what_the_base_was_made_with_stays(project, proposal, words):
    with workspace.worktree(project, project / "outputs/tree", "HEAD") as tree:
        with pytest.raises(Refused, match=words):
            workspace.apply(tree, proposal, "t", CHAT)


def test_the_tuning_step_and_its_knobs_may_change_and_only_where_tuning_is_judged(project):
    proposal = tuning(0.0, 0.5)
    proposal.overrides = {"sft.lr_scale": 0.7}
    with workspace.worktree(project, project / "outputs/tree", "HEAD") as tree:
        first = run_git(tree, "rev-parse", "HEAD")
        applied = workspace.apply(tree, proposal, "t", CHAT)
        assert applied.config.sft.lr_scale == 0.7
        assert workspace.code_of(tree, first, CHAT).commit == applied.commit
        with pytest.raises(Refused, match="not editable differ"):
            workspace.code_of(tree, first)
    with workspace.worktree(project, project / "outputs/tree", "HEAD") as tree:
        with pytest.raises(Refused, match="tuning.py is not editable"):
            workspace.apply(tree, tuning(0.0, 0.5), "t")


def test_the_usual_holds_unless_a_person_says_otherwise():
    plan = read_plan(CONF, [CHAT_STUDY])
    assert set(plan.space) >= {"sft.lr_scale"} and {k.split(".")[0] for k in plan.space} == {"sft"}
    assert (plan.config.sft_budget.kind, plan.config.sft_budget.amount) == ("tokens", 75_000)
    assert plan.config.budget.amount == 75_000
    other = read_plan(CONF, [CHAT_STUDY, "preset=none", "budget@sft_budget=20s"])
    assert (other.config.budget.amount, other.config.sft_budget.amount) == (60, 20)
    assert "optim.matrix_lr" in read_plan(CONF, []).space


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([CHAT_STUDY, "space=default"], "space.optim.matrix_lr: not editable, so it cannot"),
        (["base=first/4"], r"base \(first/4\): a study of val_bpb trains from nothing"),
        (["study.target=chat"], r"study.target \('chat'\)"),
    ],
)
def test_what_does_not_fit_the_target_is_one_line(arguments, words):
    with pytest.raises(ConfigError, match=words):
        read_plan(CONF, arguments)


def test_a_study_from_before_there_were_targets_goes_on():
    plan = read_plan(CONF, [])
    old = plan.as_json()
    del old["study"]["target"]
    assert differences(old, plan) == []
    assert any("study.target" in line for line in differences(old, read_plan(CONF, [CHAT_STUDY])))


# ---- the journal ----


def test_an_old_line_of_the_journal_loads_and_a_number_knows_its_name():
    trial = Trial(
        number=0,
        proposal=Proposal(title="b", hypothesis="", source="baseline"),
        parent=None,
        status="ok",
        decision="keep",
        reason="",
        val_bpb=2.5,
        runs=[Run(seed=1, status="ok", val_bpb=2.5)],
    )
    line = asdict(trial)
    del line["chat_bpb"], line["runs"][0]["chat_bpb"]
    loaded = trial_from_json(line)
    assert loaded == trial and (loaded.target, loaded.score) == ("val_bpb", 2.5)
    assert trial_metrics(loaded) | {"val_bpb": 2.5, "val_bpb_seed_1": 2.5} == trial_metrics(trial)
    chat = Run(seed=1, status="ok", chat_bpb=3.1)
    assert (chat.target, chat.score) == ("chat_bpb", 3.1)
    loaded.runs, loaded.val_bpb, loaded.chat_bpb = [chat], None, 3.1
    metrics = trial_metrics(loaded)
    assert metrics["chat_bpb"] == metrics["chat_bpb_seed_1"] == 3.1 and not metrics["val_bpb"]
    assert "| trial | chat_bpb | gain | what |" in study_note("s", [loaded], None)


# ---- the base ----


def trainings(project) -> int:
    """How often a base was begun, by any study."""
    log = project / "outputs/studies/starts.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.slow
def test_the_base_is_trained_once_for_all_trials_and_for_other_studies(project, capsys):
    script(project, [tuning(0.0, 0.5), values(model__depth=6)])
    assert main(overrides(2, CHAT_STUDY, TWO_SEEDS), project) == 0
    trials = journal_of(project).trials
    assert [t.decision for t in trials] == ["keep", "keep", "discard"]
    assert [t.chat_bpb for t in trials] == [3.001, 2.501, None] and trials[1].val_bpb is None
    assert "override model.depth: not editable" in trials[2].reason
    assert trainings(project) == 1
    shown = capsys.readouterr().out
    assert "chat_bpb" in shown.splitlines()[0] and "the base is trained: val_bpb 2.2000" in shown
    assert "dvc repro chat_evaluate" in shown
    report = study_folder(project) / "report"
    assert "| trial | chat_bpb | gain" in (report / "summary.md").read_text()
    assert (report / "results.tsv").read_text().startswith("commit\tchat_bpb\t")
    base = yaml.safe_load((study_folder(project) / "settings.json").read_text())["base"]
    run = yaml.safe_load((study_folder(project) / "trials/001/seed_2/config.yaml").read_text())
    assert run["base"] == f"{base['folder']}/checkpoint" and run["optim"]["matrix_lr"] == 0.01
    assert_nothing_is_left(project)


@pytest.mark.slow
def test_another_study_takes_a_base_from_the_cache_if_its_pretraining_is_the_same(project):
    assert main(overrides(0, CHAT_STUDY, TWO_SEEDS), project) == 0
    assert main(overrides(1, CHAT_STUDY, TWO_SEEDS), project) == 0, "it goes on"
    other = ("study.name=second", "sft.lr_scale=0.3")
    assert main(overrides(0, CHAT_STUDY, TWO_SEEDS, *other), project) == 0, "only tuning differs"
    assert trainings(project) == 1
    other = ("study.name=third", "model.depth=3")
    assert main(overrides(0, CHAT_STUDY, TWO_SEEDS, *other), project) == 0
    assert trainings(project) == 2


@pytest.mark.slow
def test_a_kill_while_the_base_is_trained_costs_only_that_training(project):
    model = project / "src/nightshift/model.py"
    model.write_text(model.read_text().replace('"ok"', '"slow"'))
    run_git(project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "slow")
    with started(project, overrides(0, CHAT_STUDY)) as process:
        wait_for(lambda: trainings(project) == 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
    assert not list((project / ".cache/base").glob("*"))
    assert main(overrides(0, CHAT_STUDY), project) == 0
    assert trainings(project) == 2 and len(list((project / ".cache/base").glob("*"))) == 1
    assert not (study_folder(project) / "base_run").exists()
    assert_nothing_is_left(project)


@pytest.mark.slow
def test_trials_that_began_from_one_base_do_not_go_on_from_another(project, capsys):
    assert main(overrides(0, CHAT_STUDY), project) == 0
    path = study_folder(project) / "settings.json"
    settings = yaml.safe_load(path.read_text())
    sha256 = settings["base"]["weights_sha256"]
    path.write_text(path.read_text().replace(sha256, "0" * 64))
    assert main(overrides(1, CHAT_STUDY), project) == 2
    assert "its trials began from a base with weights 000000000000" in capsys.readouterr().err


def test_the_recipe_of_a_base_is_what_dvc_says_it_depends_on(project):
    config = read_plan(project / "conf", [CHAT_STUDY]).config
    before = recipe(project, config)
    assert set(before["values"]) >= {"seed", "model", "optim", "corpus", "filter", "budget"}
    assert "sft" not in before["values"]
    (project / "src/nightshift/tuning.py").write_text("BONUS = 1\n")
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "x"]
    run_git(project, *commit)
    assert recipe(project, config) == before
    (project / "src/nightshift/optim.py").write_text("x = 1\n")
    run_git(project, *commit)
    assert recipe(project, config) != before


def test_a_base_that_is_no_checkpoint_is_one_line(project, capsys):
    (project / "src/nightshift/catalogue.py").write_text("raise SystemExit('no such checkpoint')")
    assert main(overrides(0, CHAT_STUDY, "base=nothing"), project) == 2
    assert capsys.readouterr().err.strip() == "base (nothing): no such checkpoint"


# ---- recipes ----


def test_recipes_of_another_target_are_left_out():
    chat, val = read_recipes(folder_of(CHAT)), read_recipes()
    assert len(chat) >= 5 and not {r.title for r in chat} & {r.title for r in val}
    for one in (e for r in chat for e in r.edits):
        assert one.path in CHAT.files or os.path.dirname(one.path) in CHAT.folders, one.path


CHAT_RECIPES = read_recipes(folder_of(CHAT))


@pytest.mark.parametrize("recipe", CHAT_RECIPES, ids=lambda r: r.title)
def test_a_recipe_of_tuning_fits_and_what_it_makes_learns(recipe, tmp_path):
    texts = edited_files(recipe)
    changed = changed_values(recipe)
    assert all(key.startswith("sft.") for key in changed) and (changed or CHAT.files[0] in texts)
    module = types.ModuleType("tuning")
    source = texts.get(CHAT.files[0], (ROOT / CHAT.files[0]).read_text())
    exec(compile(source, CHAT.files[0], "exec"), module.__dict__)
    cfg = config(tmp_path)
    torch.manual_seed(0)
    tuning = module.TuningModule(GPT(cfg.model, 300), cfg, torch.float32, False)
    optimizer, losses = tuning.configure_optimizers(), []
    tokens = torch.randint(0, 300, (4, 33))
    targets = tokens[:, 1:].masked_fill(torch.rand(4, 32) < 0.5, -100)
    for _ in range(8):
        loss = tuning.training_step((tokens[:, :-1], targets), 0)
        loss.backward()
        tuning.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(tuning.losses[-1]))
    assert losses[-1] < losses[0] - 0.1, "it learns a batch by heart"

"""Worktrees, edits and what is refused, in real git repositories."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from standin import bonus, make_project, run_git, values

from agent import workspace
from agent.journal import Edit, Journal, Proposal, Trial
from agent.settings import StudyError, read_plan
from agent.target import VAL
from agent.workspace import Refused


@pytest.fixture
def project(tmp_path) -> Path:
    return make_project(tmp_path / "project")


@pytest.fixture
def tree(project):
    """A worktree of the project's only commit."""
    commit = workspace.base_commit(project)
    with workspace.worktree(project, project / "outputs/tree", commit) as tree:
        yield tree


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory):
    """One worktree for many refusals."""
    project = make_project(tmp_path_factory.mktemp("shared") / "project")
    with workspace.worktree(project, project / "outputs/tree", "HEAD") as tree:
        yield tree


def edit(path: str, search: str = 'BEHAVIOUR = "ok"', replace: str = "BEHAVIOUR = 1") -> Proposal:
    edits = [Edit(path=path, search=search, replace=replace)]
    return Proposal(title="t", hypothesis="h", source="test", edits=edits)


def in_two(path: str, *texts: str) -> Proposal:
    """Search, replace, search, replace."""
    first, second = edit(path, *texts[:2]), edit(path, *texts[2:])
    return replace(first, edits=first.edits + second.edits)


def test_applied_proposal_is_a_commit_on_top_that_touches_only_its_files(project, tree):
    proposal = bonus(0.0, 0.5)
    proposal.overrides = {"optim.matrix_lr": 0.03, "model.mlp_ratio": 5}
    applied = workspace.apply(tree, proposal, "trial 001: bonus")
    touched = run_git(tree, "diff", "--name-only", "HEAD~1", applied.commit).splitlines()
    assert touched == ["conf/trial/champion.yaml", "src/nightshift/model.py"]
    assert applied.config.optim.matrix_lr == 0.03 and applied.config.model.mlp_ratio == 5.0
    assert "+BONUS = 0.5" in applied.diff and applied.lines_added == 5
    assert run_git(tree, "log", "-1", "--format=%an %s%n%b") == (
        "nightshift trial 001: bonus\nIt will."
    )
    champion = (tree / "conf/trial/champion.yaml").read_text()
    assert champion.startswith("# @package _global_\n# Accepted.\n")


def test_overrides_add_to_those_of_the_incumbent(tree):
    workspace.apply(tree, values(optim__matrix_lr=0.03), "1")
    config = workspace.apply(tree, values(optim__momentum=0.9), "2").config
    assert (config.optim.matrix_lr, config.optim.momentum) == (0.03, 0.9)


def test_going_back_to_what_conf_says_anyway_removes_the_line(tree):
    workspace.apply(tree, values(optim__matrix_lr=0.03, model__softcap=20.0), "1")
    applied = workspace.apply(tree, values(optim__matrix_lr=0.02), "2")
    assert applied.config.optim.matrix_lr == 0.02
    assert (applied.lines_added, applied.lines_removed) == (0, 2)
    champion = (tree / "conf/trial/champion.yaml").read_text()
    assert "softcap: 20.0" in champion and "optim" not in champion


@pytest.mark.parametrize(
    ("proposal", "words"),
    [
        (values(seed=7), "override seed: not editable"),
        (values(budget__amount=9000.0), "override budget.amount: not editable"),
        (values(evaluate__max_bytes=1000), "not editable"),
        (values(optim__matrix_lrr=1.0), "Nearest: optim.matrix_lr"),
        (values(optim=3), "override optim: there is no such key"),
        (values(optim__matrix_lr="fast"), "optim.matrix_lr ('fast')"),
        (values(optim__matrix_lr=-1.0), "optim.matrix_lr (-1.0)"),
        (values(train__batch_tokens=5001), "train.batch_tokens (5001) must be a multiple"),
        (values(tokenizer__split_pattern="${model.mlp}"), "override tokenizer.split_pattern"),
        (edit("src/nightshift/fixed/evaluate.py"), "not editable"),
        (edit("src/nightshift/pretrain.py"), "not editable"),
        (edit("conf/budget/20s.yaml"), "not editable"),
        (edit("conf/trial/champion.yaml"), "not editable"),
        (edit("conf/model/../budget/20s.yaml"), "not editable"),
        (edit("src/nightshift/../nightshift/model.py"), "not editable"),
        (edit("./src/nightshift/model.py"), "not editable"),
        (edit("/etc/passwd"), "not editable"),
        (edit("src/nightshift/optim.py/"), "not editable"),
        (edit("conf/model/missing.yaml"), "there is no file"),
        (edit("src/nightshift/model.py", search="absent"), "occurs 0 times"),
        (edit("src/nightshift/model.py", search=""), "occurs 0 times"),
        (edit("src/nightshift/model.py", search="B"), "occurs 2 times"),
        (edit("src/nightshift/model.py", replace="def ("), "is not Python after the edits"),
        (edit("conf/optim/muon.yaml", "0.02\nemb", "${seed}\nemb"), "plain values"),
        (edit("conf/model/tiny.yaml", "depth: 4", "# @package _global_\nseed: 4"), "plain values"),
        (edit("conf/optim/muon.yaml", "0.02\nemb", '"\\x24{oc.env:KEY}"\nemb'), "plain values"),
        (edit("conf/optim/muon.yaml", "0.02\nemb", '0.02\n"def\\x61ults": [x]\nemb'), "defaults"),
        (in_two("conf/optim/muon.yaml", "0.02\nemb", "$\nemb", "\nemb", "{seed}\nemb"), "2 of 2"),
        (values(optim__matrix_lr="${oc.env:KEY}"), "'${oc.env:KEY}' is no plain value"),
        (values(tokenizer__split_pattern="a${oc.env:KEY}"), "is no plain value"),
        (values(filter__mixture=[{"match": "${oc.env:KEY}", "weight": 1}]), "is no plain value"),
        (edit("conf/model/tiny.yaml", "depth: 4", "dept: 4"), "model.depth"),
        (edit("conf/model/tiny.yaml", "depth: 4", "depth: ["), "not valid YAML"),
    ],
)
def test_proposal_that_breaks_a_rule_is_refused_in_one_line(shared_tree, proposal, words):
    tree = shared_tree
    run_git(tree, "reset", "--quiet", "--hard")
    head = run_git(tree, "rev-parse", "HEAD")
    with pytest.raises(Refused) as refusal:
        workspace.apply(tree, proposal, "t")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert run_git(tree, "rev-parse", "HEAD") == head


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.manual_seed(3)",
        "import torch\ntorch.cuda.manual_seed_all(3)",
        "import torch\ntorch.Generator().manual_seed(3)",
        "from torch import manual_seed",
        "from lightning import seed_everything as noise",
        "import numpy as np\nrandom = np.random.default_rng(3)",
        "import random\nrandom.seed(3)",
        "import torch\ntorch.set_rng_state(torch.zeros(9))",
    ],
)
def test_an_edit_that_seeds_a_random_generator_is_refused(shared_tree, code):
    run_git(shared_tree, "checkout", "--quiet", "--", ".")
    with pytest.raises(Refused, match="seeds belong to the harness"):
        workspace.apply(shared_tree, edit("src/nightshift/model.py", replace=code), "t")


@pytest.mark.parametrize(
    "code",
    ["TEXT = '" + "we must " * 300 + "'", "TABLE = [" + "1, " * 600 + "]", "N = " + "9" * 6000],
    ids=["text", "table", "number"],
)
def test_code_that_carries_data_is_refused(shared_tree, code):
    run_git(shared_tree, "checkout", "--quiet", "--", ".")
    with pytest.raises(Refused, match="code may not carry data|is not Python"):
        workspace.apply(shared_tree, edit("src/nightshift/model.py", replace=code), "t")


@pytest.mark.parametrize(
    "code",
    ["import torch\nx = torch.randn(3)", "seed_words = 'manual_seed'", "def unseeded(): return 1"],
)
def test_drawing_random_numbers_is_fine(tree, code):
    workspace.apply(tree, edit("src/nightshift/model.py", replace=code), "t")


def test_the_digests_of_git_are_those_of_the_files(tree):
    from nightshift.fixed.result import code_digests

    start = run_git(tree, "rev-parse", "HEAD")
    assert workspace.code_of(tree, start) == (start, *code_digests(tree))
    workspace.apply(tree, bonus(0.0, 0.5), "t")
    commit, fixed, editable = workspace.code_of(tree, start)
    assert (fixed, editable) == code_digests(tree)
    assert commit == run_git(tree, "rev-parse", "HEAD")
    assert editable != workspace._digests_at(tree, start, VAL)[1]


def test_a_commit_that_touches_fixed_code_is_refused(tree):
    start = run_git(tree, "rev-parse", "HEAD")
    (tree / "src/nightshift/fixed/evaluate.py").write_text("print('val_bpb 0.1')")
    workspace._commit(tree, "evil", ["src"])
    with pytest.raises(Refused, match="differ from the study's base commit"):
        workspace.code_of(tree, start)


def test_value_file_that_reaches_into_another_group_is_refused(project, tree):
    """A comment on the first line could already move a file's package: here the base has one."""
    path = tree / "conf/model/tiny.yaml"
    text = path.read_text().replace("\n", "\n  ").rstrip()
    path.write_text(f"# @package _global_\nmodel:\n  {text}\n")
    run_git(tree, "commit", "-qam", "move", "--author=a <a@b>")
    with pytest.raises(Refused, match="seed .1. would become 5: it is fixed in a study"):
        workspace.apply(tree, edit("conf/model/tiny.yaml", "model:", "seed: 5\nmodel:"), "t")


def test_edit_through_a_symbolic_link_is_refused(tree):
    (tree / "src/nightshift/optim.py").unlink()
    os.symlink(tree / "src/nightshift/pretrain.py", tree / "src/nightshift/optim.py")
    with pytest.raises(Refused, match="symbolic link"):
        workspace.apply(tree, edit("src/nightshift/optim.py", "import", "import"), "t")


def test_line_endings_and_other_bytes_of_an_edited_file_stay(tree):
    path = tree / "src/nightshift/optim.py"
    path.write_bytes(b"A = 1\r\nB = '\xc3\xa4'\r\n")
    run_git(tree, "commit", "-qam", "crlf", "--author=a <a@b>")
    workspace.apply(tree, edit("src/nightshift/optim.py", "A = 1", "A = 2"), "t")
    assert path.read_bytes() == b"A = 2\r\nB = '\xc3\xa4'\r\n"


def test_digest_sees_values_and_code_but_not_comments(tree):
    digests = [workspace.state_digest(tree, workspace.resolve(tree))]
    for proposal in (
        values(optim__matrix_lr=0.03),
        edit("src/nightshift/model.py", 'BEHAVIOUR = "ok"', 'BEHAVIOUR = "ok"  # fine'),
        edit("src/nightshift/model.py", "BONUS = 0.0", "BONUS = 0.1"),
    ):
        digests.append(workspace.apply(tree, proposal, "t").digest)
    assert digests[1] == digests[2] and len(set(digests)) == 3


def test_first_commit_makes_the_branch_alone_say_what_the_baseline_ran(project, tree):
    asked = ["optim.matrix_lr=0.05", "budget=5min", "seed=9", "corpus.max_documents=40"]
    plan = read_plan(project / "conf", [*asked, "tracking=off", "runtime.num_threads=1"])
    workspace.write_first_commit(tree, plan.config, "first", {})
    resolved = workspace.resolve(tree)
    assert workspace.reproducible(resolved.model_dump()) == workspace.reproducible(
        plan.config.model_dump()
    )
    champion = (tree / "conf/trial/champion.yaml").read_text()
    assert "max_documents: 40" in champion and "num_threads" not in champion
    assert "tracking" not in champion and "momentum" not in champion


def test_user_branch_index_and_working_tree_are_never_touched(project):
    (project / "src/nightshift/model.py").write_text("half an idea")
    (project / "notes.txt").write_text("mine")
    run_git(project, "add", "notes.txt")
    index, status = (project / ".git/index").read_bytes(), run_git(project, "status", "--porcelain")
    head = run_git(project, "rev-parse", "HEAD")
    with workspace.worktree(project, project / "outputs/tree", head) as tree:
        workspace.apply(tree, bonus(0.0, 0.5), "t")
    assert (project / ".git/index").read_bytes() == index
    assert run_git(project, "status", "--porcelain") == status
    assert run_git(project, "symbolic-ref", "HEAD") == "refs/heads/main"
    assert run_git(project, "rev-parse", "main") == head
    assert workspace.uncommitted(project) == ["src/nightshift/model.py"]


def test_hooks_and_signing_of_the_user_do_not_run(project):
    hook = project / ".git/hooks/pre-commit"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    run_git(project, "config", "commit.gpgsign", "true")
    run_git(project, "config", "gpg.program", "/bin/false")
    with workspace.worktree(project, project / "outputs/tree", "HEAD") as tree:
        workspace.apply(tree, bonus(0.0, 0.5), "t")


def test_worktree_left_by_a_kill_is_made_again_and_those_of_others_stay(project, tmp_path):
    run_git(project, "worktree", "add", "--detach", "--quiet", str(tmp_path / "mine"))
    folder = project / "outputs/studies/first/trials/001/worktree"
    run_git(project, "worktree", "add", "--detach", "--quiet", str(folder))
    with workspace.worktree(project, folder, "HEAD") as tree:
        assert (tree / "conf").is_dir()
    run_git(project, "worktree", "add", "--detach", "--quiet", str(folder))
    workspace.remove_worktrees_under(project, project / "outputs/studies/first")
    assert not folder.exists()
    assert len(workspace.worktrees(project)) == 2 and (tmp_path / "mine/conf").is_dir()


def test_lock_left_by_a_killed_git_does_not_stop_the_study(project):
    lock = project / ".git/refs/heads/study/first.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    workspace.remove_stale_locks(project, "first")
    run_git(project, "update-ref", "refs/heads/study/first", "HEAD")


def test_branch_follows_the_journal_but_never_under_the_feet_of_the_user(project, tmp_path):
    first = run_git(project, "rev-parse", "HEAD")
    with workspace.worktree(project, project / "outputs/tree", first) as tree:
        kept = workspace.apply(tree, bonus(0.0, 0.5), "trial 000").commit
    journal = Journal(tmp_path / "journal.jsonl")
    assert workspace.settle(project, "first", journal, first) is None
    assert workspace.refs_of(project, "first") == {"refs/heads/study/first": first}
    journal.append(
        Trial(
            number=0,
            proposal=bonus(0.0, 0.5),
            parent=None,
            status="ok",
            decision="keep",
            reason="",
            commit=kept,
        )
    )
    run_git(project, "checkout", "--quiet", "study/first")
    assert "is checked out at" in workspace.settle(project, "first", journal, first)
    assert run_git(project, "status", "--porcelain") == ""
    run_git(project, "checkout", "--quiet", "main")
    assert workspace.settle(project, "first", journal, first) is None
    refs = {"refs/heads/study/first": kept, "refs/trials/first/000": kept}
    assert workspace.refs_of(project, "first") == refs


def test_a_folder_without_git_or_without_a_commit_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="is not the top of a git repository"):
        workspace.base_commit(tmp_path)
    run_git(tmp_path, "init", "--quiet")
    with pytest.raises(StudyError, match="has no commit yet"):
        workspace.base_commit(tmp_path)

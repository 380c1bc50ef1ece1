"""A study that begins from an earlier one's champion and remembers its trials."""

import json
import shutil
from pathlib import Path

import pytest
from standin import bonus, journal_of, make_project, overrides, run_git
from test_proposers import a_trial, context

from agent import after, loop
from agent.journal import Edit, Proposal
from agent.promotion import Arm, Order, Promotion, append_promotion
from agent.proposers import recipes
from nightshift.fixed.config import ConfigError


def given(trials: int, *more: str) -> list[str]:
    """A second study's command line: no choice of a file."""
    settings = [o for o in overrides(trials) if o != "budget=smoke"]
    return [*settings, "study.name=second", "study.after=first", *more]


def add(project: Path, decision: str, proposal: Proposal) -> None:
    """A trial of `first` as a study would have left it: a commit and a line."""
    model = project / "src/nightshift/model.py"
    for one in proposal.edits if decision == "keep" else ():
        model.write_text(model.read_text().replace(one.search, one.replace))
    run_git(
        project, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-aqm", proposal.title,
        "--allow-empty",
    )  # fmt: skip
    journal = journal_of(project)
    trial = a_trial(len(journal), proposal, 2.0, decision)
    trial.parent = journal.incumbent and journal.incumbent.number
    trial.commit = run_git(project, "rev-parse", "HEAD")
    journal.append(trial)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A study with one keep and one discard."""
    project = make_project(tmp_path_factory.mktemp("first") / "p")
    add(project, "keep", Proposal(title="baseline", hypothesis="", source="baseline"))
    add(project, "keep", bonus(0.0, 0.5))
    add(project, "discard", bonus(0.5, 0.1))
    return project


@pytest.fixture
def project(first, tmp_path) -> Path:
    return shutil.copytree(first, tmp_path / "p")


def test_it_begins_from_the_champion_s_commit_and_remembers_without_counting(project, capsys):
    seeds = "study.baseline_seeds=[1,2]"
    assert loop.main(given(0, seeds), project) == 0
    folder, champion = project / "outputs/studies/second", journal_of(project).incumbent
    (baseline,) = journal_of(project, "second").trials
    assert baseline.val_bpb == pytest.approx(1.701), "where the first study ended"
    origin = json.loads((folder / "settings.json").read_text())["after"]
    assert origin == {
        "study": "first",
        "trial": 1,
        "promotion": None,
        "commit": champion.commit,
    }
    assert run_git(project, "merge-base", "study/second", champion.commit) == champion.commit
    memory = after.read_memory(folder)
    assert [t.proposal.title for t in memory] == [
        "baseline",
        "bonus 0.0 -> 0.5",
        "bonus 0.5 -> 0.1",
    ]
    said = (folder / "report/summary.md").read_text()
    assert "It began from trial 1 of study first" in said
    # The first study goes on; the second one's origin stays what it was.
    add(project, "keep", bonus(0.5, 0.9))
    assert after.find_origin(folder.parent, "second", "first") == origin
    assert after.find_origin(folder.parent, "third", "first")["trial"] == 3


def test_a_promotion_of_the_incumbent_is_where_the_next_study_begins(project):
    studies = project / "outputs/studies"
    for trial, number in ((2, 1), (1, 2)):  # of a discarded trial, then of the incumbent
        append_promotion(
            studies / "first",
            Promotion(
                number=number, order=Order(trial=trial, seeds=[1], given={}), scale={},
                arms=[Arm(name="baseline")], sigma=None, study_sigma=None, verdicts=[], small={},
                commit=f"{number}" * 40,
            ),
        )  # fmt: skip
    found = after.find_origin(studies, "second", "first")
    assert (found["promotion"], found["commit"]) == (2, "2" * 40)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("study.after=firs", "there is no such study. Nearest: first."),
        ("study.after=second", "a study cannot begin after itself"),
        ("budget=20s", "budget=20s: study.after begins from a champion's values"),
        ("optim.matrix_l=1", "optim.matrix_l=1: there is no such key. Nearest: optim.matrix_lr."),
    ],
)
def test_what_it_cannot_begin_from_is_one_line(first, capsys, argument, said):
    assert loop.main(given(0, argument), first) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (first / "outputs/studies/second").exists()


def test_memory_is_handed_on_from_study_to_study(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / after.MEMORY_FILE).write_text('{"older": 1}\n')
    (tmp_path / "first/journal.jsonl").write_text('{"old": 1}\n{"cut')
    (tmp_path / "second").mkdir()
    after.remember(tmp_path, tmp_path / "second", {"study": "first"})
    assert (tmp_path / "second" / after.MEMORY_FILE).read_text() == '{"older": 1}\n{"old": 1}\n'


def test_recipes_that_an_earlier_study_kept_are_left_out_and_its_failures_come_last(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.yaml").write_text(
            f"title: {name}\nhypothesis: h\nedits: [{{path: x.py, search: s, replace: {name}}}]\n"
        )

    def earlier(title, decision):
        edits = [Edit(path="x.py", search="s", replace="r")]
        proposal = Proposal(title=title, hypothesis="h", source="recipes", edits=edits)
        return a_trial(1, proposal, 2.0, decision)

    memory = [earlier("a", "keep"), earlier("b", "discard"), earlier("c", "discard")]
    journal_trials, proposed = [], []
    for _ in range(4):
        now = context(tmp_path, trials=journal_trials, memory=memory, read=lambda path: "s")
        recipe = recipes.propose(now, folder)
        if recipe is not None:
            proposed.append(recipe.title)
            journal_trials.append(a_trial(1, recipe, 2.0))
    assert proposed[0] == "d" and sorted(proposed[1:]) == ["b", "c"]


def test_without_after_a_plan_is_read_as_before(tmp_path):
    project = make_project(tmp_path / "p")
    assert after.read_plan_with_origin(project, ["study.after=null"]).origin is None
    with pytest.raises(ConfigError, match="study.trial=2: there is no such key"):
        after.read_plan_with_origin(project, ["study.trial=2"])

"""The sampler, the recipes and their mixture."""

from pathlib import Path

import pytest

from agent.journal import Edit, Journal, Proposal, Run, Trial
from agent.proposers import Context, mixed, recipes, sampler
from agent.settings import Bounds, compose, read_plan
from nightshift.fixed.config import CONF, ConfigError, check, flatten, unflatten

VALUES = check(compose(CONF, "config", ["trial=none"])).model_dump()
FLAT = flatten(VALUES)
SPACE = {
    key: check(value, Bounds)
    for key, value in {
        "optim.matrix_lr": {"low": 0.005, "high": 0.08, "log": True},
        "optim.momentum": {"low": 0.85, "high": 0.98},
        "model.depth": {"choices": [3, 4, 5, 6]},
        "train.batch_tokens": {"choices": [1000, 2048, 4096, 8192]},  # 1000 is no multiple
    }.items()
}


def context(tmp_path: Path, number: int = 1, trials=(), **changes) -> Context:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.trials += [a_trial(0, Proposal(title="b", hypothesis="", source="baseline"), 2.3)]
    journal.trials[0].parent = None
    journal.trials += trials
    given = {
        "number": number,
        "seed": 0,
        "journal": journal,
        "values": VALUES,
        "baseline": VALUES,
        "space": SPACE,
        "sources": {"sampler": 1, "recipes": 1},
        "read": lambda path: None,
    }
    return Context(**given | changes)


def a_trial(number: int, proposal: Proposal, val_bpb: float, decision: str | None = None) -> Trial:
    return Trial(
        number=number,
        proposal=proposal,
        parent=0,
        status="ok",
        decision=decision or ("discard" if number else "keep"),
        reason="",
        val_bpb=val_bpb,
        runs=[Run(seed=1, status="ok", val_bpb=val_bpb)],
    )


def test_sampler_changes_few_keys_of_the_space_validly_and_never_to_the_same(tmp_path):
    for number in range(1, 60):
        proposal = sampler.propose(context(tmp_path, number))
        assert 1 <= len(proposal.overrides) <= 3
        for key, value in proposal.overrides.items():
            assert value != FLAT[key]
            bounds = SPACE[key]
            assert value in bounds.choices if bounds.choices else bounds.low <= value <= bounds.high
        check(unflatten(FLAT | proposal.overrides))
        assert proposal.kind == "config"


def test_sampler_repeats_itself_for_the_same_seed_number_and_journal(tmp_path):
    def overrides(number, seed):
        return sampler.propose(context(tmp_path, number, seed=seed)).overrides

    assert overrides(3, 0) == overrides(3, 0)
    assert len({str(overrides(n, s)) for n in (1, 2, 3) for s in (0, 1)}) > 3


def test_sampler_stays_near_the_incumbent(tmp_path):
    space = {"optim.matrix_lr": SPACE["optim.matrix_lr"], "model.depth": SPACE["model.depth"]}
    proposals = [sampler.propose(context(tmp_path, n, space=space)) for n in range(1, 60)]
    rates = [p.overrides.get("optim.matrix_lr", 0.02) for p in proposals]
    assert 0.007 < min(rates) < 0.013 and 0.03 < max(rates) < 0.054
    assert {p.overrides.get("model.depth", 4) for p in proposals} == {3, 4, 5}


def test_sampler_comes_back_from_outside_of_its_bounds(tmp_path):
    space = {"optim.matrix_lr": check({"low": 0.1, "high": 0.2, "log": True}, Bounds)}
    rates = [
        sampler.propose(context(tmp_path, n, space=space)).overrides["optim.matrix_lr"]
        for n in range(1, 20)
    ]
    assert all(0.1 <= rate <= 0.2 for rate in rates)


def test_sampler_keeps_whole_numbers_whole(tmp_path):
    space = {"optim.num_polar_steps": check({"low": 1, "high": 12}, Bounds)}
    values = [
        sampler.propose(context(tmp_path, n, space=space)).overrides["optim.num_polar_steps"]
        for n in range(1, 20)
    ]
    assert all(isinstance(value, int) and 1 <= value <= 12 for value in values)


def test_sampler_rounds_and_says_what_it_changes(tmp_path):
    titles = [sampler.propose(context(tmp_path, n)).title for n in range(1, 40)]
    assert any(title.startswith("matrix_lr 0.02 -> 0.0") for title in titles)
    values = [sampler.propose(context(tmp_path, n)).overrides for n in range(1, 40)]
    rates = [v["optim.matrix_lr"] for v in values if "optim.matrix_lr" in v]
    assert all(rate == float(f"{rate:.2g}") for rate in rates)


def test_sampler_does_not_repeat_what_was_tried_from_this_incumbent(tmp_path):
    space = {"model.depth": check({"choices": [4, 5]}, Bounds)}
    only = Proposal(title="", hypothesis="", source="sampler", overrides={"model.depth": 5})
    assert sampler.propose(context(tmp_path, space=space)).overrides == {"model.depth": 5}
    tried = context(tmp_path, 2, [a_trial(1, only, 2.1)], space=space)
    assert sampler.propose(tried) is None


def test_sampler_learns_from_the_journal(tmp_path):
    """With a clear valley at 0.03 most later proposals of the rate fall near it."""
    space = {"optim.matrix_lr": SPACE["optim.matrix_lr"]}
    rates = [0.006, 0.008, 0.01, 0.013, 0.017, 0.022, 0.026, 0.029, 0.031, 0.035, 0.045, 0.06]
    trials = [
        a_trial(
            n,
            Proposal(title="", hypothesis="", source="sampler", overrides={"optim.matrix_lr": r}),
            2 + 30 * abs(r - 0.03),
        )
        for n, r in enumerate(rates, 1)
    ]
    proposals = [
        sampler.propose(context(tmp_path, n, trials, space=space)).overrides["optim.matrix_lr"]
        for n in range(13, 23)
    ]
    assert sum(0.02 <= rate <= 0.045 for rate in proposals) >= 8


RECIPE = """\
title: "bigger bonus"
hypothesis: It should help.
edits:
  - path: src/nightshift/model.py
    search: "BONUS = 0.0"
    replace: "BONUS = 0.1"
"""


def library(tmp_path: Path, *titles: str) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir(exist_ok=True)
    for title in titles:
        (folder / f"{title}.yaml").write_text(RECIPE.replace("bigger bonus", title))
    return folder


def test_recipes_are_each_proposed_once_in_an_order_that_follows_from_the_seed(tmp_path):
    folder = library(tmp_path, *"abcdef")
    orders = []
    for seed in (0, 0, 1):
        tried: list[Trial] = []
        while proposal := recipes.propose(
            context(tmp_path, trials=tried, seed=seed, read=lambda _: "BONUS = 0.0"), folder
        ):
            tried.append(a_trial(len(tried) + 1, proposal, 2.0))
        orders.append([t.proposal.title for t in tried])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list("abcdef")


def test_recipe_that_no_longer_fits_is_left_out_with_a_note(tmp_path):
    notes: list[str] = []
    folder = library(tmp_path, "a")
    for text in (None, "BONUS = 0.1", "BONUS = 0.0\nBONUS = 0.0"):
        seen = context(tmp_path, read=lambda _, text=text: text, note=notes.append)
        assert recipes.propose(seen, folder) is None
    assert "there is no src/nightshift/model.py" in notes[0]
    assert "occurs 0 times" in notes[1] and "occurs 2 times" in notes[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("title: [unclosed", "is not a recipe"),
        ("just text", "is not a recipe"),
        ("title: a\nhypothesis: b\n", "no 'edits'"),
        ("title: a\nhypothesis: b\nedits: []\n", "no edit"),
        (RECIPE.replace("replace:", "replacement:"), "replacement"),
        (RECIPE.replace('"BONUS = 0.0"', "3"), "must be text"),
        (RECIPE + "risk: high\n", "unknown key 'risk'"),
    ],
)
def test_malformed_recipe_is_one_line_that_names_the_file(tmp_path, text, words):
    folder = library(tmp_path, "good")
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        recipes.read_recipes(folder)
    assert "bad.yaml" in str(error.value) and words in str(error.value)
    assert "\n" not in str(error.value)


def test_every_recipe_of_the_library_fits_the_code_of_this_checkout():
    for recipe in recipes.read_recipes():
        texts: dict[str, str] = {}
        for edit in recipe.edits:
            text = texts.get(edit.path) or (CONF.parent / edit.path).read_text()
            assert text.count(edit.search) == 1, f"{recipe.title}: {edit.path}"
            texts[edit.path] = text.replace(edit.search, edit.replace)


def test_a_source_with_nothing_left_passes_its_turn(tmp_path, monkeypatch):
    monkeypatch.setitem(mixed.PROPOSERS, "recipes", lambda context: None)
    assert mixed.propose(context(tmp_path, 2)).source == "sampler"
    alone = context(tmp_path, 2, sources={"recipes": 1, "sampler": 0})
    assert mixed.propose(alone) is None


def test_edit_objects_come_back_from_a_recipe(tmp_path):
    (recipe,) = recipes.read_recipes(library(tmp_path, "a"))
    edit = Edit(path="src/nightshift/model.py", search="BONUS = 0.0", replace="BONUS = 0.1")
    assert recipe.edits == [edit] and recipe.kind == "code"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("study.trialz=3", "study.trials"),
        ("study.trials=-1", "study.trials"),
        ("study.trials=many", "study.trials"),
        ("study.name=../x", "study.name"),
        ("study.name=a.lock", "study.name"),
        ("study.baseline_seeds=[1]", "study.baseline_seeds"),
        ("study.baseline_seeds=[1,1]", "study.baseline_seeds"),
        ("study.max_seeds=2", "study.max_seeds"),
        ("study.false_keeps=0", "study.false_keeps"),
        ("+study.sources.oracle=1", "study.sources.oracle"),
        ("study.sources={oracle: 1}", "a key in it does not exist"),
        ("study.sources={sampler: 0, recipes: 0, combine: 0, simplify: 0}", "study.sources"),
        ("study.outside_wait_s=-1", "study.outside_wait_s"),
        ("+study.extra=1", "study.extra"),
        ("optim.matrix_lrr=1", "optim.matrix_lr"),
        ("optim.matrix_lr=-1", "optim.matrix_lr"),
        ("space={seed: {low: 0, high: 9}}", "space.seed: not editable"),
        ("space={optim.matrix_lrr: {low: 0.1, high: 0.9}}", "Nearest: optim.matrix_lr"),
        ("space={optim.matrix_lr: {low: 0.9, high: 0.1}}", "low must be below high"),
        ("space={optim.matrix_lr: {low: 0, high: 0.1, log: true}}", "above 0"),
        ("space={optim.eps: {low: 1}}", "needs"),
        ("space={model.depth: {choices: [4]}}", "at least two"),
        ("space={optim.matrix_lr: {lo: 1}}", "space.optim.matrix_lr.lo"),
        ("study={trials: 1", "study={trials: 1"),
    ],
)
def test_wrong_study_settings_are_one_line_each(override, words):
    # `space=` names a group choice in Hydra's grammar; a dict needs the package of the whole.
    override = (
        override.replace("space={", "+space={") if override.startswith("space=") else override
    )
    with pytest.raises(ConfigError) as error:
        read_plan(CONF, [override])
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_mistakes_in_all_three_parts_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        read_plan(CONF, ["study.trials=-1", "optim.matrix_lr=-1"])
    assert "study.trials" in str(error.value) and "optim.matrix_lr" in str(error.value)


def test_further_seeds_are_the_lowest_that_the_baseline_does_not_have():
    plan = read_plan(CONF, ["study.baseline_seeds=[5,2]", "study.max_seeds=6"])
    assert plan.study.seeds == [5, 2, 1, 3, 4, 6]

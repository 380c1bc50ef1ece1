"""Where proposals are put: stems, plateaus and merged changes, on journals that are made up."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from standin import behave, bonus, journal_of, make_project, overrides, run_git, script
from test_combine import MODEL, change
from test_proposers import VALUES, context

from agent import strategy
from agent.decide import Rule, decide, level_of
from agent.end import End
from agent.journal import Journal, Proposal, Run, Trial, proposal_from_json
from agent.loop import main
from agent.proposers import Context, mixed, recipes, sampler
from agent.settings import Bounds, differences, read_plan
from agent.strategy import ISLANDS, MAX_CHANGES, MIGRATION, TIRED
from agent.view import summary
from nightshift.fixed.config import CONF, ConfigError, flatten

TEXT = "A = 1\nB = 1\nC = 1\nD = 1\n"
SD = 0.001


def a_trial(number, proposal, estimate, decision="discard", parent=0, status="ok") -> Trial:
    score = 2.3 - (estimate or 0.0)
    return Trial(
        number=number,
        proposal=proposal,
        parent=parent,
        status=status,
        decision=decision,
        reason="",
        estimate=estimate,
        low=None if estimate is None else estimate - 2.15 * SD,
        high=None if estimate is None else estimate + 2.15 * SD,
        val_bpb=score,
        differences=[] if estimate is None else [estimate],
        gain=estimate,
        runs=[Run(seed=1, status="ok", val_bpb=score)],
    )


def on(number: int, proposal: Proposal, *edits: Proposal) -> Proposal:
    """The proposal as it is on top of an earlier trial's, `edits`."""
    whole = [edit for one in edits for edit in one.edits]
    return replace(proposal, builds_on=[number], edits=[*whole, *proposal.edits])


def losers(first: int, count: int) -> list[Trial]:
    return [a_trial(first + n, change(optim__matrix_lr=0.021 + n / 1000), -0.01)
            for n in range(count)]  # fmt: skip


def at(tmp_path, trials, number=None, text=TEXT, **changes) -> Context:
    given = {"strategy": "tree", "read": lambda path: text if path == MODEL else None}
    return context(tmp_path, number or len(trials) + 1, trials, **given | changes)


def stems(now: Context, draws: int = 200) -> list[tuple[int, ...]]:
    return [strategy.next_move(replace(now, seed=s)).stem.builds_on for s in range(draws)]


# ---- nodes and tree ----


def test_greedy_always_proposes_on_the_incumbent(tmp_path):
    now = at(tmp_path, [a_trial(1, change("A = 1", "A = 2"), 0.1)], strategy="greedy")
    assert set(stems(now)) == {()}


def test_a_tree_builds_on_the_trial_that_is_furthest_ahead_and_never_on_a_loser(tmp_path):
    near, fair, bad = (
        a_trial(number, change(f"{name} = 1", f"{name} = 2"), estimate)
        for number, name, estimate in ((1, "A", 0.003), (2, "B", 0.001), (3, "C", -0.01))
    )
    assert set(stems(at(tmp_path, [near, fair, bad]))) == {(1,)}
    assert set(stems(at(tmp_path, [replace(bad, number=1)]))) == {()}


def children(node: Trial, *gains: float) -> list[Trial]:
    """Trials on a node, by what they gain in all."""
    first = node.number + 1
    return [
        a_trial(first + n, on(node.number, change("B = 1", f"B = {2 + n}"), node.proposal), gain)
        for n, gain in enumerate(gains)
    ]


def test_a_child_that_is_ahead_of_its_node_is_the_next_one_to_build_on(tmp_path):
    node = a_trial(1, change("A = 1", "A = 2"), 0.002)
    assert set(stems(at(tmp_path, [node, *children(node, 0.003, 0.001)]))) == {(1, 2)}
    assert set(stems(at(tmp_path, [node, *children(node, 0.001, -0.1)]))) == {(1,)}


def test_a_node_is_left_after_so_many_children_that_were_no_better(tmp_path):
    node, other = a_trial(1, change("A = 1", "A = 2"), 0.002), change("C = 1", "C = 2")
    trials = [node, *children(node, *[0.001] * TIRED)]
    trials.append(a_trial(len(trials) + 1, other, 0.0005))
    places = set(stems(at(tmp_path, trials[:-2])) + stems(at(tmp_path, trials)))
    assert places == {(1,), (1, 2)}, "the node, then the best that is left"


def test_what_several_seeds_did_not_bear_out_is_not_built_on(tmp_path):
    lucky = a_trial(1, change("A = 1", "A = 2"), 0.002)
    lucky.differences, lucky.gain = [0.002, -0.003], -0.0005
    assert set(stems(at(tmp_path, [lucky]))) == {()}


def test_trials_on_an_earlier_incumbent_are_no_nodes(tmp_path):
    node = a_trial(1, change("A = 1", "A = 2"), 0.002)
    kept = a_trial(2, change("B = 1", "B = 3"), 0.01, "keep")
    now = at(tmp_path, [node, kept], text=TEXT.replace("B = 1", "B = 3"))
    assert set(stems(now)) == {()}


# ---- proof ----


RULE = Rule(false_keeps=0.05, equal_within=0.1, min_seeds=3, max_seeds=12)
RUN_S = 10.0


def lab(*trials: Trial) -> Journal:
    """A baseline with sigma 0.01 and these trials after it."""
    journal = Journal(Path("none"))
    baseline = a_trial(
        0, Proposal(title="b", hypothesis="h", source="baseline"), None, "keep", None
    )
    baseline.runs = [
        Run(seed=n, status="ok", val_bpb=x, wall_s=RUN_S)
        for n, x in ((1, 2.3), (2, 2.31), (3, 2.29))
    ]
    journal.trials = [baseline, *trials]
    return journal


def known(number: int) -> Trial:
    """A loser on five seeds: differences scatter by 0.001."""
    trial = a_trial(number, change("C = 1", "C = 9"), -0.005)
    trial.differences = [-0.005, -0.006, -0.004, -0.0055, -0.0045]
    return trial


def bar_at(journal: Journal, proposal: Proposal, **changes):
    proposal.source = changes.pop("source", "recipes")
    trial = a_trial(len(journal), proposal, None)
    trial.differences = list(changes.pop("differences", []))
    trial.runs = [Run(seed=1, status="ok", wall_s=RUN_S)] * len(trial.differences)
    return strategy.bar_of(trial, journal, changes.pop("name", "tree"), RULE, End(**changes))


def test_a_tree_seeks_no_proof_soon_after_a_keep_and_greedy_does_at_once():
    early = decide([0.03], bar_at(lab(), change("A = 1", "A = 2")))
    assert early.kind == "discard" and "ahead, proof is for later" in early.reason
    assert decide([0.002], bar_at(lab(), change("A = 1", "A = 2"), name="greedy")).kind == "more"


def test_what_no_number_of_seeds_would_prove_waits_for_no_proof():
    bar = bar_at(lab(), change("A = 1", "A = 2"))
    tiny = decide([0.0002], bar._replace(rule=RULE._replace(max_seeds=3)))
    assert tiny.kind == "discard" and tiny.reason.startswith("not shown to be better")


def ends(first: int, last: int) -> list[Trial]:
    return [a_trial(n, change("D = 1", f"D = {n}"), -0.01) for n in range(first, last + 1)]


def test_the_longer_a_tree_waited_the_smaller_a_gain_it_has_proven():
    least = [
        bar_at(lab(known(1), *ends(2, waited)), change("A = 1", "A = 2")).prove_from
        for waited in (5, 12, 20, 40)
    ]
    assert least[0] == math.inf and least[1] > least[2] > least[3] > 0.0005


def test_after_a_keep_a_tree_rests_twice_as_long_as_that_took():
    kept = a_trial(12, change("C = 1", "C = 2"), 0.02, "keep")
    least = {
        number: bar_at(lab(*ends(1, 11), kept, *ends(13, number)), change("A = 1", "A = 2"))
        for number in (35, 36)
    }
    assert least[35].prove_from == math.inf > least[36].prove_from


def test_near_its_end_a_study_waits_for_the_last_trial_and_proves_there_what_is_ahead():
    def prove_from(number: int) -> float:
        journal = lab(known(1), *ends(2, number - 1))
        return bar_at(journal, change("A = 1", "A = 2"), trials=40).prove_from

    assert prove_from(19) < 0.1 and prove_from(25) == math.inf and prove_from(40) == -math.inf


@pytest.mark.parametrize(
    ("left_s", "proven"),
    [
        pytest.param(1000, False, id="later is as good"),
        pytest.param(60, True, id="after the next trial it would be too late"),
        pytest.param(15, False, id="it is too late"),
    ],
)
def test_when_its_hours_run_out_a_tree_proves_what_is_ahead_while_there_is_time(left_s, proven):
    """Three seeds: 20 s more than the first run; as much to spare, and a trial."""
    journal = lab(known(1), a_trial(2, change("B = 1", "B = 2"), -0.01))
    for trial in journal.trials[1:]:
        trial.wall_s = 25.0
    seconds = 3 * RUN_S + 2 * 25.0 + RUN_S + left_s
    bar = bar_at(journal, change("A = 1", "A = 2"), differences=[0.05], seconds=seconds)
    assert (decide([0.05], bar).kind == "more") == proven


def test_a_child_no_better_than_what_it_builds_on_ends_after_one_run():
    node = a_trial(1, change("A = 1", "A = 2"), 0.03)
    bar = bar_at(lab(node), on(1, change("B = 1", "B = 2"), node.proposal), trials=2)
    assert decide([0.029], bar).kind == "discard"
    assert "no better than what it builds on (+0.0300)" in decide([0.029], bar).reason
    assert decide([0.031], bar).kind == "more"


@pytest.mark.parametrize("source", ["llm", "outside", "combine", "simplify", "cmaes"])
def test_what_nothing_is_built_on_is_proven_at_once(source):
    assert bar_at(lab(), change("A = 1", "A = 2"), source=source).prove_from == -math.inf


def test_a_front_on_which_nothing_is_better_is_run_again_for_its_proof_once(tmp_path):
    front = a_trial(1, change("A = 1", "A = 2"), 0.03)
    now = at(tmp_path, [front], end=End(2))
    assert strategy.proof_of(replace(now, end=End(3))) is None, "there is time"
    assert strategy.proof_of(replace(now, strategy="greedy")) is None
    proof = strategy.proof_of(now)
    assert proof.proves == 1 and proof.edits == front.proposal.edits
    assert proof.heading == f"{proof.title} (proof of 001)"
    assert mixed.propose(now) == proof
    failed = a_trial(2, proof, 0.001)
    assert strategy.proof_of(at(tmp_path, [front, failed], end=End(3))) is None


def test_what_is_ahead_and_not_proven_is_told_until_it_is_proven_or_something_is_kept():
    first, best = (a_trial(n, change("A = 1", f"A = {n}"), 0.01 * n) for n in (1, 2))
    for trial in (first, best):
        trial.reason = decide(trial.differences, bar_at(lab(), trial.proposal)).reason
    assert strategy.unproven(lab().trials) is None
    assert strategy.unproven(lab(first, best).trials) is best
    proof = a_trial(3, replace(best.proposal, proves=2), 0.001)
    assert strategy.unproven(lab(first, best, proof).trials) is first
    kept = a_trial(4, change("B = 1", "B = 2"), 0.01, "keep")
    assert strategy.unproven(lab(first, best, proof, kept).trials) is None
    text = summary(lab(first, best), Path("none"), "s", None)
    assert "ahead:       trial 2 by +0.0200 on one seed, not proven" in text
    assert "study.trials=3 study.hours=null puts it to the proof" in text


def test_a_proof_goes_on_with_the_share_of_the_error_budget_that_its_trial_had():
    front = a_trial(1, change("A = 1", "A = 2"), 0.03)
    again = replace(front.proposal, proves=1)
    assert bar_at(lab(front, *ends(2, 29)), again).level == level_of(1, RULE.false_keeps)


def test_progress_of_the_front_puts_a_plateau_off(tmp_path):
    node = a_trial(4, change("A = 1", "A = 2"), 0.002)
    late = [*losers(1, 3), node, *losers(5, 2)]
    assert strategy.trials_on_plateau(at(tmp_path, late, plateau_after=3)) is None
    assert strategy.trials_on_plateau(at(tmp_path, late, plateau_after=3, strategy="greedy")) == 3


def test_stems_follow_from_seed_number_and_journal_alone(tmp_path):
    trials = [a_trial(n, change(f"{c} = 1", f"{c} = 2"), 0.001) for n, c in enumerate("ABCD", 1)]
    for name in ("tree", "islands"):
        now = at(tmp_path, trials, strategy=name)
        told = [strategy.next_move(replace(now, number=n)).stem for n in range(1, 40)]
        assert told == [strategy.next_move(replace(now, number=n)).stem for n in range(1, 40)]
    assert stems(at(tmp_path, trials)) == stems(at(tmp_path, trials))


@pytest.mark.parametrize(
    ("trials", "text"),
    [
        pytest.param([], TEXT.replace("A = 1", "A = 7"), id="its text is gone"),
        pytest.param(
            [a_trial(2, change("A = 1", "A = 1\nE = 1"), 0.01, "keep")],
            TEXT + "E = 1\n",
            id="it was kept since and would fit once more",
        ),
    ],
)
def test_a_branch_that_does_not_fit_the_incumbent_is_left_out(tmp_path, trials, text):
    node = a_trial(1, change("A = 1", "A = 1\nE = 1"), 0.1)
    assert (1,) in stems(at(tmp_path, [node])), "it fitted before"
    assert set(stems(at(tmp_path, [node, *trials], text=text))) == {()}


def test_values_that_the_incumbent_has_by_now_are_no_stem(tmp_path):
    lr = flatten(VALUES)["optim.matrix_lr"]
    assert set(stems(at(tmp_path, [a_trial(1, change(optim__matrix_lr=lr), 0.1)]))) == {()}
    assert (1,) in stems(at(tmp_path, [a_trial(1, change(optim__matrix_lr=2 * lr), 0.1)]))


def test_what_failed_or_is_long_already_is_no_stem(tmp_path):
    failed = a_trial(1, change("A = 1", "A = 2"), None, status="crash")
    long = a_trial(2, change("B = 1", "B = 2"), 0.1)
    long.proposal.builds_on = list(range(MAX_CHANGES - 1))
    assert set(stems(at(tmp_path, [failed, long]))) == {()}
    long.proposal.builds_on.pop()
    assert (*long.proposal.builds_on, 2) in stems(at(tmp_path, [failed, long]))


def test_a_proposal_on_a_stem_is_one_change_of_the_incumbent(tmp_path):
    now = at(tmp_path, [node := a_trial(1, change("A = 1", "A = 2", optim__momentum=0.91), 1e-9)])
    there = now.on(strategy.next_move(now).stem)
    assert there.read(MODEL) == TEXT.replace("A = 1", "A = 2") and there.read("other.py") is None
    assert there.values["optim"]["momentum"] == 0.91 != now.values["optim"]["momentum"]
    proposal = mixed.propose(replace(now, sources={"sampler": 1}))
    assert proposal.builds_on == [1] and proposal.edits == node.proposal.edits
    assert proposal.overrides["optim.momentum"] != flatten(VALUES)["optim.momentum"]
    assert len(proposal.overrides) >= 1 and proposal.heading == f"{proposal.title} (on 001)"


def test_sources_that_cannot_use_a_stem_propose_on_the_incumbent(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(
        mixed.PROPOSERS, "combine", lambda c: asked.append(c.stem) or change("B = 1", "B = 2")
    )
    node = a_trial(1, change("A = 1", "A = 2"), 0.1)
    for seed in range(9):
        proposal = mixed.propose(at(tmp_path, [node], seed=seed, sources={"combine": 1}))
        assert proposal.builds_on == [] and len(proposal.edits) == 1
    assert all(stem.is_empty for stem in asked)


# ---- islands ----


def test_an_island_takes_what_is_better_than_its_own_on_its_turn_without_proof(tmp_path):
    estimates = {1: 0.001, 2: -0.002, 3: 0.002, 4: 0.0005, 5: 0.004, 7: 0.003}
    trials = [
        a_trial(n, change("A = 1", f"A = {n + 1}"), estimates.get(n, -1)) for n in range(1, 8)
    ]
    held = strategy.islands(at(tmp_path, trials, strategy="islands"))
    assert [t and t.number for t in held] == [3, 7, 5]
    now = at(tmp_path, trials, strategy="islands")
    turns = [strategy.next_move(replace(now, number=n)).stem.builds_on for n in (8, 9, 10)]
    assert turns == [(5,), (3,), (7,)] and ISLANDS == 3


def test_the_worst_island_goes_on_from_the_best_or_from_the_incumbent(tmp_path):
    trials = [a_trial(n, change("A = 1", f"A = {n + 1}"), n / 1000) for n in (1, 2, 3)]
    trials += losers(4, MIGRATION - 5)
    before = strategy.islands(at(tmp_path, trials, strategy="islands"))
    assert [t.number for t in before] == [3, 1, 2]
    trials += losers(MIGRATION - 1, 1)
    told = [strategy.islands(at(tmp_path, trials, seed=s, strategy="islands")) for s in range(20)]
    assert {tuple(t and t.number for t in held) for held in told} == {(3, 3, 2), (3, None, 2)}


def test_islands_whose_stem_fits_no_more_begin_anew(tmp_path):
    trials = [a_trial(n, change(f"{c} = 1", f"{c} = 2"), 0.002) for n, c in enumerate("ABC", 1)]
    trials.append(a_trial(4, change("A = 1", "A = 3"), 0.01, "keep"))
    now = at(tmp_path, trials, text=TEXT.replace("A = 1", "A = 3"), strategy="islands")
    assert [t and t.number for t in strategy.islands(now)] == [3, None, 2]


# ---- plateau ----


def plateau(tmp_path, trials, **changes) -> Context:
    return at(tmp_path, trials, **{"strategy": "greedy", "plateau_after": 3} | changes)


def moves(tmp_path, trials, **changes) -> list[str]:
    return [
        strategy.next_move(plateau(tmp_path, trials[:n], **changes)).kind
        for n in range(len(trials) + 1)
    ]


def test_a_plateau_alternates_structural_moves_and_ancestors_and_ends_with_a_keep(tmp_path):
    kept = a_trial(1, change(optim__momentum=0.9), 0.01, "keep")
    trials = [kept, *losers(2, 7), a_trial(9, change(optim__beta1=0.9), 0.01, "keep", 1)]
    values = {**VALUES, "optim": {**VALUES["optim"], "momentum": 0.9}}
    assert moves(tmp_path, trials, values=values) == [
        "usual", "usual", "usual", "usual",
        "structural", "branch", "structural", "branch", "structural", "usual",
    ]  # fmt: skip
    assert set(moves(tmp_path, trials, plateau_after=None)) == {"usual"}


def test_on_a_plateau_code_goes_first_and_values_move_over_their_range(tmp_path, monkeypatch):
    trials = losers(1, 3)
    names = ["sampler", "simplify", "recipes", "combine"]
    structural = strategy.next_move(plateau(tmp_path, trials))
    assert strategy.order(names, structural) == ["recipes", "combine", "sampler", "simplify"]
    branch = structural._replace(kind="branch")
    assert strategy.order(names, branch) == ["sampler", "recipes", "simplify", "combine"]
    assert strategy.order(names, strategy.Move()) == names
    monkeypatch.setitem(mixed.PROPOSERS, "recipes", lambda context: None)
    told: list[str] = []
    rates, usual = [], []
    for seed in range(60):
        now = plateau(tmp_path, trials, seed=seed, sources={"sampler": 1}, note=told.append)
        proposal = mixed.propose(now)
        assert proposal.events == ["plateau: 3 trials without a keep"]
        rates.append(proposal.overrides.get("optim.matrix_lr", 0.02))
        before = mixed.propose(replace(now, plateau_after=None))
        assert before.events == []
        usual.append(before.overrides.get("optim.matrix_lr", 0.02))
    assert min(rates) < 0.0065 < min(usual) and max(usual) < 0.054 < max(rates)
    assert set(told) == {
        "plateau: 3 trials without a keep since trial 0; structural moves and earlier ancestors "
        "take turns"
    }


def test_a_branch_from_an_ancestor_takes_out_one_or_two_of_the_newest_keeps(tmp_path):
    kept = [
        a_trial(1, change("A = 1", "A = 2"), 0.01, "keep"),
        a_trial(2, change("A = 2", "A = 3", optim__momentum=0.9), 0.01, "keep", 1),
    ]
    values = {**VALUES, "optim": {**VALUES["optim"], "momentum": 0.9}}
    undone, momentum = [], flatten(VALUES)["optim.momentum"]
    for late in (4, 6):
        trials = [*kept, *losers(3, late)]
        now = plateau(tmp_path, trials, text=TEXT.replace("A = 1", "A = 3"), values=values)
        stem = strategy.next_move(now).stem
        undone.append(stem.undoes)
        assert stem.overrides == {"optim.momentum": momentum}
        assert now.on(stem).read(MODEL) == TEXT.replace("A = 1", "A = 2" if late == 4 else "A = 1")
        proposal = mixed.propose(replace(now, sources={"sampler": 1}))
        assert proposal.undoes == list(stem.undoes) and proposal.edits[: late // 2 - 1]
    assert undone == [(2,), (2, 1)]
    assert proposal.heading == f"{proposal.title} (without 002 and 001)"
    now = plateau(tmp_path, trials, text="another text\n", values=values)
    assert strategy.next_move(now).kind == "structural", "it does not come out any more"


def test_beside_a_loss_only_recipes_that_need_it_are_tried(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, search in (("anywhere", "B = 1"), ("before", "A = 1")):
        (folder / f"{name}.yaml").write_text(
            f"title: {name}\nhypothesis: h\n"
            f"edits: [{{path: {MODEL}, search: {search}, replace: x}}]"
        )
    trials = [a_trial(1, change("A = 1", "A = 2"), 0.01, "keep"), *losers(2, 4)]
    now = plateau(tmp_path, trials, text=TEXT.replace("A = 1", "A = 2"))
    there = now.on(strategy.next_move(now).stem)
    assert there.stem.undoes == (1,)
    assert recipes.propose(there, folder).title == "before"
    assert recipes.propose(now, folder).title == "anywhere"


def test_a_branch_does_not_repeat_what_was_tried_before_the_keep(tmp_path):
    """Without trial 2 the incumbent is the baseline again, from which 5 was tried already."""
    space = {"model.depth": Bounds(choices=[4, 5])}
    trials = [
        a_trial(1, change(model__depth=5), -0.01),
        a_trial(2, change("A = 1", "A = 2"), 0.01, "keep"),
    ]
    now = at(tmp_path, trials, text=TEXT.replace("A = 1", "A = 2"), space=space)
    assert sampler.propose(now).overrides == {"model.depth": 5}, "with trial 2 it is new"
    undo = strategy.ancestor_stem(now, 1)
    assert sampler.propose(now.on(undo)) is None


# ---- in a real worktree ----


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """A keep, a near miss, then two trials of the loop's own: on the near miss, and a branch."""
    project = make_project(tmp_path_factory.mktemp("strategy") / "p")
    near_miss = behave("uneven")
    script(project, [bonus(0.0, 0.5), near_miss])
    assert main(ARGUMENTS, project) == 0
    return project


SOURCES = "study.sources={sampler: 1, recipes: 0, combine: 0, simplify: 0}"
ARGUMENTS = [
    *overrides(5), SOURCES, "study.strategy=tree", "study.plateau_after=1", "study.seed=0",
    "study.baseline_seeds=[1,2]", "study.max_seeds=2", "study.false_keeps=0.0001",
]  # fmt: skip


@pytest.mark.slow
def test_merged_proposals_run_in_the_real_worktree(told):
    kept, near_miss, on_it, wide, branch = journal_of(told).trials[1:]
    assert [t.status for t in (kept, near_miss, on_it, wide, branch)] == ["ok"] * 5
    assert near_miss.decision == "discard" and near_miss.estimate > 0
    assert on_it.proposal.builds_on == [2] and on_it.parent == 1
    model = "src/nightshift/model.py"
    assert 'BEHAVIOUR = "uneven"' in run_git(told, "show", f"{on_it.commit}:{model}")
    assert branch.proposal.undoes == [1] and branch.parent == 1 and branch.gain < -0.4
    assert "BONUS = 0.0" in run_git(told, "show", f"{branch.commit}:{model}")
    assert branch.proposal.events == ["plateau: 2 trials without a keep"], "or a front that moves"
    report = (told / "outputs/studies/first/report/summary.md").read_text()
    assert "(on 002)" in report and "(without 001)" in report


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_with_the_same_proposal(told, tmp_path):
    project = shutil.copytree(told, tmp_path / "p", symlinks=True)
    journal = project / "outputs/studies/first/journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(journal.parent / "trials/005")
    assert main(ARGUMENTS, project) == 0
    again = journal_of(project).trials
    assert len(again) == 6 and again[5].proposal == journal_of(told).trials[5].proposal


@pytest.mark.slow
def test_what_is_ahead_after_one_run_is_proven_by_the_last_trial_and_kept(tmp_path):
    project = make_project(tmp_path / "p")
    script(project, [replace(bonus(0.0, 0.002), source="recipes")])
    sources = "study.sources={sampler: 1, recipes: 0, combine: 0, simplify: 0}"
    assert main([*overrides(2), sources], project) == 0
    ahead, proof = journal_of(project).trials[1:]
    assert (ahead.decision, len(ahead.runs)) == ("discard", 1)
    assert ahead.reason.startswith("ahead, proof is for later: gain +0.0020 over 1 seed")
    assert (proof.decision, len(proof.runs) >= 3, proof.proposal.proves) == ("keep", True, 1)
    assert proof.runs[0].val_bpb == ahead.runs[0].val_bpb and proof.digest == ahead.digest
    report = (project / "outputs/studies/first/report/summary.md").read_text()
    assert "(proof of 001)" in report


def test_old_proposals_have_no_stem_and_old_studies_go_on():
    old = {"title": "t", "hypothesis": "h", "source": "llm", "overrides": {}, "edits": []}
    assert proposal_from_json(old).heading == "t"
    settings = read_plan(CONF, []).as_json()
    del settings["study"]["strategy"], settings["study"]["plateau_after"]
    del settings["study"]["sources"]["cmaes"]
    assert differences(settings, read_plan(CONF, ["study.strategy=islands"])) == []
    assert len(differences(settings, read_plan(CONF, ["study.seed=1"]))) == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "study.strategy=tre",
            "study.strategy ('tre'): must be 'greedy', 'tree' or 'islands'. Nearest: tree.",
        ),
        ("study.plateau_after=0", "study.plateau_after (0): must be greater than or equal to 1."),
    ],
)
def test_a_wrong_choice_is_one_line(override, words):
    with pytest.raises(ConfigError) as error:
        read_plan(CONF, [override])
    assert str(error.value) == words

"""CMA-ES over all values at once, and the results that it and the TPE begin from."""

import json
import math
from dataclasses import replace

from test_combine import change
from test_proposers import FLAT, SPACE, VALUES, a_trial, context

from agent import after
from agent.journal import Edit, Proposal, trial_from_json
from agent.proposers import cmaes, history, sampler
from agent.settings import Bounds
from nightshift.fixed.config import check, flatten, unflatten

WIDE = {
    "optim.matrix_lr": Bounds(low=0.005, high=0.08, log=True),
    "optim.embedding_lr": Bounds(low=0.05, high=1.0, log=True),
    "optim.momentum": Bounds(low=0.85, high=0.98),
    "optim.weight_decay": Bounds(low=0.0, high=0.2),
}
VALLEY = {"optim.matrix_lr": 0.04, "optim.embedding_lr": 0.6, "optim.momentum": 0.95,
          "optim.weight_decay": 0.15}  # fmt: skip


def place(key, value) -> float:
    bounds = WIDE[key]
    there = math.log if bounds.log else float
    return (there(value) - there(bounds.low)) / (there(bounds.high) - there(bounds.low))


def score(values) -> float:
    return 2 + sum((place(k, values[k]) - place(k, VALLEY[k])) ** 2 for k in WIDE)


def ran(number: int, proposal: Proposal, **more):
    return a_trial(number, proposal, score(FLAT | proposal.overrides), **more)


def test_all_numeric_values_move_at_once_validly_and_the_same_way_again(tmp_path):
    now = context(tmp_path, 7, space=SPACE)
    proposal = cmaes.propose(now)
    numeric = {"optim.matrix_lr", "optim.momentum"}
    assert proposal.overrides.keys() == numeric and proposal.source == "cmaes"
    assert all(SPACE[k].low <= proposal.overrides[k] <= SPACE[k].high for k in numeric)
    check(unflatten(FLAT | proposal.overrides))
    assert cmaes.propose(now) == proposal != cmaes.propose(replace(now, seed=1))
    proposal = cmaes.propose(context(tmp_path, 7, space=WIDE))
    assert proposal.title.endswith(" and 1 more") and len(proposal.overrides) == 4


def test_it_has_nothing_to_say_of_one_value_or_of_choices(tmp_path):
    space = {key: SPACE[key] for key in ("optim.matrix_lr", "model.depth")}
    assert cmaes.propose(context(tmp_path, space=space)) is None
    outside = {k: Bounds(low=5.0, high=6.0) for k in ("optim.matrix_lr", "optim.head_lr")}
    assert cmaes.propose(context(tmp_path, space=outside)) is None, "no result lies inside"


def test_generations_come_nearer_to_the_valley(tmp_path):
    trials = [a_trial(0, Proposal(title="b", hypothesis="", source="baseline"), score(FLAT))]
    trials[0].parent = None
    seen = []
    for number in range(1, 6 * cmaes.POPULATION + 1):
        now = context(tmp_path, number, space=WIDE)
        now.journal.trials[:] = trials
        trials.append(ran(number, cmaes.propose(now)))
        seen.append(trials[-1].val_bpb)
    first, last = seen[: 2 * cmaes.POPULATION], seen[-2 * cmaes.POPULATION :]
    assert sum(last) - 2 * len(last) < (sum(first) - 2 * len(first)) / 2


def test_it_begins_where_other_sources_were_best(tmp_path):
    good = change(**{key.replace(".", "__"): value for key, value in VALLEY.items()})
    others = [ran(1, good)] + [ran(n, change(optim__momentum=0.86 + n / 200)) for n in range(2, 12)]
    drawn = [cmaes.propose(context(tmp_path, 12, others, space=WIDE, seed=s)) for s in range(12)]
    far = [cmaes.propose(context(tmp_path, 12, others[1:], space=WIDE, seed=s)) for s in range(12)]
    mean = [sum(score(FLAT | p.overrides) for p in them) / 12 for them in (drawn, far)]
    assert mean[0] - 2 < (mean[1] - 2) / 3


# ---- results ----


def test_results_before_and_after_a_change_of_code_compare(tmp_path):
    lr = [change(optim__matrix_lr=rate) for rate in (0.01, 0.01)]
    code = a_trial(2, change("A = 1", "A = 2"), 2.25, "keep")
    code.estimate = 0.05
    last = a_trial(3, lr[1], 2.15)
    last.parent = 2
    now = context(tmp_path, 4, [a_trial(1, lr[0], 2.2), code, last])
    centred = [(r.values["optim.matrix_lr"], round(r.score, 6)) for r in history.results(now)]
    assert centred == [(0.02, 0.0), (0.01, -0.1), (0.01, -0.1)], "the baseline, trials 1 and 3"


def test_an_edit_and_its_reverse_leave_the_state_where_it_was():
    one, two = change("A = 1", "A = 2"), change("B = 1", "B = 2", optim__momentum=0.9)
    state = history.State({"optim.momentum": 0.95}, [])
    both = history.after(history.after(state, one), two)
    back = Proposal(
        title="", hypothesis="", source="t", overrides={"optim.momentum": 0.95},
        edits=[Edit(path=e.path, search=e.replace, replace=e.search) for e in two.edits],
    )  # fmt: skip
    assert history.after(both, back) == history.after(state, one) != both


def earlier(tmp_path, level: float, best: float):
    """A study whose valley of matrix_lr is at `best`, as after.py hands it on: at another level."""
    folder = tmp_path / "earlier"
    (tmp_path / "now").mkdir()
    now = context(folder, space={"optim.matrix_lr": SPACE["optim.matrix_lr"]})
    baseline, now.journal.trials[:] = now.journal.trials[0], []
    baseline.runs[0].val_bpb = level + abs(math.log(0.02 / best))
    now.journal.append(baseline)
    for number, rate in enumerate([0.006 * 1.17**n for n in range(16)], 1):
        proposal = change(optim__matrix_lr=round(rate, 4))
        now.journal.append(a_trial(number, proposal, level + abs(math.log(rate / best))))
    (folder / "settings.json").write_text(json.dumps({"config": VALUES}))
    after.remember(tmp_path, tmp_path / "now", {"study": "earlier"})
    return after.read_memory(tmp_path / "now")


def test_values_of_an_earlier_study_are_prior_information_whatever_its_level(tmp_path):
    memory = earlier(tmp_path, level=9.0, best=0.04)
    space = {"optim.matrix_lr": SPACE["optim.matrix_lr"]}
    now = context(tmp_path, memory=memory, space=space)
    found = history.results(now)
    assert [r.source for r in found] == ["memory"] * 17 + ["baseline"]
    assert found[0].score == found[-1].score == 0.0
    rates = [sampler.propose(replace(now, seed=s)).overrides["optim.matrix_lr"] for s in range(12)]
    assert sum(0.03 < rate < 0.054 for rate in rates) >= 9, "the first proposal knows the valley"


def test_an_earlier_study_of_another_space_or_target_says_nothing(tmp_path):
    memory = earlier(tmp_path, level=9.0, best=0.04)
    space = {"optim.matrix_lr": SPACE["optim.matrix_lr"], "sft.lr_scale": Bounds(low=0.1, high=1)}
    assert "sft.lr_scale" in flatten(VALUES), "an earlier study knows the values of all groups"
    known = len(history.results(context(tmp_path, memory=memory, space=space)))
    assert known == 18
    del memory[0].changed["sft.lr_scale"]
    assert len(history.results(context(tmp_path, memory=memory, space=space))) == 1
    memory[0].changed, memory[0].chat_bpb = FLAT, 3.0
    assert len(history.results(context(tmp_path, memory=memory, space=space))) == 1


def test_memories_without_their_baseline_s_values_are_left_alone(tmp_path):
    line = {
        "number": 0,
        "proposal": {"title": "b", "hypothesis": "", "source": "baseline", "edits": []},
        "parent": None,
        "status": "ok",
        "decision": "keep",
        "reason": "",
        "val_bpb": 2.0,
        "changed": {},
        "runs": [{"seed": 1, "status": "ok", "val_bpb": 2.0}],
    }
    old = trial_from_json(line)
    assert len(history.results(context(tmp_path, memory=[old], space=WIDE))) == 1

"""Two changes at once, and one change fewer: from a journal that is made up."""

from test_proposers import VALUES, context

from agent.journal import Edit, Proposal, Trial
from agent.proposers import combine, simplify
from nightshift.fixed.config import flatten

MODEL = "src/nightshift/model.py"


def change(search: str = "", replace: str = "", **overrides) -> Proposal:
    edits = [Edit(path=MODEL, search=search, replace=replace)] if search else []
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    title = f"{search} -> {replace}" if search else ", ".join(flat)
    return Proposal(title=title, hypothesis="", source="test", edits=edits, overrides=flat)


def a_trial(number, proposal, estimate, decision="discard", parent=0, status="ok") -> Trial:
    return Trial(
        number=number,
        proposal=proposal,
        parent=parent,
        status=status,
        decision=decision,
        reason="",
        estimate=estimate,
    )


def ask(proposer, tmp_path, trials, text: str = "A = 1\nB = 1\nC = 1\n", values=VALUES):
    return proposer.propose(
        context(tmp_path, len(trials) + 1, trials, read=lambda path: text, values=values)
    )


def test_the_two_best_near_misses_are_combined(tmp_path):
    trials = [
        a_trial(1, change("A = 1", "A = 2"), 0.001),
        a_trial(2, change(optim__matrix_lr=0.03), 0.003),
        a_trial(3, change("B = 1", "B = 2"), 0.002),
        a_trial(4, change("C = 1", "C = 2"), -0.004),
        a_trial(5, change("C = 1", "C = 3"), 0.1, status="crash"),
    ]
    proposal = ask(combine, tmp_path, trials)
    assert proposal.title == "trial 2 with trial 3: optim.matrix_lr; B = 1 -> B = 2"
    assert proposal.overrides == {"optim.matrix_lr": 0.03} and len(proposal.edits) == 1
    assert "+0.0030 and +0.0020" in proposal.hypothesis and proposal.source == "combine"
    assert ask(combine, tmp_path, trials) == proposal, "the same context, the same proposal"
    trials.append(a_trial(6, proposal, 0.004))
    titles = []
    while proposal := ask(combine, tmp_path, trials):
        titles.append(proposal.title[:20])
        trials.append(a_trial(len(trials) + 1, proposal, 0.001))
    assert titles == ["trial 1 with trial 2", "trial 1 with trial 3"], "then nothing is left"


def test_changes_that_get_in_each_others_way_are_not_combined(tmp_path):
    lr = a_trial(1, change(optim__matrix_lr=0.03), 0.003)
    assert ask(combine, tmp_path, [lr]) is None, "one alone was tried already"
    assert ask(combine, tmp_path, [lr, a_trial(2, change(optim__matrix_lr=0.04), 0.003)]) is None
    one, other = change("A = 1", "A = 2"), change("A = 1\nB", "A = 3\nB")
    assert ask(combine, tmp_path, [a_trial(1, one, 0.1), a_trial(2, other, 0.1)]) is None
    depth, heads = change(model__depth=5), change(model__head_dim=7)  # no multiple of 2
    assert ask(combine, tmp_path, [a_trial(1, depth, 0.1), a_trial(2, heads, 0.1)]) is None


def test_an_edit_that_would_fit_twice_is_not_made_twice(tmp_path):
    """It inserts beside what it searches for: on top of itself, and after a keep that has it."""
    insert = change("A = 1", "A = 1\nE = 1")
    on_it = change("A = 1", "A = 1\nE = 1", optim__matrix_lr=0.03)
    on_it.builds_on = [1]
    near_misses = [a_trial(1, insert, 0.003), a_trial(2, on_it, 0.004)]
    assert ask(combine, tmp_path, near_misses) is None
    kept = a_trial(2, on_it, 0.01, "keep")
    assert ask(combine, tmp_path, [near_misses[0], kept], "A = 1\nE = 1\n") is None
    kept.proposal = change("B = 1", "B = 2")
    assert ask(combine, tmp_path, [near_misses[0], kept], "A = 1\nB = 2\n").edits == insert.edits


def test_a_near_miss_is_tried_again_beside_what_was_kept_since(tmp_path):
    trials = [
        a_trial(1, change("A = 1", "A = 2"), 0.002),
        a_trial(2, change("B = 1", "B = 2"), 0.02, "keep"),
        a_trial(3, change("C = 1", "C = 2"), 0.001, parent=2),
    ]
    text = "A = 1\nB = 2\nC = 1\n"
    first = ask(combine, tmp_path, trials, text)
    assert first.title.startswith("trial 1 with trial 3: ")
    trials.append(a_trial(4, first, -0.1, parent=2))
    second = ask(combine, tmp_path, trials, text)
    assert second.title == "trial 1 with what was kept since, 2: A = 1 -> A = 2"
    trials.append(a_trial(5, second, -0.1, parent=2))
    assert ask(combine, tmp_path, trials, text) is None


def kept_three() -> list[Trial]:
    return [
        a_trial(1, change("A = 1\n", "A = 2\nA += 1\n"), 0.02, "keep"),
        a_trial(2, change(optim__matrix_lr=0.03), 0.01, "keep", 1),
        a_trial(3, change("C = 1\n", "C = 1\nC += 1\n"), 0.03, "keep", 2),
    ]


INCUMBENT = "A = 2\nA += 1\nB = 1\nC = 1\nC += 1\n"


def incumbent_values(lr: float) -> dict:
    return VALUES | {"optim": VALUES["optim"] | {"matrix_lr": lr}}


def test_the_weakest_kept_change_is_taken_out_first_and_never_the_last_one(tmp_path):
    trials, values = kept_three(), incumbent_values(0.03)
    first = ask(simplify, tmp_path, trials, INCUMBENT, values)
    assert first.title == "without trial 2: optim.matrix_lr" and first.source == "simplify"
    assert first.overrides == {"optim.matrix_lr": flatten(VALUES)["optim.matrix_lr"]}
    trials.append(a_trial(4, first, -0.01, parent=3))
    second = ask(simplify, tmp_path, trials, INCUMBENT, values)
    (edit,) = second.edits
    assert INCUMBENT.replace(edit.search, edit.replace) == "A = 1\nB = 1\nC = 1\nC += 1\n"
    trials.append(a_trial(5, second, -0.01, parent=3))
    assert ask(simplify, tmp_path, trials, INCUMBENT, values) is None


def test_a_change_that_is_not_there_any_more_or_saves_no_line_stays(tmp_path):
    trials = kept_three()
    trials[0].proposal = change("A = 1\n", "A = 2\n")  # as long as before
    assert ask(simplify, tmp_path, trials, INCUMBENT, incumbent_values(0.05)) is None
    trials[0].proposal = change("A = 1\nA += 1\n", "")  # it removed lines
    assert ask(simplify, tmp_path, trials, INCUMBENT, incumbent_values(0.05)) is None
    trials[0].proposal = change("A = 1\n", "A = 4\nA += 1\n")  # changed since
    assert ask(simplify, tmp_path, trials, INCUMBENT, incumbent_values(0.05)) is None


def test_each_step_of_a_kept_whole_can_be_taken_out_alone_the_last_kept_one_included(tmp_path):
    """Trial 2 on 1 on the baseline, kept as a whole: trial 1 wrote a line that brought nothing."""
    line, rate = (
        change("A = 1\n", "A = 1\nA += 1\n"),
        change("B = 1", "B = 2", optim__matrix_lr=0.03),
    )
    whole = change("A = 1\n", "A = 1\nA += 1\n", optim__matrix_lr=0.03)
    whole.edits += rate.edits
    whole.builds_on = [1]
    trials = [a_trial(1, line, 0.0001), a_trial(2, whole, 0.02, "keep")]
    for trial, difference in zip(trials, (0.0001, 0.02), strict=True):
        trial.differences = [difference]
    text = "A = 1\nA += 1\nB = 2\nC = 1\n"
    proposal = ask(simplify, tmp_path, trials, text, incumbent_values(0.03))
    assert proposal.title == f"without trial 1: {line.title}" and not proposal.overrides
    (edit,) = proposal.edits
    assert text.replace(edit.search, edit.replace) == "A = 1\nB = 2\nC = 1\n"
    trials.append(a_trial(3, proposal, -0.01, parent=2))
    second = ask(simplify, tmp_path, trials, text, incumbent_values(0.03))
    assert second.overrides == {"optim.matrix_lr": flatten(VALUES)["optim.matrix_lr"]}
    assert [(e.search, e.replace) for e in second.edits] == [("B = 2", "B = 1")]

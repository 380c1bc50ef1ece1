"""An A/A study: trials on the real pipeline whose changes do nothing. How many are kept?

Every change is a code edit that no arithmetic, or only its rounding or the random numbers of the
start, can tell from the incumbent:

    comment    a line more; it is the incumbent's own computation, so it has to say `repeats`
    rename     a local variable
    swap       two definitions change places
    rounding   the same formula, rounded differently
    redraw     other initial weights from the same distribution: the pair's noise is that of seeds

The last two are the hard ones: every difference is noise, and a rule that keeps noise keeps them.

    python benchmarks/null_study.py studies=3 trials=60 [threads=1] [key=value ...]

Prints the keeps and the runs of each kind; the studies are outputs/studies/null-<n>.
"""

import ast
import random
import re
import sys
from collections import Counter
from pathlib import Path

from agent import loop
from agent.journal import Edit, Journal, Proposal
from agent.proposers import Context, mixed
from nightshift.fixed.config import ROOT

FILES = MODEL, OPTIM, SCHEDULE, TRAINING = [
    f"src/nightshift/{name}.py" for name in ("model", "optim", "schedule", "training")
]
KINDS = ("comment", "rename", "swap", "rounding", "redraw")
ROUNDING = {  # file -> (formula, the same formula)
    MODEL: (
        ("a * cos - b * sin, a * sin", "-(b * sin) + a * cos, a * sin"),
        ("a * sin + b * cos), dim", "b * cos + a * sin), dim"),
        ("F.relu(h).square()", "F.relu(h).pow(2)"),
        (
            "self.config.softcap * torch.tanh(logits_BTV / self.config.softcap)",
            "torch.tanh(logits_BTV * (1 / self.config.softcap)) * self.config.softcap",
        ),
        (
            "base ** (-torch.arange(0, head_dim, 2).float() / head_dim)",
            "1 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)",
        ),
        ("return x_BTC + self.mlp(rms_norm(x_BTC))", "return self.mlp(rms_norm(x_BTC)) + x_BTC"),
        (
            "return F.rms_norm(x, (x.size(-1),))",
            "return (x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()).to(x.dtype)",
        ),
    ),
    OPTIM: (
        ("a * x + (b * gram + c * gram @ gram) @ x", "(c * gram @ gram + b * gram) @ x + a * x"),
        ("x / (x.norm(dim=(-2, -1), keepdim=True)", "x * (1 / x.norm(dim=(-2, -1), keepdim=True)"),
    ),
    SCHEDULE: (
        (
            "return down + (1.0 - down) * schedule.final_lr_frac",
            "return schedule.final_lr_frac + down * (1.0 - schedule.final_lr_frac)",
        ),
    ),
    TRAINING: (
        (
            "F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())",
            "F.nll_loss(logits_BTV.flatten(0, 1).log_softmax(-1), targets_BT.flatten())",
        ),
    ),
}
DRAW = "        for module in self.modules():\n            if isinstance(module, Linear):"


def propose(context: Context) -> Proposal | None:
    """As many of each kind as of any other, in an order that the study's seed gives."""
    rng = random.Random(f"null/{context.seed}/{context.number}")
    order = KINDS * (context.number // len(KINDS) + 1)
    kind = order[(context.number + context.seed) % len(KINDS)]
    made = {"comment": comment, "rename": rename, "swap": swap}.get(kind)
    tried = {(e.path, e.replace) for t in context.journal.trials for e in t.proposal.edits}
    for _ in range(1000):
        name = rng.choice(FILES)
        if kind == "rounding":
            edit = rounding(context.read(name), rng, name)
        elif kind == "redraw":
            edit = redraw(rng)
        else:
            edit = made(context.read(name), rng, name)
        if edit and (edit.path, edit.replace) not in tried:
            if context.read(edit.path).count(edit.search) == 1:
                return Proposal(
                    title=f"{kind}: {' '.join(edit.replace.split())[:50]}",
                    hypothesis="Nothing changes but the text, the rounding or the draw.",
                    source="nothing",
                    edits=[edit],
                    differs="the text, and nothing else",  # else the gate refuses most of them
                    repeats=context.journal.incumbent.number if kind == "comment" else None,
                )
    return None


def comment(text: str, rng: random.Random, path: str) -> Edit | None:
    statements = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Assign, ast.Return))]
    line = text.splitlines()[rng.choice(statements).lineno - 1]
    indent = line[: len(line) - len(line.lstrip())]
    words = rng.sample(("as", "before", "here", "in", "one", "pass", "shape", "step", "this"), 4)
    return Edit(path=path, search=f"\n{line}\n", replace=f"\n{indent}# {' '.join(words)}\n{line}\n")


def rename(text: str, rng: random.Random, path: str) -> Edit | None:
    """A name that is assigned in a function, is no argument of it and stands in no f-string."""
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    function = rng.choice(functions)
    nodes = list(ast.walk(function))
    names = sorted(
        {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    )
    if not names or any(isinstance(n, ast.JoinedStr) for n in nodes):
        return None
    old, source = rng.choice(names), ast.get_source_segment(text, function)
    new = f"{old}_{rng.choice('abcdefgh')}"
    arguments = {argument.arg for argument in function.args.args}
    if old in arguments or re.search(rf"\.{old}\b|\b{old}=[^=]", source):
        return None
    return Edit(path=path, search=source, replace=re.sub(rf"\b{old}\b", new, source))


def swap(text: str, rng: random.Random, path: str) -> Edit | None:
    """Two neighbouring functions, of the module or of a class."""
    bodies = [
        n.body for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef))
    ]
    pairs = [
        (a, b)
        for body in bodies
        for a, b in zip(body, body[1:], strict=False)
        if isinstance(a, ast.FunctionDef) and isinstance(b, ast.FunctionDef)
    ]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    lines = text.splitlines(keepends=True)
    start = min([first.lineno, *(d.lineno for d in first.decorator_list)]) - 1
    middle = min([second.lineno, *(d.lineno for d in second.decorator_list)]) - 1
    a, between = lines[start : first.end_lineno], lines[first.end_lineno : middle]
    b = lines[middle : second.end_lineno]
    return Edit(path=path, search="".join(a + between + b), replace="".join(b + between + a))


def rounding(text: str, rng: random.Random, path: str) -> Edit | None:
    search, replace = rng.choice(ROUNDING[path])
    if search not in text:  # kept before
        return None
    line = next(line for line in text.splitlines() if search in line)
    note = rng.choice(("", "  # the same", "  # rounded", "  # as before"))
    return Edit(path=path, search=f"{line}\n", replace=f"{line.replace(search, replace)}{note}\n")


def redraw(rng: random.Random) -> Edit:
    skip = f"        torch.randn({rng.randrange(1, 100_000)})  # other numbers from here on\n"
    return Edit(path=MODEL, search=DRAW, replace=skip + DRAW)


def main() -> int:
    given = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
    studies, trials = int(given.pop("studies", 3)), given.pop("trials", "60")
    if "threads" in given:
        given["runtime.num_threads"] = given.pop("threads")
    mixed.PROPOSERS["nothing"] = propose
    for number in range(1, studies + 1):
        name = f"null-{number}"
        asked = [
            f"study.name={name}", f"study.seed={number}", f"study.trials={trials}",
            "sources=outside", "study.sources.outside=0", "+study.sources.nothing=1",
            *(f"{key}={value}" for key, value in given.items()),
        ]  # fmt: skip
        if status := loop.main(asked):
            return status
        tell(Journal(Path(ROOT / "outputs/studies" / name / "journal.jsonl")), name)
    return 0


def tell(journal: Journal, name: str) -> None:
    trials = journal.trials[1:]
    kinds = Counter(t.proposal.title.split(":")[0] for t in trials)
    print(f"\n{name}: {len(trials)} trials that do nothing, {len(journal.lineage) - 1} kept")
    for kind, count in sorted(kinds.items()):
        mine = [t for t in trials if t.proposal.title.startswith(kind)]
        kept = sum(t.decision == "keep" for t in mine)
        runs = sum(len(t.runs) + len(t.parent_runs) for t in mine)
        failed = sum(t.status != "ok" for t in mine)
        told = f"{count:3} trials {kept:3} kept {failed:3} failed"
        print(f"  {kind:<9} {told}  {runs / count:.2f} runs each")


if __name__ == "__main__":
    sys.exit(main())

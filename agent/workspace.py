"""A git worktree for each trial: apply a proposal, refuse what breaks a rule, commit, keep.

The user's branch, index and working tree are never touched: everything happens in a detached
worktree under the study's folder, and branches move by `git update-ref`. A commit of a trial stays
reachable under refs/trials/<study>/<number> whatever is decided.

Covered: a trial changes editable files only (by path, without links; checked again on the commit,
and by digests of everything else); conf/ holds plain values (an interpolation could read
the environment, a provider's key too); random generators are not seeded; code carries no large
literals (text or tables learned elsewhere).
Not covered: a seed that is set under another name is found by its effect (fixed/evaluate.py), if
it makes the initial weights the same for all seeds. Data in many small literals.
"""

import ast
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from agent.journal import Edit, Journal, Proposal
from agent.novelty import State, objection, shape_of
from agent.settings import HARNESS_KEYS, StudyError, compose
from agent.target import CHAT, VAL, Target
from nightshift.fixed.config import (
    Config,
    ConfigError,
    check,
    config_digest,
    digest,
    flatten,
    nearest,
    unflatten,
)
from nightshift.fixed.result import digests_of_blobs

CODE_FILES, CONF_FOLDERS = VAL.files, VAL.folders
CHAMPION = "conf/trial/champion.yaml"
# what a kept trial's second commit carries
RECORDS = ("params.yaml", "dvc.yaml", "dvc.lock", "champion")
PUBLISH = ("publish", "promote")  # the module; its name in studies begun before 2026-11-25
# conf/ holds plain values: nothing that reaches into other groups, names a class or is computed
NOT_A_VALUE = re.compile(r"\$\{|@package|_target_|^\s*defaults\s*:", re.MULTILINE)

GIT_SETTINGS = {
    "user.name": "nightshift",
    "user.email": "nightshift@localhost",
    "commit.gpgsign": "false",
    "core.hooksPath": "/dev/null",
    "gc.auto": "0",  # no background process that outlives the trial
    "maintenance.auto": "false",
}


class Refused(ValueError):
    """A proposal that breaks a rule: the message gives the value, the rule and the next move."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A proposal in its worktree, committed."""

    config: Config
    commit: str
    digest: str
    shape: str
    diff: str
    lines_added: int
    lines_removed: int


# ---- git ----


def git(folder: Path, *args: str) -> str:
    """Output of a git command, without the newline at its end. Raises StudyError if it fails."""
    settings = [part for key, value in GIT_SETTINGS.items() for part in ("-c", f"{key}={value}")]
    done = subprocess.run(
        ["git", "--no-optional-locks", *settings, *args],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        start_new_session=True,  # Ctrl-C must not cut a commit short
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise StudyError(f"git {args[0]} failed in {folder}: {' '.join(lines[-3:])}")
    return done.stdout.removesuffix("\n")


def base_commit(repo: Path) -> str:
    """HEAD of the user's branch. Raises StudyError where there is none."""
    if shutil.which("git") is None:
        raise StudyError("git is not installed; a study keeps its trials in git. Install git")
    try:
        top = Path(git(repo, "rev-parse", "--show-toplevel")).resolve()
    except StudyError:
        top = None
    if top != repo.resolve():
        raise StudyError(
            f"{repo} is not the top of a git repository; a study keeps its trials in git. "
            f"Run: git -C {repo} init && git -C {repo} add . && git -C {repo} commit -m start"
        )
    try:
        return git(repo, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except StudyError:
        raise StudyError(
            f"the repository at {repo} has no commit yet; a study starts from one. "
            f"Run: git -C {repo} add . && git -C {repo} commit -m start"
        ) from None


def has_commit(repo: Path, commit: str) -> bool:
    try:
        git(repo, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
        return True
    except StudyError:
        return False


def parent_of(repo: Path, commit: str) -> str | None:
    """The commit before it, if it has one."""
    return next(iter(git(repo, "rev-list", "--parents", "-1", commit).split()[1:]), None)


def uncommitted(repo: Path) -> list[str]:
    """Changed or new files that a trial would have used."""
    lines = git(repo, "status", "--porcelain", "--", "src", "conf", "agent").splitlines()
    return [line[3:] for line in lines]


def place_of(repo: Path, branch: str) -> str | None:
    """The working tree that has the branch checked out, or None."""
    for block in git_worktree(repo, "list", "--porcelain").split("\n\n"):
        lines = block.splitlines()
        if f"branch refs/heads/{branch}" in lines:
            return lines[0].removeprefix("worktree ")
    return None


@contextmanager
def conf_at(repo: Path, commit: str) -> Iterator[Path]:
    """A copy of a commit's conf/, for the time of the block."""
    with tempfile.TemporaryDirectory(prefix="nightshift_") as place:
        archive = Path(place, "conf.tar")
        git(repo, "archive", f"--output={archive}", commit, "conf")
        shutil.unpack_archive(archive, place, filter="data")
        yield Path(place, "conf")


@contextmanager
def worktree(repo: Path, folder: Path, commit: str) -> Iterator[Path]:
    """A detached working tree of `commit` at `folder`, removed at the end."""
    remove_worktree(repo, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    git_worktree(repo, "add", "--detach", "--force", str(folder), commit)
    try:
        yield folder
    finally:
        remove_worktree(repo, folder)


def git_worktree(repo: Path, *args: str) -> str:
    """`git worktree`, one at a time: it fails where another one adds or removes an entry just then.
    A proposal is checked beside the running trial, in a thread of the study or by another process.
    """
    with open(common_dir(repo) / "nightshift_worktrees", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process, whatever ends it
        return git(repo, "worktree", *args)


@functools.cache
def common_dir(repo: Path) -> Path:
    return Path(git(repo, "rev-parse", "--path-format=absolute", "--git-common-dir"))


def remove_worktree(repo: Path, folder: Path) -> None:
    """Also one whose folder or whose registration is gone. Others of the user are not looked at."""
    for attempt in range(20):  # a git command of a loop that was killed just now may still write
        try:
            if str(folder.resolve()) in worktrees(repo):
                git_worktree(repo, "remove", "--force", "--force", str(folder))
            break
        except StudyError:
            if attempt == 19:
                raise
            time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def worktrees(repo: Path) -> list[str]:
    lines = git_worktree(repo, "list", "--porcelain").splitlines()
    return [line.removeprefix("worktree ") for line in lines if line.startswith("worktree ")]


def remove_worktrees_under(repo: Path, folder: Path) -> None:
    for path in map(Path, worktrees(repo)):
        if path.is_relative_to(folder.resolve()):
            remove_worktree(repo, path)


def settle(
    repo: Path, name: str, journal: Journal, first_commit: str, promoted: str | None = None
) -> str | None:
    """Make the refs say what the journal says. Returns a note if the branch had to stay.

    `promoted`: the incumbent's commit at a larger scale (promotion.py), where the branch then is.

    Idempotent: after a kill between the journal's append and this, it is done again.
    """
    refs = refs_of(repo, name)
    for trial in journal.trials:
        if trial.commit and refs.get(trial_ref(name, trial.number)) != trial.commit:
            point_trial(repo, name, trial.number, trial.commit)
    branch = f"refs/heads/study/{name}"
    head = promoted or (journal.incumbent.commit if journal.incumbent else first_commit)
    if refs.get(branch) == head:
        return None
    if place := place_of(repo, f"study/{name}"):
        return f"branch study/{name} is checked out at {place}, so it was not moved to {head[:12]}"
    git(repo, "update-ref", branch, head)
    return None


def trial_ref(name: str, number: int) -> str:
    return f"refs/trials/{name}/{number:03d}"


def point_trial(repo: Path, name: str, number: int, commit: str) -> None:
    git(repo, "update-ref", trial_ref(name, number), commit)


def promotion_ref(name: str, number: int, arm: str) -> str:
    return f"refs/promotions/{name}/{number:03d}/{arm}"


def refs_of(repo: Path, name: str) -> dict[str, str]:
    """The study's branch, the refs of its trials and of its promotions: full name -> commit."""
    patterns = f"refs/heads/study/{name}", f"refs/trials/{name}/", f"refs/promotions/{name}/"
    lines = git(repo, "for-each-ref", "--format=%(refname) %(objectname)", *patterns).splitlines()
    refs = dict(line.rsplit(" ", 1) for line in lines)
    # A pattern also matches what lies below it: study/a is not study/a/b.
    return {
        ref: at for ref, at in refs.items() if ref == patterns[0] or ref.startswith(patterns[1:])
    }


def forget_command(name: str) -> str:
    """What a person runs to remove a study's refs."""
    patterns = f"refs/heads/study/{name} refs/trials/{name}/ refs/promotions/{name}/"
    return f"git for-each-ref --format='delete %(refname)' {patterns} | git update-ref --stdin"


def remove_stale_locks(repo: Path, name: str) -> None:
    """Lock files that a killed git left on this study's refs. The caller holds the study's lock."""
    refs = common_dir(repo) / "refs"
    below = [
        *(refs / f"trials/{name}").glob("*.lock"),
        *(refs / f"promotions/{name}").rglob("*.lock"),
    ]
    for lock in [refs / f"heads/study/{name}.lock", *below]:
        lock.unlink(missing_ok=True)


def _commit(tree: Path, message: str, paths: list[str]) -> str:
    git(tree, "add", "--", *paths)
    git(tree, "commit", "--quiet", "--no-verify", "--allow-empty", "-m", message)
    return git(tree, "rev-parse", "HEAD")


# ---- the study's first commit ----


def write_first_commit(tree: Path, config: Config, name: str, marks: dict[str, str]) -> str:
    """Commit champion.yaml and params.yaml so that the branch alone says what the baseline ran."""
    wanted = flatten(reproducible(config.model_dump()))
    return commit_values(tree, wanted, f"study {name}: the baseline's configuration", marks)


def commit_values(tree: Path, wanted: dict[str, Any], title: str, marks: dict[str, str]) -> str:
    """Commit a champion.yaml, and its params.yaml, with which conf/ composes to `wanted` (flat)."""
    default = flatten(compose(tree / "conf", "config", []))
    changes = {key: value for key, value in wanted.items() if default.get(key, ...) != value}
    merge_into_champion(tree / CHAMPION, changes)
    composed = flatten(resolve(tree).model_dump())
    if lost := [key for key, value in wanted.items() if composed[key] != value]:
        raise StudyError(f"{CHAMPION} cannot set {lost[0]}: a file after it in conf/ sets it again")
    write_params(tree, marks)
    present = [path for path in (CHAMPION, "params.yaml") if (tree / path).exists()]
    return _commit(tree, title, present)


def reproducible(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that says what a run computes."""
    return {key: value for key, value in values.items() if key not in HARNESS_KEYS}


def merge_into_champion(path: Path, flat: dict[str, Any], needless: Sequence[str] = ()) -> None:
    """Set dotted keys in champion.yaml; its other values and the comment at its head stay.
    `needless` keys go: conf/ says the same without them, so going back to it is fewer lines."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# @package _global_\n"
    head = re.match(r"(?:#.*\n)*", text)[0]
    values = OmegaConf.to_container(OmegaConf.create(text)) or {}
    merged = flatten(values) | flat
    merged = unflatten({key: value for key, value in merged.items() if key not in needless})
    body = OmegaConf.to_yaml(OmegaConf.create(merged)) if merged else "{}\n"
    path.write_text(head + body, encoding="utf-8")


def write_params(tree: Path, marks: dict[str, str]) -> None:
    """params.yaml is conf/ composed; `nightshift.compose` writes it, where the project has it."""
    if (tree / "src/nightshift/compose.py").exists():
        run_module(tree, marks, "nightshift.compose")


def run_module(tree: Path, marks: dict[str, str], module: str, *args: str) -> None:
    """`python -m module` with the worktree's code. Raises StudyError with its last line.

    `marks` are the trial's (warm.py): a study that goes on after a kill ends what still runs.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=tree,
        env={k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "PYTHON"))}
        | {"PYTHONPATH": str(tree / "src"), **marks},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise StudyError(f"python -m {module} failed in {tree}: {last}")


# ---- a proposal in its worktree ----


def apply(tree: Path, proposal: Proposal, title: str, target: Target = VAL) -> Applied:
    """Apply overrides and edits to the incumbent in `tree`, and commit. Raises Refused."""
    parent, before = git(tree, "rev-parse", "HEAD"), resolve(tree)
    _apply_overrides(tree, proposal.overrides, before, target)
    for number, edit in enumerate(proposal.edits, 1):
        _apply_edit(tree, edit, f"edit {number} of {len(proposal.edits)}", target)
    for path in sorted({edit.path for edit in proposal.edits if edit.path.endswith(".py")}):
        _must_parse(tree, path)
        _must_not_seed(tree, path)
        _must_not_carry_data(tree, path)
    config = _resolve_editable(tree, proposal.overrides, before, target)
    paths = sorted({CHAMPION, *(edit.path for edit in proposal.edits)})
    commit = _commit(tree, f"{title}\n\n{proposal.hypothesis}", paths)
    _must_touch_only(tree, parent, commit, paths)
    added, removed = _count_lines(git(tree, "diff", "--numstat", parent, commit))
    return Applied(
        config=config,
        commit=commit,
        digest=state_digest(tree, config),
        shape=shape_at(tree, target),
        diff=git(tree, "diff", parent, commit) + "\n",
        lines_added=added,
        lines_removed=removed,
    )


def resolve(tree: Path) -> Config:
    """The configuration of a worktree: conf/config.yaml, composed and checked."""
    return check(compose(tree / "conf", "config", []))


class Code(NamedTuple):
    """What a trial runs, as git has it: its commit, and digests of the files below src/."""

    commit: str
    fixed: str
    editable: str


def code_of(tree: Path, fixed_at: str, target: Target = VAL) -> Code:
    """Raises Refused.

    Fixed as of `fixed_at`, the study's first commit, which the tree's commit must agree with.
    """
    fixed, _ = _digests_at(tree, fixed_at, target)
    mine, editable = _digests_at(tree, "HEAD", target)
    if mine != fixed:
        raise Refused(
            f"files below src/ that are not editable differ from the study's base commit "
            f"{fixed_at[:12]}. Editable: {target.editable}."
        )
    return Code(git(tree, "rev-parse", "HEAD"), fixed, editable)


def _digests_at(tree: Path, commit: str, target: Target) -> tuple[str, str]:
    lines = git(tree, "ls-tree", "-r", "-z", commit, "--", "src").split("\0")
    entries = [line.split("\t", 1) for line in lines if line.endswith(".py")]
    blobs = {path: facts.split()[2] for facts, path in sorted(entries, key=_path)}
    return digests_of_blobs(blobs, target.modules)


def _path(entry: list[str]) -> str:
    return entry[1]


def state_digest(tree: Path, config: Config) -> str:
    """Names what a trial computes: resolved config and editable code, comments left out."""
    code = {}
    for path in (*VAL.files, *CHAT.files):
        if (tree / path).exists():
            code[path] = ast.dump(ast.parse((tree / path).read_text(encoding="utf-8")))
    return digest([config_digest(config), code])


def shape_at(tree: Path, target: Target = VAL) -> str:
    present = [tree / path for path in target.files if (tree / path).exists()]
    return shape_of(path.read_text(encoding="utf-8") for path in present)


def must_be_new(
    journal: Journal, proposal: Proposal, state: State, baseline: dict, space: dict
) -> None:
    """Raises Refused for what an earlier trial computes, or nearly (novelty.py)."""
    if why := objection(journal.trials, proposal, state, baseline, space):
        raise Refused(why)


def _apply_overrides(tree: Path, overrides: dict[str, Any], before: Config, target: Target) -> None:
    keys = flatten(before.model_dump())
    editable = [key for key in keys if key.split(".")[0] in target.groups]
    for key in overrides:
        if key in editable:
            continue
        if key in keys:
            raise Refused(
                f"override {key}: not editable. Editable: the keys of {', '.join(target.groups)}."
            )
        raise Refused(f"override {key}: there is no such key.{nearest(key, editable)}")
    for key, value in overrides.items():
        if found := computed(value):
            raise Refused(
                f"override {key}: '{found[0]}' is no plain value. Write the value itself."
            )
    if overrides:
        without = flatten(compose(tree / "conf", "config", ["trial=none"]))
        needless = [key for key, value in overrides.items() if without.get(key, ...) == value]
        merge_into_champion(tree / CHAMPION, overrides, needless)


def _apply_edit(tree: Path, edit: Edit, which: str, target: Target) -> None:
    path = _editable_path(tree, edit.path, which, target)
    text = path.read_bytes().decode("utf-8")
    count = text.count(edit.search) if edit.search else 0
    if count != 1:
        move = "Include more surrounding lines." if count > 1 else "Copy it from the file as it is."
        raise Refused(
            f"{which}: search text occurs {count} times in {edit.path}; it must occur once. {move}"
        )
    after = text.replace(edit.search, edit.replace)
    if path.suffix == ".yaml" and (new := more_than_values(after) - more_than_values(text)):
        raise Refused(
            f"{which}: '{next(iter(new))}' in {edit.path}; files in conf/ hold plain values. "
            "Write the value itself."
        )
    path.write_bytes(after.encode("utf-8"))


def more_than_values(text: str) -> Counter[str]:
    """What a YAML file has beyond values, also where escapes hide it: "\\x24{" is "${"."""
    found = [match.strip() for match in NOT_A_VALUE.findall(text)]
    try:
        found += computed(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        pass  # Hydra says what is wrong with it
    return Counter(found)


def computed(value: Any) -> list[str]:
    """The interpolations in a value, and its keys that Hydra acts on."""
    if isinstance(value, str):
        return [value] if "${" in value else []
    if isinstance(value, dict):
        keys = [key for key in value if key in ("defaults", "_target_")]
        return keys + computed([*value, *value.values()])
    return [found for each in value for found in computed(each)] if isinstance(value, list) else []


def is_editable(name: str, target: Target = VAL) -> bool:
    """By its path alone; whether there is such a file is another question."""
    plain = PurePosixPath(name)
    in_conf = str(plain.parent) in target.folders and plain.suffix == ".yaml"
    return str(plain) == name and (name in target.files or in_conf)


def _editable_path(tree: Path, name: str, which: str, target: Target) -> Path:
    allowed = f"Editable: {target.editable}."
    if not is_editable(name, target):
        raise Refused(f"{which}: {name} is not editable. {allowed}")
    path = tree / name
    if path.resolve() != tree.resolve() / name:
        raise Refused(f"{which}: {name} is a symbolic link, so not editable. {allowed}")
    if not path.is_file():
        there = [p.relative_to(tree).as_posix() for p in path.parent.glob(f"*{path.suffix}")]
        raise Refused(f"{which}: there is no file {name}.{nearest(name, there)}")
    return path


def _must_parse(tree: Path, path: str) -> None:
    try:
        ast.dump(ast.parse((tree / path).read_text(encoding="utf-8")))  # as state_digest will
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise Refused(
            f"{path} is not Python after the edits: {getattr(error, 'msg', error)}, line {line}. "
            "Mind the indentation of the replacement."
        ) from None


# Names that set or replace the state of a random generator, in torch, numpy, random and Lightning.
SEEDING = re.compile(
    r"^(manual_seed\w*|seed\w*|set_rng_state\w*|setstate|set_state|initial_seed|default_rng|"
    r"RandomState|SeedSequence|fork_rng|PCG64\w*|Philox|MT19937)$"
)


def _must_not_seed(tree: Path, path: str) -> None:
    """Seeds belong to the harness: a lucky one is not a better model."""
    for node in ast.walk(ast.parse((tree / path).read_text(encoding="utf-8"))):
        called = node.func if isinstance(node, ast.Call) else None
        name = getattr(called, "attr", None) or getattr(called, "id", None) or ""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name.rsplit(".", 1)[-1] for alias in node.names]
            name = next((n for n in names if SEEDING.match(n)), "")
        if SEEDING.match(name):
            raise Refused(
                f"{path}, line {node.lineno}: {name} sets a random generator; seeds belong to the "
                "harness. Draw from torch's default generator as it comes."
            )


MAX_LITERAL, MAX_ELEMENTS, MAX_FILE_BYTES = 2_000, 500, 200_000


def _must_not_carry_data(tree: Path, path: str) -> None:
    """Code may not bring text or tables that somebody else learned: what is known is trained."""
    source = (tree / path).read_bytes()
    if len(source) > MAX_FILE_BYTES:
        raise Refused(f"{path} has {len(source)} bytes; at most {MAX_FILE_BYTES}. Write less code.")
    for node in ast.walk(ast.parse(source)):
        size, limit = 0, MAX_LITERAL
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            size = len(node.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            size = node.value.bit_length() // 8
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
            size, limit = (
                len(getattr(node, "elts", None) or getattr(node, "keys", [])),
                MAX_ELEMENTS,
            )
        if size > limit:
            raise Refused(
                f"{path}, line {node.lineno}: a literal of size {size}, at most {limit}: code may "
                "not carry data. Learn it in training."
            )


def _resolve_editable(
    tree: Path, overrides: dict[str, Any], before: Config, target: Target
) -> Config:
    try:
        after = resolve(tree)
    except ConfigError as error:
        raise Refused("; ".join(str(error).splitlines())) from None
    old, new = flatten(before.model_dump()), flatten(after.model_dump())
    for key in sorted(old.keys() | new.keys()):
        if key.split(".")[0] not in target.groups and old.get(key) != new.get(key):
            raise Refused(
                f"{key} ({old.get(key)!r}) would become {new.get(key)!r}: it is fixed in a study. "
                f"Editable: the keys of {', '.join(target.groups)}."
            )
    for key, value in overrides.items():
        if new[key] != value:
            raise Refused(
                f"override {key} ({value!r}) composes to {new[key]!r}. Give a plain value."
            )
    return after


def _must_touch_only(tree: Path, parent: str, commit: str, paths: list[str]) -> None:
    touched = git(tree, "diff", "--name-only", "-z", parent, commit).split("\0")
    assert set(filter(None, touched)) <= set(paths), f"a commit touches {touched}, not only {paths}"


def _count_lines(numstat: str) -> tuple[int, int]:
    counts = [line.split("\t")[:2] for line in numstat.splitlines()]
    return sum(int(added) for added, _ in counts), sum(int(removed) for _, removed in counts)


# ---- a keep ----


def record_keep(tree: Path, run_folder: Path, title: str, marks: dict[str, str]) -> str:
    """The commit of a kept trial: its own, or one more with params.yaml and the DVC state."""
    settle_dvc(tree, run_folder, marks)
    present = [path for path in RECORDS if (tree / path).exists()]
    if not present or not git(tree, "status", "--porcelain", "--", *present):
        return git(tree, "rev-parse", "HEAD")
    return _commit(tree, f"{title}: parameters, data and weights", present)


def settle_dvc(tree: Path, run_folder: Path, marks: dict[str, str]) -> None:
    """Bring params.yaml, dvc.lock and champion/ to what the kept run left, without running a stage.

    Where the project has no dvc.yaml, only params.yaml is written.
    """
    write_params(tree, marks)
    module = next((m for m in PUBLISH if (tree / f"src/nightshift/{m}.py").exists()), None)
    if module and (tree / "dvc.yaml").exists():
        run_module(tree, marks, f"nightshift.{module}", f"run={run_folder}")

"""What a study is judged by, and what follows from that.

val_bpb    pretraining: bits per byte of val text. Trials change the model and how it is trained
chat_bpb   tuning: bits per byte of the assistant's turns in val conversations. All trials begin
           from one base, which is trained once; they change conf/sft and the tuning step alone
"""

from typing import NamedTuple

from nightshift.fixed.config import EDITABLE_GROUPS, TUNING_GROUPS
from nightshift.fixed.result import EDITABLE_MODULES, TUNING_MODULES


class Target(NamedTuple):
    name: str  # of the number in journal, result.json and MLflow; lower is better
    groups: tuple[str, ...]  # of conf/ that a trial may change
    modules: tuple[str, ...]  # of src/nightshift, likewise
    fetch: str  # the harness's modules: the data, with the user's rights
    train: str
    evaluate: str
    stage: str  # of dvc.yaml, where the number comes out
    usual: tuple[str, ...] = ()  # overrides that apply unless a person says otherwise

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(f"src/nightshift/{name}.py" for name in self.modules)

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(f"conf/{group}" for group in self.groups)

    @property
    def editable(self) -> str:
        """For a person: the paths that a trial may change."""
        return f"src/nightshift/{_one_of(self.modules)}.py, conf/{_one_of(self.groups)}/*.yaml"


def _one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


VAL = Target(
    name="val_bpb",
    groups=EDITABLE_GROUPS,
    modules=EDITABLE_MODULES,
    fetch="nightshift.fixed.corpus",
    train="nightshift.fixed.train",
    evaluate="nightshift.fixed.evaluate",
    stage="evaluate",
)
CHAT = Target(
    name="chat_bpb",
    groups=TUNING_GROUPS,
    modules=TUNING_MODULES,
    fetch="nightshift.fixed.chats",
    train="nightshift.fixed.tune",
    evaluate="nightshift.fixed.chat_score",
    stage="chat_evaluate",
    usual=("space=chat", "preset=laptop_chat"),
)
TARGETS = {target.name: target for target in (VAL, CHAT)}

"""Wrong input: one clear line each, exit status not 0, nothing written.

All through the real entry points.
"""

import pytest
import yaml

from nightshift import cli, command, compose, pretrain
from nightshift.fixed import config as knobs
from nightshift.fixed import evaluate
from nightshift.fixed.config import CONF, ROOT, Config, ConfigError, check, schema_keys

WRONG = {
    "modl.depth=3": "modl.depth=3: there is no such key. Nearest: model.depth.",
    "model.dept=3": "Nearest: model.depth.",
    "+optim.nesterov=true": "optim.nesterov (True): there is no such key.",
    "model=d1": "model=d1: there is no such choice. Choices: d12, d20, d26, d6, tiny.",
    "budget=5mn": "Nearest: 5min.",
    "optim.matrix_lr=abc": "optim.matrix_lr ('abc'): must be a valid number.",
    "optim.matrix_lr=-1": "must be greater than 0.",
    "model.depth=2.5": "model.depth (2.5): must be a valid integer.",
    "model.depth=": "model.depth (''): must be a valid integer.",
    "model.depth": "model.depth: cannot be read. Write key=value",
    "model.mlp=relu": "model.mlp ('relu'): must be 'relu2' or 'swiglu'. Nearest: relu2.",
    "model.depth=3,4": "several values need a multirun: add -m.",
    "model.kv_group=3": "must divide the number of heads (4, from depth 4). Possible: [1, 2, 4]",
    "model.head_dim=33": "must be even",
    "model.window_pattern=SXL": "must be letters S (short) and L (long)",
    "train.batch_tokens=5000": "must be a multiple of micro_batch_size x seq_len = 4 x 256 = 1024. "
    "Nearest: 4096 or 5120",
    "schedule.warmup_frac=0.7": "schedule.warmup_frac + warmdown_frac (1.2) must be at most 1",
    "budget.wall_limit_s=61": "must be at least budget.amount + 10 s = 70",
    "seed=-1": "seed (-1): must be greater than or equal to 0.",
    "~optim.eps": "optim.eps: missing",
    "corpus=folder": "corpus=folder needs the folder: corpus.path=/my/texts",
    "corpus=folder corpus.path=/no/such/folder": "corpus.path (/no/such/folder): no such file "
    "or folder",
    "corpus.source=hub": "a hub corpus needs a dataset name",
    "corpus.val_frac=0.6": "corpus.val_frac (0.6): must be less than 0.5.",
    "tokenizer.vocab_size=100": "must be greater than or equal to 265.",
    "tokenizer.vocab_size=100000": "must be less than or equal to 65535.",
    "resume=/no/such/run": "resume (/no/such/run): this run is finished or never saved its state",
    "budget.replay=/no/such/run": "no recorded run there",
    "runtime.device=gpu": "must be 'auto', 'cpu' or 'cuda'",
    "--foo": "--foo: there is no such option.",
    "model.depth=3 --cfg job modl=3": "modl=3: there is no such key.",
}


@pytest.mark.parametrize("given", WRONG)
def test_a_wrong_input_gives_one_clear_line_and_writes_nothing(
    given, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(given.split()) != 0
    out, error = capsys.readouterr()
    assert WRONG[given] in error and out == ""
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_all_mistakes_of_a_configuration_are_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(["optim.matrix_lr=-1", "model.depth=0", "train.precision=fp8"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 3


def test_an_unknown_command_names_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nightshift", "pretran"])
    assert cli.main() == 2
    assert "Nearest: pretrain." in capsys.readouterr().err


def test_evaluate_names_what_is_missing(tmp_path, capsys):
    assert evaluate.main(["run=" + str(tmp_path / "nothing")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    assert evaluate.main([]) == 2


def test_a_group_choice_does_not_lose_silently_to_the_champion(tmp_path):
    conf = tmp_path / "conf"
    (conf / "trial").mkdir(parents=True)
    (conf / "trial" / "champion.yaml").write_text("# @package _global_\nmodel:\n  depth: 5\n")
    with pytest.raises(
        ConfigError, match=r"model=d12: .*model.depth and would win over it. Add trial=none"
    ):
        command.check_champion(["model=d12"], conf)
    command.check_champion(["model=d12", "trial=none"], conf)
    command.check_champion(["model.depth=6"], conf)


def test_a_broken_yaml_file_is_named_with_its_line(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 1\nmodel: [\n")
    with pytest.raises(ConfigError, match=r"config.yaml, line \d+: not valid YAML"):
        command.compose(conf=tmp_path)


def test_every_choice_of_every_group_is_valid():
    extra = {"folder": ["corpus.path=/tmp"]}
    for group in ("corpus", "filter", "tokenizer", "budget", "preset", "tracking"):
        for file in (CONF / group).glob("*.yaml"):
            check(command.compose("config", [f"{group}={file.stem}", *extra.get(file.stem, [])]))
    for model, train in (("d6", "cpu"), ("d12", "gpu")):
        overrides = [f"model={model}", f"train={train}"] + (
            ["train.micro_batch_size=2"] if model == "d6" else []
        )
        check(command.compose("config", overrides))


@pytest.mark.parametrize(
    "overrides, kind, amount",
    [([], "tokens", 75_000), (["preset=d12"], "seconds", 300), (["budget=20s"], "seconds", 20)],
)
def test_a_preset_and_a_budget_reach_a_study(overrides, kind, amount):
    budget = command.compose("study", overrides)["budget"]
    assert (budget["kind"], budget["amount"]) == (kind, amount)


def test_the_schema_and_conf_have_the_same_keys():
    values = command.compose()
    assert set(knobs.flatten(values)) <= set(schema_keys(Config))


def test_params_yaml_is_what_conf_says():
    """A stale file in git would make `dvc repro` of a fresh clone differ from conf/."""
    committed = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert committed == yaml.safe_load(compose.params_text(command.compose()))


def test_compose_refuses_an_edited_params_file_and_names_the_command(tmp_path):
    values = command.compose()
    path = tmp_path / "params.yaml"
    path.write_text(compose.params_text(values))
    compose.refuse_edited(path, values)
    path.write_text(path.read_text().replace("matrix_lr: 0.02", "matrix_lr: 0.07"))
    with pytest.raises(
        ConfigError, match=r"-S 'conf/trial/champion.yaml:\+\+optim.matrix_lr=0.07'"
    ):
        compose.refuse_edited(path, values)


def test_a_changed_conf_is_no_edit_of_params(tmp_path):
    values = command.compose()
    path = tmp_path / "params.yaml"
    path.write_text(compose.params_text(values))
    compose.refuse_edited(path, command.compose("config", ["optim.matrix_lr=0.03"]))

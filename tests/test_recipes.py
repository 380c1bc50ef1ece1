"""Every recipe fits today's code; what it makes still trains and still cannot see the future."""

import pytest
import torch
import yaml
from edited import MODULES, load_edited, pretrain, write_tree
from tiny import config

from agent.proposers.recipes import read_recipes
from nightshift.fixed.config import CONF, ROOT, Schedule
from nightshift.model import GPT

RECIPES = read_recipes()


def test_there_are_at_least_twelve_recipes_of_several_kinds():
    touched = {edit.path for recipe in RECIPES for edit in recipe.edits}
    assert len(RECIPES) >= 12 and len(touched) >= 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.title)
def test_a_recipe_fits_trains_and_stays_causal(recipe, tmp_path, monkeypatch):
    edited = load_edited(recipe, monkeypatch)
    cfg = config(tmp_path)
    torch.manual_seed(0)
    model: GPT = edited["model"].GPT(cfg.model, 300)
    module = edited["training"].TrainingModule(model, cfg, torch.float32, compile=False)
    optimizer = module.configure_optimizers()
    tokens = torch.randint(0, 300, (4, 33))
    batch = tokens[:, :-1], tokens[:, 1:]
    losses = []
    for _ in range(8):
        loss = module.training_step(batch, 0)
        loss.backward()
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1, "it learns a batch by heart"
    altered = batch[0].clone()
    altered[:, 20:] = (altered[:, 20:] + 1) % 300
    torch.testing.assert_close(model(batch[0])[:, :20], model(altered)[:, :20])
    shape = [
        edited["schedule"].lr_scale(
            i / 10, Schedule(warmup_frac=0.1, warmdown_frac=0.5, final_lr_frac=0.0)
        )
        for i in range(11)
    ]
    assert shape[5] == 1.0 and abs(shape[10]) < 1e-9 and all(0 <= s <= 1 for s in shape)
    documents = [("a", "We must do the work that is before us.\n" * 9)]
    assert list(edited["filtering"].select(documents, cfg.filter))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.title)
def test_a_recipe_says_why(recipe):
    assert len(recipe.hypothesis) > 60 and recipe.hypothesis.endswith(".")


def test_the_editable_surface_stays_small():
    """An agent is always shown all of what it may change: at most 1,000 lines."""
    lines = sum(
        len((ROOT / f"src/nightshift/{name}.py").read_text().splitlines()) for name in MODULES
    )
    groups = ("filter", "tokenizer", "model", "optim", "schedule", "train")
    lines += sum(
        len(f.read_text().splitlines()) for group in groups for f in (CONF / group).glob("*.yaml")
    )
    assert lines < 1000


def test_presets_choose_files_and_set_no_editable_value():
    for file in (CONF / "preset").glob("*.yaml"):
        values = yaml.safe_load(file.read_text()) or {}
        assert not set(values) & {"filter", "tokenizer", "model", "optim", "schedule", "train"}, (
            file.name
        )


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.title)
def test_a_recipe_runs_in_the_real_pipeline(recipe, tmp_path):
    tree = write_tree(recipe, tmp_path / "tree")
    done = pretrain(tree, tmp_path / "run", "budget=smoke", "evaluate.max_bytes=5000")
    assert "status:          ok" in done.stdout, done.stderr[-2000:]

import math

import torch
import yaml
from tiny import model_config

from nightshift.fixed.config import CONF, Optim, Schedule
from nightshift.model import GPT
from nightshift.optim import MuonAdamW, orthogonalize, parameter_groups
from nightshift.schedule import lr_scale

OPTIM = yaml.safe_load((CONF / "optim" / "muon.yaml").read_text())


def test_every_parameter_is_in_one_group():
    for changes in ({}, {"tied_head": True}, {"value_embeds": True}):
        model = GPT(model_config(**changes), 300)
        grouped = [p for g in parameter_groups(model, Optim(**OPTIM)) for p in g["params"]]
        assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 24, 64), (2, 64, 24), (1, 16, 48)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), num_steps=5))
        assert values.min() > 0.3 and values.max() < 1.3


def test_adamw_agrees_with_torch():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(5, 7)), None
    theirs = torch.nn.Parameter(ours.detach().clone())
    optim = Optim(**OPTIM)
    mine = MuonAdamW(
        [{"params": [ours], "kind": "adamw", "initial_lr": 0.01, "lr": 0.01}], optim, torch.float32
    )
    reference = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0
    )
    for _ in range(5):
        gradient = torch.randn(5, 7)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step(), reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_muon_moves_a_matrix_by_its_learning_rate_in_every_direction():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 32))
    optim = Optim(**OPTIM | {"weight_decay": 0.0})
    step = MuonAdamW(
        [{"params": [weight], "kind": "muon", "initial_lr": 0.1, "lr": 0.1}], optim, torch.float32
    )
    weight.grad = torch.randn(32, 32) * 1e-4  # the scale of the gradient does not matter
    step.step()
    moved = torch.linalg.svdvals(weight.detach())
    assert 0.06 < moved.median() and moved.max() < 0.13


def test_the_schedule_rises_stays_and_falls_to_its_end():
    schedule = Schedule(warmup_frac=0.1, warmdown_frac=0.4, final_lr_frac=0.05)
    assert lr_scale(0.0, schedule) > 0, "the first step is not wasted"
    assert lr_scale(0.05, schedule) < lr_scale(0.1, schedule) == lr_scale(0.6, schedule) == 1.0
    assert math.isclose(lr_scale(1.0, schedule), 0.05)
    assert lr_scale(0.0, Schedule(warmup_frac=0.0, warmdown_frac=0.0, final_lr_frac=0.0)) == 1.0
    assert lr_scale(1.0, Schedule(warmup_frac=0.0, warmdown_frac=0.0, final_lr_frac=0.0)) == 1.0

import pytest
import torch
from tiny import model_config

from nightshift.model import GPT, apply_rope, rms_norm, rope_tables

VARIANTS = [
    {},
    {"kv_group": 2},
    {"mlp": "swiglu"},
    {"tied_head": True},
    {"value_embeds": True},
    {"value_embeds": True, "kv_group": 2},
    {"window_pattern": "SL", "short_window_frac": 0.25},
    {"softcap": None},
]


def make(**changes):
    torch.manual_seed(0)
    model = GPT(model_config(**changes), vocab_size=300)
    with torch.no_grad():  # away from the zero init, where every block is the identity
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_future_tokens_do_not_change_past_logits(changes):
    model, tokens = make(**changes), torch.randint(0, 300, (2, 32))
    altered = tokens.clone()
    altered[:, 20:] = (altered[:, 20:] + 1) % 300
    before, after = model(tokens), model(altered)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(changes):
    model, tokens = make(**changes), torch.randint(0, 300, (2, 32))
    model(tokens).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_short_window_hides_what_is_older():
    model = make(window_pattern="S", depth=1, short_window_frac=0.25)
    window = model.blocks[0].attention.window
    assert window == 32, "the last layer sees everything"
    model = make(window_pattern="S", depth=2, short_window_frac=0.25)
    first = model.blocks[0].attention
    x = torch.randn(1, 32, model.config.width)
    rope = (model.rope_cos, model.rope_sin)
    moved = x.clone()
    moved[:, 0] += 1.0
    difference = (first(x, rope, None) - first(moved, rope, None)).abs().sum(-1)[0]
    assert (difference[: first.window] > 0).all() and (difference[first.window :] == 0).all()


def test_rope_turns_products_into_functions_of_distance():
    cos, sin = rope_tables(64, 16, 10000.0)
    q, k = torch.randn(16), torch.randn(16)
    qs = apply_rope(q.expand(1, 64, 1, 16), cos, sin)[0, :, 0]
    ks = apply_rope(k.expand(1, 64, 1, 16), cos, sin)[0, :, 0]
    torch.testing.assert_close(qs[10] @ ks[7], qs[50] @ ks[47])


def test_loss_begins_at_that_of_a_uniform_guess():
    torch.manual_seed(0)
    logits = GPT(model_config(), vocab_size=300)(torch.randint(0, 300, (2, 32)))
    assert abs(float(logits.logsumexp(-1).mean()) - torch.log(torch.tensor(300.0))) < 0.05


def test_softcap_bounds_logits_and_rms_norm_has_unit_scale():
    model = make(softcap=3.0)
    with torch.no_grad():
        model.head.weight.mul_(100)
    assert model(torch.randint(0, 300, (1, 32))).abs().max() <= 3.0
    torch.testing.assert_close(
        rms_norm(torch.randn(5, 64)).square().mean(-1), torch.ones(5), rtol=1e-3, atol=1e-3
    )


def test_one_dial_sets_width_and_heads():
    assert [model_config(depth=d).width for d in (2, 4)] == [32, 64]
    assert model_config(depth=4).n_head == 4

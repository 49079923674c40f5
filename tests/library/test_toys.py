"""The small byte model that experiments share: its parts are exchangeable, and it learns."""

import math

import pytest
import torch
from torch import nn

from llm40 import checks, profile, toys


@pytest.fixture
def tokens():
    return torch.randint(256, (2, 9), generator=checks.generator()).to(profile.device)


def model(**options):
    torch.manual_seed(0)
    blocks = [toys.Block(16, toys.Attention(16, 4, 2), **options) for _ in range(2)]
    return toys.ByteModel(16, blocks, context=12, norm=nn.RMSNorm(16)).to(profile.device)


@pytest.mark.parametrize("options", [{}, {"post_norm": True}, {"norm": nn.LayerNorm, "mlp": nn.Linear(16, 16)}])
def test_is_causal(tokens, options):
    net = model(**options)
    logits = net(tokens)
    assert logits.shape == (2, 9, 256)
    changed = tokens.clone()
    changed[:, 5:] = 0
    checks.close(net(changed)[:, :5], logits[:, :5])
    assert [s.shape for s in net.hidden_states(tokens)] == [(2, 9, 16)] * 3


def test_attention_is_pytorchs_own(tokens):
    attention = toys.Attention(12, 3)
    twin = nn.MultiheadAttention(12, 3, bias=False, batch_first=True)
    twin.load_state_dict({"in_proj_weight": attention.qkv.weight, "out_proj.weight": attention.out.weight})
    x = torch.randn(2, 7, 12, generator=checks.generator())
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    checks.close(attention(x), twin(x, x, x, attn_mask=mask, need_weights=False)[0])


def test_what_attends_and_turns_is_exchangeable(tokens):
    seen = []

    def attend(q, k, v):
        seen.append((q.shape, k.shape, v.shape))
        return toys.sdpa(q, k, v)

    attention = toys.Attention(12, 4, 2, head_dim=5, attend=attend, turn=lambda t, at: t * at[:, None])
    assert attention(torch.randn(1, 3, 12)).shape == (1, 3, 12)
    assert seen == [((1, 4, 3, 5), (1, 2, 3, 5), (1, 2, 3, 5))]


def test_tied_head_and_no_positions(tokens):
    net = toys.ByteModel(8, [nn.Identity()], tied=True).to(profile.device)
    assert len(list(net.parameters())) == 1
    checks.close(net(tokens), net.bytes(tokens) @ net.bytes.weight.T)


def test_batches_are_windows_of_the_text():
    text = torch.arange(100)
    windows = toys.byte_batches(text, 3, 4, 10, seed=5)
    assert windows.shape == (3, 4, 11)
    assert bool((windows.diff(dim=-1) == 1).all())
    assert torch.equal(windows, toys.byte_batches(text, 3, 4, 10, seed=5))
    assert not torch.equal(windows, toys.byte_batches(text, 3, 4, 10, seed=6))
    assert {int(w[0, 0]) for w in toys.byte_batches(torch.arange(12), 99, 1, 10)} == {0, 1}  # every window that fits


def test_it_learns():
    text = toys.documentation_bytes()
    batches = toys.byte_batches(text, 60, 4, 12)
    watched = []
    losses = toys.training_losses(
        model(), batches, lr=1e-2, rate=lambda s: min(1, (s + 1) / 10), clip=1.0, watch=watched.append
    )
    assert len(losses) == 60
    assert watched == list(range(60))
    assert losses[0] > 5
    assert sum(losses[-10:]) / 10 < 3.6
    again = toys.training_losses(model(), batches, lr=1e-2, rate=lambda s: min(1, (s + 1) / 10), clip=1.0)
    checks.close(again, losses, rtol=1e-4)


def test_another_optimizer_and_rate():
    net = model()
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    before = [p.detach().clone() for p in net.parameters()]
    toys.training_losses(net, toys.byte_batches(toys.documentation_bytes(), 2, 2, 8), optimizer=sgd, rate=lambda s: 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_sides_and_entropy():
    training, held_out = toys.documentation_bytes(held_out=False), toys.documentation_bytes(held_out=True)
    assert len(held_out) < 0.2 * len(training)
    assert toys.entropy_of(torch.tensor([3, 3, 5, 5])) == pytest.approx(math.log(2))
    assert 2.5 < toys.entropy_of(training) < 3.5

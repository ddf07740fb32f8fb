"""The transformer: shapes, the start of training, guidance."""

import pytest
import torch

from terdit import SIZES, Config, DiT, rotary_table, ternarize
from tests.helpers import SMALL, awake


@pytest.mark.parametrize("size", SIZES)
def test_output_has_the_shape_of_the_input(size):
    config = Config(**SIZES[size])
    with torch.device("meta"):  # shapes alone, no memory
        x = torch.empty(2, config.in_channels, config.input_size, config.input_size)
        out = DiT(config)(x, torch.empty(2), torch.empty(2, dtype=torch.long))
    channels = config.in_channels * (2 if config.learn_sigma else 1)
    assert out.shape == (2, channels, *x.shape[2:])


@torch.no_grad()
def test_unpatchify_puts_pixels_back():
    model = DiT(Config(**SMALL))
    x = torch.randn(2, 3, 8, 12)
    patches = model.patchify(x)  # (N, T, C * p * p)
    assert patches.shape == (2, 24, 12)
    assert torch.equal(patches[0, 0], x[0, :, :2, :2].flatten())
    # unpatchify expects another order within a patch: (C, p, p) becomes (p, p, C).
    reordered = patches.unflatten(2, (3, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)
    assert torch.equal(model.unpatchify(reordered, 8), x)


@pytest.mark.parametrize("ternary", [True, False])
def test_training_starts_from_the_identity(ternary):
    """adaLN-Zero: blocks pass their input on, the output is 0, gradients reach the gates."""
    model = DiT(Config(**SMALL, ternary=ternary, adaln_norm=ternary))
    h = torch.randn(2, 16, 32)
    c = torch.randn(2, 32)
    assert torch.equal(model.layers[0](h, c, rotary_table(16, 8)), h)

    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([1, 2]))
    assert (model(*inputs) == 0).all()

    torch.nn.init.normal_(model.final_layer.linear.weight)
    model(*inputs).square().sum().backward()
    adaln = model.layers[0].adaLN_modulation
    gate = adaln[2] if ternary else adaln[1]  # the RMS Norm's gain, or the linear itself
    assert gate.weight.grad.abs().max() > 0


def test_alphas_start_at_mean_abs():
    layer = DiT(Config(**SMALL)).layers[0].feed_forward.w1
    assert layer.alphas.item() == pytest.approx(layer.weight.abs().mean().item())
    assert 0.2 < (ternarize(layer.weight) == 0).double().mean() < 0.4


def test_alphas_may_start_at_random():
    """Drawn from N(0, 1), as upstream's code does: some are negative, and all else is unchanged."""
    model = DiT(Config(**SMALL | dict(n_layers=20), alpha_start="random"))
    alphas = torch.cat([p for name, p in model.named_parameters() if name.endswith("alphas")])
    assert alphas.mean().abs() < 0.3
    assert 0.8 < alphas.std() < 1.2


@pytest.mark.parametrize("change", [
    dict(pos_embed=True),
    dict(qk_norm=True, adaln_norm=False),
    dict(ternary=False, adaln_norm=False),
])
def test_gradients_reach_every_parameter(change):
    """A parameter that no gradient reaches stays as it is, and nothing else would show it."""
    model = awake(DiT(Config(**SMALL | change)))
    out = model(torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999]), torch.tensor([0, 1, 2, 5]))
    (out * torch.randn_like(out)).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 0, name


@torch.no_grad()
def test_guidance_moves_away_from_the_null_class():
    model = awake(DiT(Config(**SMALL)))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([100, 100])
    y = torch.tensor([1, 3])
    null = torch.full_like(y, 5)
    cond = model(x, t, y)
    uncond = model(x, t, null)
    assert not torch.allclose(cond, uncond)

    def guided(scale, channels=None):
        twice = (torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        return model.forward_with_cfg(*twice, scale, channels)[:2]

    torch.testing.assert_close(guided(1.0), cond)
    torch.testing.assert_close(guided(0.0)[:, :3], uncond[:, :3])
    torch.testing.assert_close(guided(3.0)[:, :3], uncond[:, :3] + 3 * (cond - uncond)[:, :3])
    for channels in (None, 3, 100):
        torch.testing.assert_close(guided(3.0, channels)[:, 3:], cond[:, 3:])  # sigma is not guided


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    model = awake(DiT(Config(**SMALL)))
    x = torch.randn(3, 3, 8, 8)
    t = torch.tensor([5, 400, 999])
    y = torch.tensor([0, 1, 5])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t, y), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(n_heads=5), "n_heads=5"),
    (dict(n_heads=-4), "n_heads=-4"),
    (dict(alpha_start="zero"), "'absmean' or 'random'"),
    (dict(input_size=9), "image size 9 is not a multiple of the patch size 2"),
    (dict(prediction="x0"), "'eps' or 'v'"),
])
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**SMALL | change)


@pytest.mark.parametrize("change, outputs", [
    (dict(dim=90, n_heads=9), 90),
    (dict(dim=40, multiple_of=1), 106),
])
def test_a_width_that_cannot_be_packed_is_refused_at_the_start(change, outputs):
    config = SMALL | change
    with torch.device("meta"):
        DiT(Config(**config, ternary=False, adaln_norm=False))
        with pytest.raises(ValueError, match=f"^{outputs} outputs: a packed layer needs"):
            DiT(Config(**config))

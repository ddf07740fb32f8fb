"""The transformer: shapes, the start of training, guidance."""

import pytest
import torch

from terdit import SIZES, Config, DiT, GaussianDiffusion, ternarize
from tests.test_ternary import SMALL, awake


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    config = Config(**SIZES[size])
    with torch.device("meta"):
        model = DiT(config)
        c, s = config.in_channels, config.input_size
        out = model(torch.empty(2, c, s, s), torch.empty(2), torch.empty(2, dtype=torch.long))
    assert out.shape == (2, c * (1 + config.learn_sigma), s, s)


@torch.no_grad()
def test_unpatchify_puts_pixels_back():
    model = DiT(Config(**SMALL))
    x = torch.randn(2, 3, 8, 12)
    patches = model.patchify(x)  # (N, T, C * p * p)
    assert patches.shape == (2, 24, 12)
    assert torch.equal(patches[0, 0], x[0, :, :2, :2].flatten())
    moved = patches.unflatten(2, (3, 2, 2)).permute(0, 1, 3, 4, 2).flatten(2)  # (C, p, p) to (p, p, C)
    assert torch.equal(model.unpatchify(moved, 8), x)


@pytest.mark.parametrize("ternary", [True, False])
def test_training_starts_from_the_identity(ternary):
    """adaLN-Zero: every block passes its input on, the output is 0, and gradients reach the gates at once."""
    model = DiT(Config(**SMALL, ternary=ternary, adaln_norm=ternary))
    h, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    from terdit import rotary_table

    assert torch.equal(model.layers[0](h, c, rotary_table(16, 8)), h)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([1, 2])
    assert (model(x, t, y) == 0).all()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    model(x, t, y).square().sum().backward()
    gain = model.layers[0].adaLN_modulation[2].weight if ternary else model.layers[0].adaLN_modulation[1].weight
    assert gain.grad.abs().max() > 0


def test_alphas_start_at_mean_abs():
    layer = DiT(Config(**SMALL)).layers[0].feed_forward.w1
    assert layer.alphas.item() == pytest.approx(layer.weight.abs().mean().item())
    assert 0.2 < (ternarize(layer.weight) == 0).double().mean() < 0.4


def test_every_parameter_is_trained():
    """One loss reaches every parameter, whatever the configuration (a frozen one is a silent bug)."""
    for change in (
        dict(),
        dict(qk_norm=True, adaln_norm=False),
        dict(ternary=False, adaln_norm=False),
        dict(pos_embed=True),
    ):
        model = awake(DiT(Config(**{**SMALL, **change})))
        out = model(torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999]), torch.tensor([0, 1, 2, 5]))
        (out * torch.randn_like(out)).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@torch.no_grad()
def test_guidance():
    model = awake(DiT(Config(**SMALL)))
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([100, 100]), torch.tensor([1, 3])
    null = torch.full_like(y, 5)
    run = lambda scale: model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), scale)
    cond, uncond = model(x, t, y), model(x, t, null)
    assert not torch.allclose(cond, uncond)
    torch.testing.assert_close(run(1.0)[:2], cond)
    torch.testing.assert_close(run(0.0)[:2, :3], uncond[:, :3])
    torch.testing.assert_close(run(3.0)[:2, :3], uncond[:, :3] + 3 * (cond - uncond)[:, :3])
    torch.testing.assert_close(run(3.0)[:2, 3:], cond[:, 3:])  # sigma is not guided


@torch.no_grad()
def test_images_do_not_see_each_other():
    model = awake(DiT(Config(**SMALL)))
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([5, 400, 999]), torch.tensor([0, 1, 5])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t, y), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_heads=5), "n_heads=5"),
        (dict(input_size=9), "image size 9 is not a multiple of the patch size 2"),
        (dict(prediction="x0"), "'eps' or 'v'"),
        (dict(class_names=["a"]), "1 class names for 5 classes"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**{**SMALL, **change})


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(3)
    for prediction in ("eps", "v"):
        model, diffusion = DiT(Config(**SMALL, prediction=prediction)), GaussianDiffusion(prediction=prediction)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        x0, y, noise = torch.rand(8, 3, 8, 8), torch.arange(8) % 5, torch.randn(8, 3, 8, 8)
        t = torch.arange(8) * 120
        losses = []
        for _ in range(30):
            loss = diffusion.training_losses(model, x0, t, y, noise)["mse"].mean()
            loss.backward(), optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], losses[::10]

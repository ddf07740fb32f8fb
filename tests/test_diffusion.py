"""The diffusion process in closed form: a model that knows the answer must give it back."""

import numpy as np
import pytest
import torch

from terdit import GaussianDiffusion


class Oracle:
    """A model whose data is the one image x0: it returns exactly the noise (or v) that leads from x0 to x.

    sigma: what its sigma channels say; None leaves them out.
    """

    def __init__(self, prediction, x0, sigma=None):
        self.prediction = prediction
        self.x0 = x0
        self.sigma = sigma
        self.alphas_cumprod = torch.from_numpy(GaussianDiffusion().alphas_cumprod)
        self.timesteps = []  # that it was asked for

    def __call__(self, x, t):
        self.timesteps.append(int(t[0]))
        acp = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        out = (x - acp.sqrt() * self.x0) / (1 - acp).sqrt()
        if self.prediction == "v":
            out = acp.sqrt() * out - (1 - acp).sqrt() * self.x0
        if self.sigma is None:
            return out
        return torch.cat([out, torch.full_like(out, self.sigma)], dim=1)


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("respacing", ["", "50", "ddim25", "1"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_finds_the_image(prediction, respacing, loop):
    diffusion = GaussianDiffusion(respacing, prediction)
    x0 = torch.rand(2, 3, 4, 4) * 2 - 1
    oracle = Oracle(prediction, x0)
    sample = getattr(diffusion, loop)
    got = sample(oracle, torch.randn(2, 3, 4, 4))
    assert (got - x0).abs().max() < 1e-3
    assert oracle.timesteps == list(diffusion.timestep_map[::-1])  # of the full process, last first


@pytest.mark.parametrize("loop, options", [("p_sample_loop", {}), ("ddim_sample_loop", dict(eta=0.7))])
def test_recorded_noise_replays(loop, options):
    diffusion = GaussianDiffusion("20")
    oracle = Oracle("eps", x0=torch.rand(1, 3, 4, 4), sigma=0.3)
    start = torch.randn(1, 3, 4, 4)
    recorded = []

    def record(x):
        recorded.append(torch.randn_like(x))
        return recorded[-1]

    def sample(noise_fn):
        # An imperfect model: with a perfect one the noise would not matter.
        return getattr(diffusion, loop)(lambda x, t: 0.9 * oracle(x, t), start, noise_fn=noise_fn, **options)

    first = sample(record)
    assert len(recorded) == 20  # one draw a step, the last included

    # The last step must ignore its draw, so this one may be anything.
    replay = iter([*recorded[:-1], torch.full_like(start, 1e9)])
    assert torch.equal(sample(lambda x: next(replay)), first)
    assert not torch.allclose(sample(torch.randn_like), first)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_clip_denoised_keeps_images_in_range(loop):
    diffusion = GaussianDiffusion("10")
    sample = getattr(diffusion, loop)
    oracle = Oracle("eps", x0=torch.full((1, 3, 4, 4), 3.0))  # an image far out of [-1, 1]
    assert sample(oracle, torch.randn(1, 3, 4, 4)).mean() > 2.9
    assert sample(oracle, torch.randn(1, 3, 4, 4), clip_denoised=True).max() <= 1 + 1e-5


def test_spaced_timesteps_by_hand():
    assert GaussianDiffusion("4").timestep_map.tolist() == [0, 333, 666, 999]
    assert GaussianDiffusion("ddim4").timestep_map.tolist() == [0, 250, 500, 750]
    # 21 of 1000 lie 49.95 apart. ADM adds this up, and after ten strides it has 499.49999999999994, not 499.5.
    assert GaussianDiffusion("21").timestep_map[10] == 499


@pytest.mark.parametrize("respacing", ["0", "1001", "ddim600", "600,600", "10,15,20", "-5"])
def test_respacing_refuses(respacing):
    with pytest.raises(ValueError, match="respacing"):
        GaussianDiffusion(respacing)


# The formulas ---------------------------------------------------------------------------------------------------------


def test_q_sample_has_the_right_moments():
    n = 200_000
    x0 = torch.full((n, 1, 1, 1), 0.5)
    t = torch.full((n,), 300)
    x = GaussianDiffusion().q_sample(x0, t, torch.randn(n, 1, 1, 1))
    acp = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:301])
    assert x.mean().item() == pytest.approx(0.5 * acp**0.5, abs=4 / n**0.5)
    assert x.var().item() == pytest.approx(1 - acp, rel=0.02)


def test_v_and_eps_say_the_same():
    x = torch.randn(3, 3, 4, 4)
    x0 = torch.rand(3, 3, 4, 4)
    t = torch.tensor([1, 20, 49])

    def read(prediction):
        diffusion = GaussianDiffusion("50", prediction)
        oracle = Oracle(prediction, x0, sigma=0.2)
        model_out = oracle(x.double(), torch.from_numpy(diffusion.timestep_map)[t])
        return diffusion.p_mean_variance(model_out, x, t)

    eps = read("eps")
    v = read("v")
    for name in ("mean", "variance", "pred_xstart"):
        torch.testing.assert_close(eps[name], v[name], rtol=1e-4, atol=1e-4)


def test_sigma_channels_reach_both_ends():
    """At -1 they say the posterior's variance, at 1 they say beta: the least and the most that make sense."""
    diffusion = GaussianDiffusion()
    x = torch.randn(2, 3, 4, 4)
    t = torch.tensor([5, 900])

    def variance(sigma):
        model_out = torch.cat([x, torch.full_like(x, sigma)], dim=1)
        return diffusion.p_mean_variance(model_out, x, t)["variance"][:, 0, 0, 0]

    least = np.exp(diffusion.posterior_log_variance_clipped)
    np.testing.assert_allclose(variance(-1.0), least[t.numpy()], rtol=1e-5)
    np.testing.assert_allclose(variance(1.0), diffusion.betas[t.numpy()], rtol=1e-5)


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) is proportional to the product of two Gaussians in x_{t-1}."""
    diffusion = GaussianDiffusion()
    t = 400
    x0 = 0.3
    x = 0.8
    # The prior q(x_{t-1} | x_0), and the likelihood q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta).
    prior_mean = np.sqrt(diffusion.alphas_cumprod[t - 1]) * x0
    prior_variance = 1 - diffusion.alphas_cumprod[t - 1]
    beta = diffusion.betas[t]
    variance = 1 / (1 / prior_variance + (1 - beta) / beta)
    mean = variance * (prior_mean / prior_variance + np.sqrt(1 - beta) * x / beta)

    pixel = (1, 1, 1, 1)
    got_mean, got_log_variance = diffusion.q_posterior(torch.full(pixel, x0), torch.full(pixel, x), torch.tensor([t]))
    assert got_mean.item() == pytest.approx(mean, rel=1e-6)
    assert got_log_variance.exp().item() == pytest.approx(variance, rel=1e-6)


def test_vb_teaches_sigma_alone():
    out = torch.randn(4, 6, 4, 4, requires_grad=True)

    def model(x, t, y):
        return out

    t = torch.tensor([0, 1, 500, 999])
    GaussianDiffusion().training_losses(model, torch.rand(4, 3, 4, 4), t, None)["vb"].sum().backward()
    prediction_grad, sigma_grad = out.grad.chunk(2, dim=1)
    assert (prediction_grad == 0).all()
    assert (sigma_grad != 0).any()

"""The diffusion process in closed form: a model that knows the answer must give it back."""

import numpy as np
import pytest
import torch

from terdit import GaussianDiffusion


class Oracle:
    """A model_fn whose data is one image: it returns exactly the noise (or v) that leads from x to it."""

    def __init__(self, diffusion, x0, sigma=None):
        self.full, self.prediction, self.x0, self.sigma, self.seen = (
            GaussianDiffusion(),
            diffusion.prediction,
            x0,
            sigma,
            [],
        )

    def __call__(self, x, t):
        self.seen.append(int(t[0]))
        acp = torch.from_numpy(self.full.alphas_cumprod)[t].view(-1, 1, 1, 1)
        eps = (x - acp.sqrt() * self.x0) / (1 - acp).sqrt()
        out = eps if self.prediction == "eps" else acp.sqrt() * eps - (1 - acp).sqrt() * self.x0
        return out if self.sigma is None else torch.cat([out, torch.full_like(out, self.sigma)], 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("respacing", ["", "50", "ddim25", "10,5,5", "1"])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_finds_the_image(prediction, respacing, loop):
    diffusion = GaussianDiffusion(respacing, prediction)
    x0 = torch.rand(2, 3, 4, 4) * 2 - 1
    oracle = Oracle(diffusion, x0)
    got = getattr(diffusion, loop)(oracle, torch.randn(2, 3, 4, 4))
    assert (got - x0).abs().max() < 1e-3
    assert oracle.seen == list(diffusion.timestep_map[::-1])  # original timesteps, last first


@pytest.mark.parametrize("loop, kwargs", [("p_sample_loop", {}), ("ddim_sample_loop", dict(eta=0.7))])
def test_recorded_noise_replays(loop, kwargs):
    diffusion, x0, start = GaussianDiffusion("20"), torch.rand(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    recorded = []

    def record(x):
        recorded.append(torch.randn_like(x))
        return recorded[-1]

    half = lambda x, t: Oracle(diffusion, x0, 0.3)(x, t) * 0.9  # an imperfect model, so that the noise matters
    first = getattr(diffusion, loop)(half, start, noise_fn=record, **kwargs)
    assert len(recorded) == 20  # once a step, the last included
    replay = iter([*recorded[:-1], torch.full_like(start, 1e9)])  # whose draw is masked
    assert torch.equal(getattr(diffusion, loop)(half, start, noise_fn=lambda x: next(replay), **kwargs), first)
    other = getattr(diffusion, loop)(half, start, **kwargs)
    assert not torch.allclose(other, first)


def test_clip_denoised():
    diffusion, far = GaussianDiffusion("10"), torch.full((1, 3, 4, 4), 3.0)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        assert loop(Oracle(diffusion, far), torch.randn(1, 3, 4, 4)).mean() > 2.9
        assert loop(Oracle(diffusion, far), torch.randn(1, 3, 4, 4), clip_denoised=True).max() <= 1 + 1e-5


def test_q_sample_has_the_right_moments():
    diffusion, n = GaussianDiffusion(), 200_000
    t = torch.full((n,), 300)
    x = diffusion.q_sample(torch.full((n, 1, 1, 1), 0.5), t, torch.randn(n, 1, 1, 1))
    acp = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:301])
    assert x.mean().item() == pytest.approx(0.5 * acp**0.5, abs=4 / n**0.5)
    assert x.var().item() == pytest.approx(1 - acp, rel=0.02)


def test_v_and_eps_are_the_same_prediction():
    eps, v = GaussianDiffusion("50"), GaussianDiffusion("50", "v")
    x, x0, t = torch.randn(3, 3, 4, 4), torch.rand(3, 3, 4, 4), torch.tensor([1, 20, 49])
    reads = []
    for d in (eps, v):
        oracle = Oracle(d, x0, sigma=0.2)
        reads.append(d.p_mean_variance(oracle(x.double(), torch.from_numpy(d.timestep_map)[t]), x, t))
    for name in ("mean", "variance", "pred_xstart"):
        torch.testing.assert_close(reads[0][name], reads[1][name], rtol=1e-4, atol=1e-4)


def test_sigma_channels_reach_both_ends():
    d, x, t = GaussianDiffusion(), torch.randn(2, 3, 4, 4), torch.tensor([5, 900])
    for sigma, want in ((-1.0, np.exp(d.posterior_log_variance_clipped)), (1.0, d.betas)):
        got = d.p_mean_variance(torch.cat([x, torch.full_like(x, sigma)], 1), x, t)["variance"]
        np.testing.assert_allclose(got[:, 0, 0, 0], want[t.numpy()], rtol=1e-5)


def test_posterior_is_bayes():
    """q(x_{t-1} | x_t, x_0) from the product of the two Gaussians that make it."""
    d, t = GaussianDiffusion(), 400
    prior_mean, prior_var = np.sqrt(d.alphas_cumprod[t - 1]) * 0.3, 1 - d.alphas_cumprod[t - 1]
    x, beta = 0.8, d.betas[t]
    var = 1 / (1 / prior_var + (1 - beta) / beta)
    mean = var * (prior_mean / prior_var + np.sqrt(1 - beta) * x / beta)
    got, log_var = d.q_posterior(*(torch.full((1, 1, 1, 1), v) for v in (0.3, x)), torch.tensor([t]))
    assert got.item() == pytest.approx(mean, rel=1e-6) and log_var.exp().item() == pytest.approx(var, rel=1e-6)


def test_vb_teaches_sigma_alone():
    d, x0, t = GaussianDiffusion(), torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 500, 999])
    out = torch.randn(4, 6, 4, 4, requires_grad=True)
    d.training_losses(lambda x, t, y: out, x0, t, None)["vb"].sum().backward()
    assert (out.grad[:, :3] == 0).all() and (out.grad[:, 3:] != 0).any()


@pytest.mark.parametrize("respacing", ["0", "1001", "ddim600", "600,600", "-5"])
def test_respacing_refuses(respacing):
    with pytest.raises(ValueError, match="respacing"):
        GaussianDiffusion(respacing)

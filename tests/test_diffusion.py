"""The diffusion process in closed form: a model that knows the answer must give it back."""

import numpy as np
import pytest
import torch

from terdit import GaussianDiffusion


class Oracle:
    """A model whose data is the one image x0: it returns the noise (or v) that leads from x0 to x.
    sigma: what its sigma channels say; None leaves them out."""

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


# Sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("steps", [1000, 50, 1])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "dpm_sample_loop"])
def test_sampling_finds_the_image(prediction, steps, loop):
    diffusion = GaussianDiffusion(steps, prediction)
    x0 = torch.rand(2, 3, 4, 4) * 2 - 1
    oracle = Oracle(prediction, x0)
    sample = getattr(diffusion, loop)
    got = sample(oracle, torch.randn(2, 3, 4, 4))
    assert (got - x0).abs().max() < 1e-3
    assert oracle.timesteps == list(diffusion.timestep_map[::-1])  # one call a step, last first


def test_recorded_noise_replays():
    diffusion = GaussianDiffusion(20)
    oracle = Oracle("eps", x0=torch.rand(1, 3, 4, 4), sigma=0.3)
    start = torch.randn(1, 3, 4, 4)
    recorded = []

    def record(x):
        recorded.append(torch.randn_like(x))
        return recorded[-1]

    def sample(noise_fn):
        # An imperfect model: with a perfect one the noise would not matter.
        return diffusion.p_sample_loop(lambda x, t: 0.9 * oracle(x, t), start, noise_fn=noise_fn)

    first = sample(record)
    assert len(recorded) == 20  # one draw a step, the last included

    # The last step must ignore its draw, so this one may be anything.
    replay = iter([*recorded[:-1], torch.full_like(start, 1e9)])
    assert torch.equal(sample(lambda x: next(replay)), first)
    assert not torch.allclose(sample(torch.randn_like), first)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop", "dpm_sample_loop"])
def test_clip_denoised_keeps_images_in_range(loop):
    diffusion = GaussianDiffusion(10)
    sample = getattr(diffusion, loop)
    oracle = Oracle("eps", x0=torch.full((1, 3, 4, 4), 3.0))  # an image far out of [-1, 1]
    assert sample(oracle, torch.randn(1, 3, 4, 4)).mean() > 2.9
    assert sample(oracle, torch.randn(1, 3, 4, 4), clip_denoised=True).max() <= 1 + 1e-5


def test_spaced_timesteps_by_hand():
    assert GaussianDiffusion().timestep_map.tolist() == list(range(1000))
    assert GaussianDiffusion(4).timestep_map.tolist() == [0, 333, 666, 999]
    assert GaussianDiffusion(1).timestep_map.tolist() == [999]
    # 21 of 1000 lie 49.95 apart. ADM adds this up: ten strides are 499.49999999999994, not 499.5.
    assert GaussianDiffusion(21).timestep_map[10] == 499


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=f"{steps} steps, expected 1 to 1000"):
        GaussianDiffusion(steps)


# The formulas -------------------------------------------------------------------------------------


def test_sigma_channels_reach_both_ends():
    """At -1 they say the posterior's variance, at 1 beta: the least and the most."""
    diffusion = GaussianDiffusion()
    x = torch.randn(2, 3, 4, 4)
    t = torch.tensor([5, 900])

    def variance(sigma):
        model_out = torch.cat([x, torch.full_like(x, sigma)], dim=1)
        return diffusion.p_mean_variance(model_out, x, t)["log_variance"].exp()[:, 0, 0, 0]

    least = np.exp(diffusion.posterior_log_variance_clipped)
    np.testing.assert_allclose(variance(-1.0), least[t.numpy()], rtol=1e-5)
    np.testing.assert_allclose(variance(1.0), diffusion.betas[t.numpy()], rtol=1e-5)


def test_vb_teaches_sigma_alone():
    out = torch.randn(4, 6, 4, 4, requires_grad=True)

    def model(x, t, y):
        return out

    t = torch.tensor([0, 1, 500, 999])
    x0 = torch.rand(4, 3, 4, 4)
    losses = GaussianDiffusion().training_losses(model, x0, t, None, torch.randn_like(x0))
    losses["vb"].sum().backward()
    prediction_grad, sigma_grad = out.grad.chunk(2, dim=1)
    assert (prediction_grad == 0).all()
    assert (sigma_grad != 0).any()


# DPM-Solver++(2M) ---------------------------------------------------------------------------------


class GaussianData:
    """A model_fn that knows data of N(mean, std^2): E[x0 | x], and where the exact ODE leads."""

    mean = 0.3
    std = 0.5
    acp = torch.from_numpy(GaussianDiffusion().alphas_cumprod)

    def __init__(self, prediction="eps"):
        self.prediction = prediction
        self.seen = {}  # timestep -> x

    def spread(self, t):
        return (self.acp[t] * self.std**2 + 1 - self.acp[t]).sqrt()

    def __call__(self, x, t):
        t = int(t[0])
        self.seen[t] = x
        acp = self.acp[t]
        share = acp.sqrt() * (self.std / self.spread(t)) ** 2
        x0 = self.mean + share * (x - acp.sqrt() * self.mean)
        eps = (x - acp.sqrt() * x0) / (1 - acp).sqrt()
        return acp.sqrt() * eps - (1 - acp).sqrt() * x0 if self.prediction == "v" else eps

    def solution(self, start, t):
        """Where the ODE is at t: as many standard deviations from the mean as at the start."""
        deviations = (start - self.acp[999].sqrt() * self.mean) / self.spread(999)
        return self.acp[t].sqrt() * self.mean + self.spread(t) * deviations


def ode_error(steps, loop, prediction="eps", t=333):
    """How far the loop is from the exact ODE when it asks the model at t; 55 and 109 steps do."""
    start = torch.randn(500, 1, 1, 1, dtype=torch.float64)
    model = GaussianData(prediction)
    getattr(GaussianDiffusion(steps, prediction), loop)(model, start)
    return (model.seen[t] - model.solution(start, t)).abs().max().item()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("loop, order", [("ddim_sample_loop", 1), ("dpm_sample_loop", 2)])
def test_order_of_convergence(loop, order, prediction):
    """Half the step: the error falls to a half in first order, to a quarter in second."""
    coarse, fine = (ode_error(steps, loop, prediction) for steps in (55, 109))
    assert coarse < 0.02
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_the_last_step_is_of_first_order():
    start = torch.randn(500, 1, 1, 1, dtype=torch.float64)
    model = GaussianData()
    got = GaussianDiffusion(25).dpm_sample_loop(model, start)
    assert (got - model.solution(start, 0)).abs().max() < 0.06  # 0.3, were it of second order


def test_dpm_ignores_sigma():
    start = torch.randn(1, 3, 4, 4)
    oracles = [Oracle("eps", torch.ones(1, 3, 4, 4), sigma) for sigma in (-1.0, 1.0)]
    quiet, loud = (GaussianDiffusion(10).dpm_sample_loop(oracle, start) for oracle in oracles)
    assert torch.equal(quiet, loud)

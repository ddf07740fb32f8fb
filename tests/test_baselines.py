"""Quantization after training: by hand, and on small models."""

import math
from functools import partial

import pytest
import torch
import torch.nn as nn

from terdit import Config, DiT, TernaryLinear
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, quantize_model
from tests.baselines import reconstruct, round_to_nearest, ternary_absmean, ternary_least_squares
from tests.helpers import SMALL, awake
from tests.test_dit import random_dit


def test_ternary_by_hand():
    # mean|W| = 0.5: codes 1, 0, 1, -1; least squares: (0.75 + 0.5 + 0.625) / 3 = 0.625. Both scales are exact in fp16.
    w = torch.tensor([[0.75, -0.125], [0.5, -0.625]])
    for quantize, alpha in ((ternary_absmean, 0.5), (ternary_least_squares, 0.625)):
        got, bits = quantize(w)
        assert got.tolist() == [[alpha, 0], [alpha, -alpha]]
        assert bits == 2 + 16 / 4


def test_least_squares_is_the_best_alpha():
    w = torch.randn(16, 32).double()
    best, _ = ternary_least_squares(w)
    codes = best.sign()
    alpha = best.abs().max()

    def error(alpha):
        return (w - alpha * codes).square().sum()

    assert error(alpha) < min(error(0.99 * alpha), error(1.01 * alpha), error(w.abs().mean()))


def test_rounding_by_hand():
    # -1..2 has levels -1, 0, 1, 2. 0..3 has 0, 1, 2, 3. -2..4: step 2, levels -2, 0, 2, 4.
    w = torch.tensor([[-1.0, 2.0, 0.4, 0.6], [0.0, 3.0, 1.4, 2.6], [-2.0, 4.0, 0.9, 3.1]])
    got, bits = round_to_nearest(w)
    assert got.tolist() == [[-1, 2, 0, 1], [0, 3, 1, 3], [-2, 4, 0, 4]]
    assert bits == 2 + 18 / 4
    # In groups of 2 along K: two weights each at the ends of their range. 0.4..0.6 is widened to 0..0.6, step 0.2.
    got, bits = round_to_nearest(w[:1], group=2)
    torch.testing.assert_close(got, w[:1], atol=2e-4, rtol=0)
    assert bits == 2 + 18 / 2


def test_rounding_of_odd_groups():
    w = torch.tensor([[0.0, 0.0, 5.0], [0.3, 0.3, -0.3]])  # nothing but zeros, all equal, and a last group of one
    got, bits = round_to_nearest(w, group=2)
    torch.testing.assert_close(got, w, atol=0, rtol=1e-3)
    assert bits == 2 + 18 * 2 / 3


def test_finer_scales_make_smaller_errors():
    """On weights whose size differs between rows and along them.

    Gaussian rows of one size would favour ternary: the range of many draws is wide, and so are the four levels that
    min/max rounding spreads over it. Its scale for each row does not make up for that.
    """
    rows = torch.rand(64, 1) * 3
    parts = torch.rand(64, 4) * 3
    w = torch.randn(64, 256) * rows.exp() * parts.exp().repeat_interleave(64, 1)
    order = ["2-bit groups of 64", "2-bit groups of 128", "2-bit per channel", "ternary least squares",
             "ternary absmean"]
    errors = []
    all_bits = []
    for name in order:
        quantized, bits = QUANTIZERS[name](w)
        errors.append((quantized - w).square().sum().item())
        all_bits.append(bits)
    assert errors == sorted(errors) and errors[0] < 0.8 * errors[2] < 0.8 * errors[3]
    assert all_bits == [2 + 18 / 64, 2 + 18 / 128, 2 + 18 / 256, 2 + 16 / w.numel(), 2 + 16 / w.numel()]


@pytest.mark.parametrize("method", QUANTIZERS | RECONSTRUCTIONS)
def test_levels(method):
    """At most four levels in a group, all of them whole multiples of a step that fp16 can hold."""
    w = torch.randn(8, 128)
    x = torch.randn(500, 128)
    if method in RECONSTRUCTIONS:
        got, bits = RECONSTRUCTIONS[method](w, x.T @ x)
    else:
        got, bits = QUANTIZERS[method](w)
    assert got.shape == w.shape and got.dtype == w.dtype and 2 < bits < 2.3
    group = 64 if "groups of 64" in method else 128
    if method.startswith("ternary"):
        group = w.numel()
    for part in got.reshape(-1, group):
        levels = part.unique()
        step = levels.diff().min()
        assert 2 <= len(levels) <= 4 and 0 in levels
        torch.testing.assert_close(levels / step, (levels / step).round(), atol=1e-5, rtol=0)
        assert step.half().float() == pytest.approx(step.item(), rel=1e-6)


@pytest.mark.parametrize("group", [None, 64])
def test_reconstruction_keeps_the_output(group):
    mix = torch.randn(96, 96) * torch.logspace(0, -2, 96)[:, None]  # inputs are correlated, as activations are
    seen = torch.randn(2000, 96) @ mix
    held_out = torch.randn(500, 96) @ mix
    w = torch.randn(48, 96) / 10
    rounded, _ = round_to_nearest(w, group)
    rebuilt, _ = reconstruct(w, seen.T @ seen, group)
    for x in (seen, held_out):
        error_rounded = (x @ (w - rounded).T).square().mean()
        error_rebuilt = (x @ (w - rebuilt).T).square().mean()
        assert error_rebuilt < 0.5 * error_rounded
    assert (w - rebuilt).square().sum() > (w - rounded).square().sum()  # rounding is the best for the weight itself


def test_reconstruction_of_independent_inputs_is_rounding():
    w = torch.randn(8, 16)
    assert torch.equal(reconstruct(w, torch.eye(16) * 7)[0], round_to_nearest(w)[0])


def test_reconstruction_by_hand():
    """Two inputs that are always equal: only the sum of their weights counts, and the second makes up for the first.

    The levels are 0, 1, 2 and 3: the row's last weight, whose input is independent, sets the range. The sum is
    1.4 + 1.4 = 2.8. Rounding makes 1 + 1 of it. Here the first weight is rounded to 1, which moves the second to about
    1.8, and that is rounded to 2.
    """
    x = torch.tensor([[1.0, 1, 0], [-1, -1, 0], [0, 0, 1], [0, 0, -1]])
    w = torch.tensor([[1.4, 1.4, 3.0]])
    assert round_to_nearest(w)[0].tolist() == [[1, 1, 3]]
    assert reconstruct(w, x.T @ x)[0].tolist() == [[1, 2, 3]]


def full_precision(**change):
    return awake(DiT(Config(**SMALL | change, ternary=False, adaln_norm=False)))


def calibrate(model):
    """Run the model on noise at four timesteps."""
    torch.manual_seed(5)
    for t in (0, 300, 600, 999):
        model(torch.randn(8, 3, 8, 8), torch.full((8,), t), torch.arange(8) % 6)


@torch.no_grad()
@pytest.mark.parametrize("method", QUANTIZERS | RECONSTRUCTIONS)
def test_quantize_model(method):
    model = full_precision()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = quantize_model(model, method, calibrate)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "not a copy"
    changed = {name for name, value in small.state_dict().items() if not torch.equal(value, before[name])}
    ternary = {f"{name}.weight" for name, module in DiT(Config(**SMALL)).named_modules()
               if isinstance(module, TernaryLinear)}
    assert changed == ternary and len(ternary) == 16
    total = sum(before[name].numel() for name in ternary)
    if method.startswith("ternary"):
        assert small.bits_per_weight == pytest.approx(2 + 16 * len(ternary) / total)
    elif "channel" in method:  # each row has 32 weights, but 96 in the two w2
        w2 = 2 * 32 * 96
        assert small.bits_per_weight == pytest.approx(2 + 18 * (w2 / 96 + (total - w2) / 32) / total)
    assert small(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])).isfinite().all()


@torch.no_grad()
def test_reconstruction_helps_the_model():
    """Layer by layer, on inputs that the calibration did not see."""
    model = full_precision()
    rounded = quantize_model(model, "2-bit per channel", calibrate)
    rebuilt = quantize_model(model, "2-bit per channel, reconstructed", calibrate)
    recorded = {}

    def record(name, module, args):
        recorded[name] = args[0].flatten(0, -2)

    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(partial(record, name))
    model(torch.randn(16, 3, 8, 8), torch.randint(1000, (16,)), torch.arange(16) % 6)

    def error(quantized, name):
        change = quantized.layers.get_submodule(name).weight - model.layers.get_submodule(name).weight
        return (recorded[name] @ change.T).square().sum().item()

    ratios = [error(rebuilt, name) / error(rounded, name) for name in recorded]
    assert len(ratios) == 16 and sum(ratios) < 0.9 * len(ratios)


def test_quantize_model_refuses():
    model = full_precision()
    with pytest.raises(ValueError, match="method='int3', expected one of: ternary absmean; "):
        quantize_model(model, "int3")
    with pytest.raises(ValueError, match="got a ternary one"):
        quantize_model(DiT(Config(**SMALL)), "ternary absmean")
    with pytest.raises(ValueError, match="got MetaDiT"):
        quantize_model(random_dit(), "ternary absmean")
    for name in RECONSTRUCTIONS:
        with pytest.raises(ValueError, match="needs calibration"):
            quantize_model(model, name)
    method = "2-bit per channel, reconstructed"
    with pytest.raises(ValueError, match="never ran 16 of the model's layers, 0.attention.wq"):
        quantize_model(model, method, lambda model: None)
    with pytest.raises(ValueError, match="finite and not all zero"):
        reconstruct(torch.randn(4, 4), torch.zeros(4, 4))

    def run_on_nan(model):
        model(torch.full((1, 3, 8, 8), math.nan), torch.ones(1), torch.ones(1).long())

    with pytest.raises(ValueError, match="finite and not all zero"):
        quantize_model(model, method, run_on_nan)

"""The baselines: DiT against a second implementation by explicit formulas, and quantization after training by hand."""

import math
import os
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from sample import sample_images
from terdit import Config, DiT, TernaryLinear
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, DiTConfig, DiTXL, load_dit, quantize_model, sincos_positions
from tests.baselines import reconstruct, round_to_nearest, ternary_absmean, ternary_least_squares
from tests.test_checkpoint import Evil
from tests.test_ternary import SMALL, awake

TINY = dict(input_size=6, patch_size=2, in_channels=4, dim=24, n_layers=2, n_heads=3, mlp_dim=60, num_classes=5)


def random_dit(**change):
    """A DiT whose every weight matters, at a spread that keeps attention and gates in their curved range."""
    model = DiTXL(DiTConfig(**TINY | change))
    for name, p in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model.eval()


def inputs(n=4, channels=4, size=6):
    rng = torch.Generator().manual_seed(7)
    return (
        torch.randn(n, channels, size, size, generator=rng),
        torch.tensor([0, 999, 500.5, 17])[:n],
        torch.tensor([0, 5, 2, 4])[:n],
    )


# ----------------------------------------------------------------------------------------------------------------------
# DiT


def positions_by_loops(grid, dim):
    table = np.empty((grid * grid, dim))
    for row in range(grid):
        for column in range(grid):
            for half, place in enumerate((column, row)):
                for i in range(dim // 4):
                    angle = place / 10000 ** (i / (dim // 4))
                    at = half * (dim // 2) + i
                    table[row * grid + column, at] = math.sin(angle)
                    table[row * grid + column, at + dim // 4] = math.cos(angle)
    return table


def dit_by_formulas(state, x, t, y, heads, patch=2):
    """DiT of one image x (C, H, W), from its state dict, in float64 numpy and the plainest form of every step."""
    w = {k: v.double().numpy() for k, v in state.items()}
    linear = lambda name, z: z @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    silu = lambda z: z / (1 + np.exp(-z))
    gelu = lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    norm = lambda z: (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6)
    dim, grid = len(w["x_embedder.proj.bias"]), x.shape[1] // patch
    h = w["pos_embed"][0].copy()
    for i in range(grid):
        for j in range(grid):
            pixels = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            h[i * grid + j] += (w["x_embedder.proj.weight"] * pixels).sum((1, 2, 3)) + w["x_embedder.proj.bias"]
    angles = [t * 10000 ** (-k / 128) for k in range(128)]
    c = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", c))) + w["y_embedder.embedding_table.weight"][y]
    for b in range(sum(k.endswith("attn.proj.bias") for k in w)):
        m = linear(f"blocks.{b}.adaLN_modulation.1", silu(c)).reshape(6, dim)
        qkv, out = linear(f"blocks.{b}.attn.qkv", norm(h) * (1 + m[1]) + m[0]), []
        for head in range(heads):
            own = slice(head * dim // heads, (head + 1) * dim // heads)
            q, k, v = (qkv[:, i * dim : (i + 1) * dim][:, own] for i in range(3))
            p = np.exp(q @ k.T / math.sqrt(dim / heads))
            out.append(p / p.sum(1, keepdims=True) @ v)
        h = h + m[2] * linear(f"blocks.{b}.attn.proj", np.concatenate(out, 1))
        hidden = gelu(linear(f"blocks.{b}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]))
        h = h + m[5] * linear(f"blocks.{b}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c)).reshape(2, dim)
    rows = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    channels = rows.shape[1] // patch**2
    image = np.empty((channels, grid * patch, grid * patch))
    for token, row in enumerate(rows):
        for a in range(patch):
            for b in range(patch):
                for channel in range(channels):
                    at = token // grid * patch + a, token % grid * patch + b
                    image[(channel, *at)] = row[(a * patch + b) * channels + channel]
    return image


@torch.no_grad()
@pytest.mark.parametrize("size_of_h", [1, 1e-3])  # the small one sees the norms' eps
@pytest.mark.parametrize("change", [{}, dict(learn_sigma=False, in_channels=3, dim=32, n_heads=2)])
def test_dit_equals_its_formulas(change, size_of_h):
    model = random_dit(**change)
    for p in (model.pos_embed, *model.x_embedder.parameters()):
        p.mul_(size_of_h)
    cfg = model.config
    x, t, y = inputs(channels=cfg.in_channels)
    got = model(x, t, y).double().numpy()
    state = model.state_dict()
    want = np.stack([dit_by_formulas(state, x[i].double().numpy(), t[i].item(), y[i], cfg.n_heads) for i in range(4)])
    assert want.std() > 0.5
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_positions():
    for grid, dim in ((3, 8), (16, 1152)):
        got = sincos_positions(grid, dim)
        assert got.shape == (1, grid**2, dim) and got.dtype == torch.float32
        np.testing.assert_allclose(got[0].double().numpy(), positions_by_loops(grid, dim), atol=1e-7)


def test_xl_2_is_the_released_size():
    """292 tensors and 675,129,632 values, as DiT's training log says of DiT-XL/2 at 256x256."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in DiTXL(DiTConfig()).state_dict().items()}
    d = 1152
    linear = lambda name, n, k: {f"{name}.weight": (n, k), f"{name}.bias": (n,)}
    want = {"pos_embed": (1, 256, d), "x_embedder.proj.weight": (d, 4, 2, 2), "x_embedder.proj.bias": (d,)}
    want |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
    want |= {"y_embedder.embedding_table.weight": (1001, d)}
    for i in range(28):
        want |= linear(f"blocks.{i}.attn.qkv", 3 * d, d) | linear(f"blocks.{i}.attn.proj", d, d)
        want |= linear(f"blocks.{i}.mlp.fc1", 4 * d, d) | linear(f"blocks.{i}.mlp.fc2", d, 4 * d)
        want |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    want |= linear("final_layer.linear", 32, d) | linear("final_layer.adaLN_modulation.1", 2 * d, d)
    assert shapes == want
    assert len(shapes) == 292 and sum(map(math.prod, shapes.values())) == 675_129_632


def test_training_starts_from_the_identity():
    model = DiTXL(DiTConfig(**TINY))
    h, c = torch.randn(2, 9, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](h, c), h)
    assert not model.pos_embed.requires_grad
    assert (model(*inputs()) == 0).all()
    # The patch embedding as a linear layer of 16 inputs and 24 outputs: Xavier, not a convolution's Kaiming (0.25).
    assert 0.3 < model.x_embedder.proj.weight.max() <= math.sqrt(6 / (16 + 24))
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@torch.no_grad()
@pytest.mark.parametrize("channels", [None, 3])
def test_guidance(channels):
    model = random_dit()
    x, t, _ = inputs()
    t[2:], y = t[:2], torch.tensor([1, 3, 5, 5])
    out = model.forward_with_cfg(x, t, y, 4.0, guided_channels=channels)
    cond, null = model(x[:2], t[:2], y[:2]), model(x[:2], t[:2], y[2:])
    g = channels or 4
    want = null + 4 * (cond - null)
    for half, plain in ((out[:2], cond), (out[2:], null)):
        torch.testing.assert_close(half[:, :g], want[:, :g], atol=2e-5, rtol=0)
        torch.testing.assert_close(half[:, g:], plain[:, g:], atol=2e-5, rtol=0)
    assert (want[:, 3] - cond[:, 3]).abs().max() > 0.1  # what the fourth channel does matters


def test_size_is_checked():
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 9\), expected \(N, 4, 6, 6\)"):
        random_dit()(torch.randn(2, 4, 4, 9), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["state dict", "bare file", "training checkpoint", "model without ema"])
def test_load(tmp_path, kind):
    change = dict(learn_sigma=False) if kind == "bare file" else dict(patch_size=3, mlp_dim=48)
    model, other = random_dit(**change), random_dit(**change)
    state, source = model.state_dict(), tmp_path / "dit.pt"
    if kind == "training checkpoint":  # as DiT's train.py writes it, arguments included
        state = {"model": other.state_dict(), "ema": state, "opt": {}, "args": Namespace(model="DiT-XL/2", epochs=1400)}
    elif kind == "model without ema":
        state = {"model": state}
    torch.save(state, source)
    loaded = load_dit(state if kind == "state dict" else source, n_heads=3)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*inputs()), model(*inputs()))


@torch.no_grad()
def test_heads_matter():
    model = random_dit()
    assert (load_dit(model.state_dict(), n_heads=2)(*inputs()) - model(*inputs())).abs().max() > 0.01


def test_bad_checkpoints(tmp_path):
    good = random_dit().state_dict()
    without = lambda name: {k: v for k, v in good.items() if k != name}
    cases = {
        "no x_embedder.proj.weight in it, but epoch": {"epoch": 3},
        "no blocks.0.mlp.fc1.weight": {k: v for k, v in good.items() if "blocks" not in k},
        "Missing key.*blocks.1.attn.qkv.bias": without("blocks.1.attn.qkv.bias"),
        "Unexpected key.*blocks.0.attn.q_norm.weight": good | {"blocks.0.attn.q_norm.weight": torch.ones(8)},
        "size mismatch for blocks.1.attn.proj.weight": good | {"blocks.1.attn.proj.weight": torch.ones(24, 20)},
        "size mismatch for pos_embed": good | {"pos_embed": torch.zeros(1, 10, 24)},
        "size mismatch for final_layer.linear.weight": good | {"final_layer.linear.weight": torch.ones(20, 24)},
        "no x_embedder.proj.weight": DiT(Config(**SMALL)).state_dict(),
    }
    for message, state in cases.items():
        with pytest.raises(ValueError, match=f"state dict: not a state dict of DiT.*{message}"):
            load_dit(state, n_heads=3)
    for heads in (5, 0):
        with pytest.raises(ValueError, match=f"dim=24 must be a multiple of n_heads={heads}"):
            load_dit(good, n_heads=heads)
    path = tmp_path / "x.pt"
    with pytest.raises(FileNotFoundError, match="x.pt.*state dict of DiT"):
        load_dit(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="x.pt: not a state dict of DiT"):
        load_dit(path)
    torch.save(good, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="x.pt: not a state dict of DiT.*cut short"):
        load_dit(path, n_heads=3)
    torch.save({"ema": good, "args": Evil(tmp_path / "folder")}, path)
    with pytest.raises(ValueError, match="x.pt: not a state dict of DiT"):
        load_dit(path, n_heads=3)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_sample_py_runs_a_dit():
    state = random_dit(in_channels=3).state_dict()
    assert load_dit(state, n_heads=3).config.vae  # DiT's files are of latents, which must not be clipped like pixels
    model = load_dit(state, n_heads=3, vae=None)
    one, two = (sample_images(model, [0, 4], cfg=scale, steps=2) for scale in (1, 4.0))
    assert one.shape == (2, 3, 6, 6) and one.isfinite().all() and not torch.equal(one, two)


# ----------------------------------------------------------------------------------------------------------------------
# Quantization after training


def test_ternary_by_hand():
    # mean|W| = 0.5: codes 1, 0, 1, -1; least squares: (0.75 + 0.5 + 0.625) / 3 = 0.625. Both scales are exact in fp16.
    w = torch.tensor([[0.75, -0.125], [0.5, -0.625]])
    for quantize, alpha in ((ternary_absmean, 0.5), (ternary_least_squares, 0.625)):
        got, bits = quantize(w)
        assert got.tolist() == [[alpha, 0], [alpha, -alpha]]
        assert bits == 2 + 16 / 4


def test_least_squares_is_the_best_alpha():
    w = torch.randn(16, 32).double()
    codes, (best, _) = ternary_absmean(w)[0].sign(), ternary_least_squares(w)
    error = lambda alpha: (w - alpha * codes).square().sum().item()
    alpha = best.abs().max().item()
    assert error(alpha) < min(error(0.99 * alpha), error(1.01 * alpha), error(w.abs().mean().item()))


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
    """On weights whose size differs between rows and along them. (Gaussian rows of one size would favour ternary: the
    range of many draws is wide, which costs min/max rounding more than its scales a row bring.)"""
    rows, parts = torch.rand(64, 1) * 3, torch.rand(64, 4) * 3
    w = torch.randn(64, 256) * rows.exp() * parts.exp().repeat_interleave(64, 1)
    order = ["2-bit groups of 64", "2-bit groups of 128", "2-bit per channel", "ternary least squares",
             "ternary absmean"]  # fmt: skip
    errors = [(QUANTIZERS[name](w)[0] - w).square().sum().item() for name in order]
    assert errors == sorted(errors) and errors[0] < 0.8 * errors[2] < 0.8 * errors[3]
    bits = [QUANTIZERS[name](w)[1] for name in order]
    assert bits == [2 + 18 / 64, 2 + 18 / 128, 2 + 18 / 256, 2 + 16 / w.numel(), 2 + 16 / w.numel()]


@pytest.mark.parametrize("method", QUANTIZERS | RECONSTRUCTIONS)
def test_levels(method):
    """Four levels a group at most, on a grid that a code and an fp16 scale can say."""
    w, x = torch.randn(8, 128), torch.randn(500, 128)
    if method in RECONSTRUCTIONS:
        got, bits = RECONSTRUCTIONS[method](w, x.T @ x)
    else:
        got, bits = QUANTIZERS[method](w)
    assert got.shape == w.shape and got.dtype == w.dtype and 2 < bits < 2.3
    group = 64 if "groups of 64" in method else 128
    for part in got.flatten()[None] if method.startswith("ternary") else got.reshape(-1, group):
        levels = part.unique()
        step = levels.diff().min()
        assert 2 <= len(levels) <= 4 and 0 in levels
        torch.testing.assert_close(levels / step, (levels / step).round(), atol=1e-5, rtol=0)
        assert step.half().float() == pytest.approx(step.item(), rel=1e-6)


@pytest.mark.parametrize("group", [None, 64])
def test_reconstruction_keeps_the_output(group):
    mix = torch.randn(96, 96) * torch.logspace(0, -2, 96)[:, None]  # inputs are correlated, as activations are
    seen, held_out = (torch.randn(n, 96) @ mix for n in (2000, 500))
    w = torch.randn(48, 96) / 10
    rounded, _ = round_to_nearest(w, group)
    rebuilt, _ = reconstruct(w, seen.T @ seen, group)
    for x in (seen, held_out):
        error = lambda q: (x @ (w - q).T).square().mean().item()
        assert error(rebuilt) < 0.5 * error(rounded)
    assert (w - rebuilt).square().sum() > (w - rounded).square().sum()  # rounding is the best for the weight itself


def test_reconstruction_of_independent_inputs_is_rounding():
    w = torch.randn(8, 16)
    assert torch.equal(reconstruct(w, torch.eye(16) * 7)[0], round_to_nearest(w)[0])


def test_reconstruction_by_hand():
    """Two inputs that are always equal: only the sum of the two weights counts, and the second makes up for the first.

    Levels 0, 1, 2, 3 (the row's last weight sets the range, its input is independent). 1.4 + 1.4 = 2.8: rounding gives
    1 + 1; here the first is rounded to 1, the second, moved to about 1.8, to 2.
    """
    x = torch.tensor([[1.0, 1, 0], [-1, -1, 0], [0, 0, 1], [0, 0, -1]])
    w = torch.tensor([[1.4, 1.4, 3.0]])
    assert round_to_nearest(w)[0].tolist() == [[1, 1, 3]]
    assert reconstruct(w, x.T @ x)[0].tolist() == [[1, 2, 3]]


def full_precision(**change):
    return awake(DiT(Config(**SMALL | change, ternary=False, adaln_norm=False)))


def calibrate(model):
    torch.manual_seed(5)
    for t in (0, 300, 600, 999):
        model(torch.randn(8, 3, 8, 8), torch.full((8,), t), torch.arange(8) % 6)


@torch.no_grad()
@pytest.mark.parametrize("method", QUANTIZERS | RECONSTRUCTIONS)
def test_quantize_model(method):
    model = full_precision()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = quantize_model(model, method, calibrate)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the original is left alone
    ternary = {f"{n}.weight" for n, m in DiT(Config(**SMALL)).named_modules() if isinstance(m, TernaryLinear)}
    changed = {k for k, v in small.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ternary and len(ternary) == 16
    if method.startswith("ternary"):
        weights = [before[k].numel() for k in ternary]
        assert small.bits_per_weight == pytest.approx(2 + 16 * len(weights) / sum(weights))
    elif "channel" in method:  # 32 inputs, but 96 into w2
        w2 = 2 * 32 * 96
        total = sum(before[k].numel() for k in ternary)
        assert small.bits_per_weight == pytest.approx(2 + 18 * (w2 / 96 + (total - w2) / 32) / total)
    assert small(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])).isfinite().all()


@torch.no_grad()
def test_reconstruction_helps_the_model():
    """Layer by layer, on inputs that the calibration did not see."""
    model = full_precision()
    weights = lambda m: {n: z.weight for n, z in m.layers.named_modules() if isinstance(z, nn.Linear)}
    names = "2-bit per channel", "2-bit per channel, reconstructed"
    full, rounded, rebuilt = map(weights, (model, *(quantize_model(model, name, calibrate) for name in names)))
    seen = {}
    for n in full:
        keep = lambda module, args, n=n: seen.__setitem__(n, args[0].flatten(0, -2))
        model.layers.get_submodule(n).register_forward_pre_hook(keep)
    model(torch.randn(16, 3, 8, 8), torch.randint(1000, (16,)), torch.arange(16) % 6)
    error = lambda w, n: (seen[n] @ (w[n] - full[n]).T).square().sum().item()
    ratios = [error(rebuilt, n) / error(rounded, n) for n in full]
    assert len(ratios) == 16 and sum(ratios) < 0.9 * len(ratios)


def test_quantize_model_refuses():
    model = full_precision()
    with pytest.raises(ValueError, match="method='int3', expected one of: ternary absmean; "):
        quantize_model(model, "int3")
    with pytest.raises(ValueError, match="got a ternary one"):
        quantize_model(DiT(Config(**SMALL)), "ternary absmean")
    with pytest.raises(ValueError, match="got DiTXL"):
        quantize_model(random_dit(), "ternary absmean")
    for name in RECONSTRUCTIONS:
        with pytest.raises(ValueError, match="needs calibration"):
            quantize_model(model, name)
    with pytest.raises(ValueError, match="never ran 16 of the model's layers, 0.attention.wq"):
        quantize_model(model, name, lambda m: None)
    with pytest.raises(ValueError, match="finite and not all zero"):
        reconstruct(torch.randn(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="finite and not all zero"):
        quantize_model(
            model, name, lambda m: m(torch.full((1, 3, 8, 8), math.nan), torch.ones(1), torch.ones(1).long())
        )

"""The baselines: DiT against a second implementation by explicit formulas, and quantization after training by hand."""

import math
import os
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn

from sample import sample_images
from terdit import Config, DiT, TernaryLinear
from tests.baselines import QUANTIZERS, RECONSTRUCTIONS, DiTConfig, DiTXL, load_dit, quantize_model, sincos_positions
from tests.baselines import reconstruct, round_to_nearest, ternary_absmean, ternary_least_squares
from tests.helpers import SMALL, awake
from tests.test_checkpoint import Evil

TINY = dict(input_size=6, patch_size=2, in_channels=4, dim=24, n_layers=2, n_heads=3, mlp_dim=60, num_classes=5)


def random_dit(**change):
    """A DiT whose every weight matters, at a spread that keeps attention and gates in their curved range."""
    model = DiTXL(DiTConfig(**TINY | change))
    for name, p in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return model.eval()


def inputs(channels=4):
    """x, t and y of four samples."""
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(4, channels, 6, 6, generator=rng)
    return x, torch.tensor([0, 999, 500.5, 17]), torch.tensor([0, 5, 2, 4])


# ----------------------------------------------------------------------------------------------------------------------
# DiT


def positions_by_loops(grid, dim):
    table = np.empty((grid * grid, dim))
    for row in range(grid):
        for column in range(grid):
            for half, position in enumerate((column, row)):
                for i in range(dim // 4):
                    angle = position / 10000 ** (i / (dim // 4))
                    channel = half * (dim // 2) + i
                    table[row * grid + column, channel] = math.sin(angle)
                    table[row * grid + column, channel + dim // 4] = math.cos(angle)
    return table


class FormulaDiT:
    """DiT of one image, in float64 numpy and the plainest form of every step."""

    def __init__(self, state, heads, patch=2):
        self.weights = {name: value.double().numpy() for name, value in state.items()}
        self.heads = heads
        self.patch = patch
        self.dim = len(self.weights["x_embedder.proj.bias"])
        self.n_blocks = sum(name.endswith("attn.proj.bias") for name in self.weights)

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def modulated_norm(self, h, shift, scale):
        normed = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-6)
        return normed * (1 + scale) + shift

    def embed(self, x):
        """x (C, H, W) -> tokens (T, D)."""
        p = self.patch
        grid = x.shape[1] // p
        h = self.weights["pos_embed"][0].copy()
        for i in range(grid):
            for j in range(grid):
                pixels = x[:, i * p : (i + 1) * p, j * p : (j + 1) * p]
                h[i * grid + j] += (self.weights["x_embedder.proj.weight"] * pixels).sum((1, 2, 3))
        return h + self.weights["x_embedder.proj.bias"]

    def condition(self, t, y):
        angles = [t * 10000 ** (-k / 128) for k in range(128)]
        waves = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        of_t = self.linear("t_embedder.mlp.2", silu(self.linear("t_embedder.mlp.0", waves)))
        return of_t + self.weights["y_embedder.embedding_table.weight"][y]

    def attention(self, block, h):
        qkv = self.linear(f"{block}.attn.qkv", h)  # (T, 3 * D)
        outputs = []
        for head in range(self.heads):
            own = slice(head * self.dim // self.heads, (head + 1) * self.dim // self.heads)
            q = qkv[:, : self.dim][:, own]
            k = qkv[:, self.dim : 2 * self.dim][:, own]
            v = qkv[:, 2 * self.dim :][:, own]
            p = np.exp(q @ k.T / math.sqrt(self.dim / self.heads))
            outputs.append(p / p.sum(1, keepdims=True) @ v)
        return self.linear(f"{block}.attn.proj", np.concatenate(outputs, 1))

    def unpatchify(self, rows, grid):
        """rows (T, p * p * C) -> (C, H, W)."""
        p = self.patch
        channels = rows.shape[1] // p**2
        image = np.empty((channels, grid * p, grid * p))
        for token, row in enumerate(rows):
            for a in range(p):
                for b in range(p):
                    for channel in range(channels):
                        y = token // grid * p + a
                        x = token % grid * p + b
                        image[channel, y, x] = row[(a * p + b) * channels + channel]
        return image

    def __call__(self, x, t, y):
        h = self.embed(x)
        c = silu(self.condition(t, y))
        for i in range(self.n_blocks):
            block = f"blocks.{i}"
            modulation = self.linear(f"{block}.adaLN_modulation.1", c).reshape(6, self.dim)
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
            h = h + gate_msa * self.attention(block, self.modulated_norm(h, shift_msa, scale_msa))
            hidden = gelu(self.linear(f"{block}.mlp.fc1", self.modulated_norm(h, shift_mlp, scale_mlp)))
            h = h + gate_mlp * self.linear(f"{block}.mlp.fc2", hidden)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", c).reshape(2, self.dim)
        rows = self.linear("final_layer.linear", self.modulated_norm(h, shift, scale))
        return self.unpatchify(rows, x.shape[1] // self.patch)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


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
    formulas = FormulaDiT(model.state_dict(), cfg.n_heads)
    want = np.stack([formulas(x[i].double().numpy(), t[i].item(), y[i]) for i in range(4)])
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
        shapes = {name: tuple(value.shape) for name, value in DiTXL(DiTConfig()).state_dict().items()}
    d = 1152
    linears = {  # name: shape of the weight
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (32, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    for i in range(28):
        linears[f"blocks.{i}.attn.qkv"] = (3 * d, d)
        linears[f"blocks.{i}.attn.proj"] = (d, d)
        linears[f"blocks.{i}.mlp.fc1"] = (4 * d, d)
        linears[f"blocks.{i}.mlp.fc2"] = (d, 4 * d)
        linears[f"blocks.{i}.adaLN_modulation.1"] = (6 * d, d)
    want = {
        "pos_embed": (1, 256, d),
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "y_embedder.embedding_table.weight": (1001, d),
    }
    for name, shape in linears.items():
        want[f"{name}.weight"] = shape
        want[f"{name}.bias"] = shape[:1]
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
    t[2:] = t[:2]
    y = torch.tensor([1, 3, 5, 5])
    out = model.forward_with_cfg(x, t, y, 4.0, guided_channels=channels)
    cond = model(x[:2], t[:2], y[:2])
    null = model(x[:2], t[:2], y[2:])
    want = null + 4 * (cond - null)
    guided = channels or 4
    for half, plain in ((out[:2], cond), (out[2:], null)):
        torch.testing.assert_close(half[:, :guided], want[:, :guided], atol=2e-5, rtol=0)
        torch.testing.assert_close(half[:, guided:], plain[:, guided:], atol=2e-5, rtol=0)
    assert (want[:, 3] - cond[:, 3]).abs().max() > 0.1  # what the fourth channel does matters


def test_size_is_checked():
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 9\), expected \(B, 4, 6, 6\)"):
        random_dit()(torch.randn(2, 4, 4, 9), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["state dict", "bare file", "training checkpoint", "model without ema"])
def test_load(tmp_path, kind):
    if kind == "bare file":
        change = dict(learn_sigma=False)
    else:
        change = dict(patch_size=3, mlp_dim=48)
    model = random_dit(**change)
    other = random_dit(**change)
    state = model.state_dict()
    if kind == "training checkpoint":  # as DiT's train.py writes it, arguments included
        state = {"model": other.state_dict(), "ema": state, "opt": {}, "args": Namespace(model="DiT-XL/2", epochs=1400)}
    elif kind == "model without ema":
        state = {"model": state}
    path = tmp_path / "dit.pt"
    torch.save(state, path)
    loaded = load_dit(state if kind == "state dict" else path, n_heads=3)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded(*inputs()), model(*inputs()))


def test_bad_checkpoints(tmp_path):
    good = random_dit().state_dict()
    without_blocks = {name: value for name, value in good.items() if "blocks" not in name}
    without_a_bias = {name: value for name, value in good.items() if name != "blocks.1.attn.qkv.bias"}
    cases = {
        "no x_embedder.proj.weight in it, but epoch": {"epoch": 3},
        "no blocks.0.mlp.fc1.weight": without_blocks,
        "Missing key.*blocks.1.attn.qkv.bias": without_a_bias,
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
    unguided = sample_images(model, [0, 4], cfg_scale=1, steps=2)
    guided = sample_images(model, [0, 4], cfg_scale=4.0, steps=2)
    assert unguided.shape == (2, 3, 6, 6) and unguided.isfinite().all()
    assert not torch.equal(unguided, guided)


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
    with pytest.raises(ValueError, match="got DiTXL"):
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

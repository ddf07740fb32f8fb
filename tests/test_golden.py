"""Numbers that the published code of TerDiT, Large-DiT and DiT computed, against ours.

golden/ was made by running their source on a CPU in fp32.
"""

import json
import re

import numpy as np
import pytest
import torch

from terdit import NUM_TIMESTEPS, SIZES, Config, DiT, GaussianDiffusion, TernaryLinear
from terdit import TernaryWeight, load_model, rotary_table, rotate, timestep_embedding
from terdit import unpack_ternary
from tests.helpers import GOLDEN, RELEASED


def assert_close(got, want, tol=1e-5, name=""):
    """max|got - want| <= tol * max|want|"""
    got = np.asarray(got, dtype=np.float64)
    want = np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, name
    assert np.abs(got - want).max() <= tol * np.abs(want).max(), name


def load_arrays(path):
    """An .npz file -> dict of its arrays as tensors, and of its texts."""
    entries = {}
    for name, value in np.load(path).items():
        is_number = value.dtype.kind in "fiu"
        entries[name] = torch.from_numpy(value) if is_number else str(value)
    return entries


# The models ---------------------------------------------------------------------------------------


@pytest.fixture(params=RELEASED)
def released(request):
    """A small folder as upstream releases them -> our model of it, and what upstream's computed."""
    folder = RELEASED[request.param]
    return load_model(folder, n_heads=4), load_arrays(folder / "io.npz")


@torch.no_grad()
def test_outputs(released):
    model, golden = released
    assert_close(model(golden["x"], golden["t"], golden["y"]), golden["out"])
    assert_close(model(golden["x"], golden["t_float"], golden["y"]), golden["out_tfloat"])


@torch.no_grad()
@pytest.mark.parametrize("name, scale", [("out_cfg4", 4.0), ("out_cfg1p5", 1.5)])
def test_guided_outputs(released, name, scale):
    model, golden = released
    inputs = (golden["cfg_x"], golden["cfg_t"], golden["cfg_y"], scale)
    upstream = model.forward_with_cfg(*inputs, guided_channels=3)
    assert_close(upstream, golden[name])
    ours = model.forward_with_cfg(*inputs)
    assert_close(ours[:, :3], upstream[:, :3])
    assert not torch.allclose(ours[:, 3], upstream[:, 3])  # we guide the fourth latent channel, too


@torch.no_grad()
def test_label_embeddings(released):
    model, golden = released
    dropped = golden["force_drop_ids"] == 1
    labels = torch.where(dropped, model.config.num_classes, golden["label_in"])
    assert_close(model.y_embedder(labels), golden["label_emb"])


@torch.no_grad()
def test_norm_eps(released):
    """Upstream's outputs after some weights were shrunk, so that the eps of the norms shows."""
    model, golden = released
    rules = json.loads(golden["eps_rules_json"])
    for name, p in model.named_parameters():
        for pattern, _, factor in rules:
            if re.fullmatch(pattern, name):
                p.mul_(factor)
    assert_close(model(golden["x"], golden["t"], golden["y"]), golden["out_epsvariant"])


@torch.no_grad()
def test_intermediates(released):
    model, golden = released
    # the name in golden -> the module that outputs it
    modules = {f"h/{name}_embedder": f"{name}_embedder" for name in "xty"}
    modules |= {f"h/layers.0.{name}_pre": f"layers.0.attention.w{name}" for name in "qk"}
    modules["h/final_layer"] = "final_layer"
    for i in range(2):
        modules[f"h/layers.{i}.adaLN"] = f"layers.{i}.adaLN_modulation"
        modules[f"h/layers.{i}.attention"] = f"layers.{i}.attention"
        modules[f"h/layers.{i}.feed_forward"] = f"layers.{i}.feed_forward"
        modules[f"h/layers.{i}"] = f"layers.{i}"
    seen = {}

    def record_as(name):
        def hook(module, inputs, out):
            seen[name] = out[:2]

        return hook

    for name, path in modules.items():
        model.get_submodule(path).register_forward_hook(record_as(name))
    model(golden["x"], golden["t"], golden["y"])
    for name in modules:
        assert_close(seen[name].reshape(golden[name].shape), golden[name], name=name)


def test_patches_and_sinusoids(released):
    model, golden = released
    assert_close(model.patchify(golden["x"])[:2], golden["h/patchify"])
    # t is at most 999, and fp32 rounds the angles by half a unit in the last place.
    assert_close(timestep_embedding(golden["t"])[:2], golden["h/t_freq"], 999 * 2**-24)


@pytest.mark.parametrize("name", ["q", "k"])
def test_rotary_positions(released, name):
    model, golden = released
    head_dim = model.config.dim // 4
    assert_close(torch.view_as_real(rotary_table(20, head_dim)), golden["h/freqs_cis_20"])
    before = golden[f"h/layers.0.{name}_pre"]  # (N, T, heads, head_dim)
    after = rotate(before.transpose(1, 2), rotary_table(16, head_dim)).transpose(1, 2)
    assert_close(after, golden[f"h/layers.0.{name}_rot"])


REAL_CONFIGS = json.loads((GOLDEN / "terdit/real_configs.json").read_text())
REAL_NAMES = {"600M": "terdit/DiT_Llama_600M_patch2", "4.2B": "terdit/DiT_Llama_3B_patch2"}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", REAL_NAMES)
def test_names_shapes_and_counts_of_the_real_sizes(size, qk_norm):
    want = REAL_CONFIGS[f"{REAL_NAMES[size]}/qk{int(qk_norm)}"]
    with torch.device("meta"):
        model = DiT(Config(**SIZES[size], qk_norm=qk_norm), packed=True)
    shapes = dict(want["entries_outside_layers"])
    for i in range(want["n_layers"]):
        for name, shape in want["entries_per_layer"].items():
            shapes[f"layers.{i}.{name}"] = shape
    got = {}
    for name, value in model.state_dict().items():
        got[name] = [list(value.shape), str(value.dtype).removeprefix("torch.")]
    assert got == shapes
    assert 4 * sum(b.numel() for b in model.buffers()) == want["ternary_params"]
    assert sum(p.numel() for p in model.parameters()) == want["fp_params"]


# Ternary weights ----------------------------------------------------------------------------------

STE = load_arrays(GOLDEN / "terdit/ternary_ste.npz")
QUANTIZER_CASES = sorted(name.removesuffix("/codes") for name in STE if name.endswith("/codes"))


@pytest.mark.parametrize("case", QUANTIZER_CASES)
def test_quantizer_and_its_gradient(case):
    dtype = getattr(torch, STE[f"{case}/dtype"])
    w = STE[f"{case}/W"].to(dtype).requires_grad_()
    codes = TernaryWeight.apply(w, torch.ones(1, dtype=dtype))
    codes.backward(STE[f"{case}/grad_out"].to(dtype))
    np.testing.assert_array_equal(codes.detach().float(), STE[f"{case}/codes"])
    np.testing.assert_array_equal(w.grad.float(), STE[f"{case}/grad_in"])


@pytest.mark.parametrize("case", ["layer_col", "layer_row"])
def test_ternary_layer_and_its_gradients(case):
    layer = TernaryLinear(12, 8, bias=True)
    with torch.no_grad():
        layer.weight.copy_(STE[f"{case}/W"])
        layer.alphas.copy_(STE[f"{case}/alphas"])
        layer.bias.copy_(STE[f"{case}/bias"])
    x = STE[f"{case}/x"].clone().requires_grad_()
    y = layer(x)
    y.backward(STE[f"{case}/grad_y"])
    assert_close(y.detach(), STE[f"{case}/y"])
    tensors = {"W": layer.weight, "alphas": layer.alphas, "bias": layer.bias, "x": x}
    for name, tensor in tensors.items():
        assert_close(tensor.grad, STE[f"{case}/grad_{name}"], 5e-5, name)


@pytest.mark.parametrize("name", ["all", "rand"])
def test_unpack(name):
    golden = load_arrays(GOLDEN / "terdit/unpack.npz")
    got = unpack_ternary(golden[f"{name}_packed"]) + 1  # upstream's codes are the weights plus 1
    np.testing.assert_array_equal(got, golden[f"{name}_unpacked"])


# Diffusion ----------------------------------------------------------------------------------------

TABLES = np.load(GOLDEN / "diffusion/tables.npz")
LOSSES = load_arrays(GOLDEN / "diffusion/losses.npz")
NOT_OURS = ("alphas_cumprod_next", "log_one_minus_alphas_cumprod")
NOT_OURS += ("spaced/10,15,20/", "spaced/ddim")


@pytest.mark.parametrize("name", [name for name in TABLES.files if not name.startswith(NOT_OURS)])
def test_tables(name):
    """A name is that of a table, or "spaced/STEPS/TABLE"."""
    *spaced, table = name.split("/")
    steps = int(spaced[1]) if spaced else NUM_TIMESTEPS
    assert_close(getattr(GaussianDiffusion(steps), table), TABLES[name], 1e-12)


def fake_model(x, t, y):
    return torch.cat([0.3 * x + 0.01 * t.view(-1, 1, 1, 1) / 1000, torch.tanh(x)], dim=1)


def test_noise_and_posterior():
    diffusion = GaussianDiffusion()
    x = diffusion.q_sample(LOSSES["x0"], LOSSES["t"], LOSSES["noise"])
    assert_close(x, LOSSES["q_sample"])
    mean, log_variance = diffusion.q_posterior(LOSSES["x0"], x, LOSSES["t"])
    assert_close(mean, LOSSES["q_posterior_mean"])
    assert_close(log_variance.expand_as(x), LOSSES["q_posterior_log_variance"])


@pytest.mark.parametrize("clip", [False, True])
def test_reading_of_the_models_output(clip):
    diffusion = GaussianDiffusion()
    t = LOSSES["t"]
    x = diffusion.q_sample(LOSSES["x0"], t, LOSSES["noise"])
    got = diffusion.p_mean_variance(fake_model(x, t, None), x, t, clip_denoised=clip)
    assert set(got) == {"mean", "log_variance", "pred_xstart"}
    got["variance"] = got["log_variance"].exp()
    for name, value in got.items():
        assert_close(value, LOSSES[f"p_mean_variance_clip{int(clip)}/{name}"], name=name)


@pytest.mark.parametrize("case, steps, t", [("default", 1000, "t"), ("spaced50", 50, "t50")])
def test_losses_and_their_gradients(case, steps, t):
    diffusion = GaussianDiffusion(steps)
    outputs = []

    def model(x, t, y):
        outputs.append(fake_model(x, t, y).requires_grad_())
        return outputs[0]

    batch = [LOSSES["x0"], LOSSES[t], None, LOSSES["noise"]]
    losses = diffusion.training_losses(model, *batch)
    for name in ("loss", "mse", "vb"):
        assert_close(losses[name].detach(), LOSSES[f"losses/{case}/{name}"], name=name)
    losses["loss"].sum().backward()
    assert_close(outputs[0].grad, LOSSES[f"losses/{case}/grad_model_out"], 5e-5)

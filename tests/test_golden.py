"""Numbers that the peers' own published code computed (TerDiT, Large-DiT, DiT), against ours.

golden/ was made by running their source on a CPU in fp32. An array agrees when max|got - want| <= tol * max|want|.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from terdit import DiT, Config, GaussianDiffusion, TernaryLinear, load_model, rotary_table, rotate, ternarize
from terdit import SIZES, timestep_embedding, unpack_ternary

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = {"terdit": GOLDEN / "terdit/tiny", "large": GOLDEN / "large/tiny"}


def close(got, want, tol=1e-5, name=""):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, (name, got.shape, want.shape)
    assert np.abs(got - want).max() <= tol * np.abs(want).max(), (name, np.abs(got - want).max(), np.abs(want).max())


@pytest.fixture(params=["terdit", "large"])
def released(request):
    folder = FOLDERS[request.param]
    io = {k: torch.from_numpy(v) if v.dtype.kind in "fiu" else str(v) for k, v in np.load(folder / "io.npz").items()}
    return load_model(folder, n_heads=4), io


@torch.no_grad()
def test_outputs(released):
    model, io = released
    close(model(io["x"], io["t"], io["y"]), io["out"], name="out")
    close(model(io["x"], io["t_float"], io["y"]), io["out_tfloat"], name="out_tfloat")
    for name, scale in (("out_cfg4", 4.0), ("out_cfg1p5", 1.5)):
        got = model.forward_with_cfg(io["cfg_x"], io["cfg_t"], io["cfg_y"], scale, guided_channels=3)
        close(got, io[name], name=name)
        ours = model.forward_with_cfg(io["cfg_x"], io["cfg_t"], io["cfg_y"], scale)
        close(ours[:, :3], got[:, :3])
        assert not torch.allclose(ours[:, 3], got[:, 3])  # we guide the fourth latent channel too
    labels = torch.where(io["force_drop_ids"] == 1, model.config.num_classes, io["label_in"])
    close(model.y_embedder(labels), io["label_emb"], name="label_emb")


@torch.no_grad()
def test_wrong_norm_eps_would_show(released):
    """The one array that sees the eps of the norms: upstream's outputs after shrinking what the norms look at."""
    model, io = released
    rules = json.loads(io["eps_rules_json"])
    for name, p in model.named_parameters():
        for pattern, _, factor in rules:
            if re.fullmatch(pattern, name):
                p.mul_(factor)
    close(model(io["x"], io["t"], io["y"]), io["out_epsvariant"], name="out_epsvariant")


@torch.no_grad()
def test_intermediates(released):
    model, io = released
    seen = {}
    keep = lambda name: lambda module, args, out: seen.__setitem__(name, out[:2])
    hooked = {"h/x_embedder": "x_embedder", "h/t_embedder": "t_embedder", "h/y_embedder": "y_embedder",
              "h/layers.0.q_pre": "layers.0.attention.wq", "h/layers.0.k_pre": "layers.0.attention.wk",
              "h/final_layer": "final_layer"}  # fmt: skip
    for i in range(2):
        hooked |= {f"h/layers.{i}.adaLN": f"layers.{i}.adaLN_modulation", f"h/layers.{i}": f"layers.{i}",
                   f"h/layers.{i}.attention": f"layers.{i}.attention",
                   f"h/layers.{i}.feed_forward": f"layers.{i}.feed_forward"}  # fmt: skip
    for name, path in hooked.items():
        model.get_submodule(path).register_forward_hook(keep(name))
    model(io["x"], io["t"], io["y"])
    for name in hooked:
        close(seen[name].reshape(io[name].shape), io[name], name=name)
    close(model.patchify(io["x"])[:2], io["h/patchify"])
    close(timestep_embedding(io["t"])[:2], io["h/t_freq"], 999 * 2**-24)  # t times half a unit in fp32's last place
    close(torch.view_as_real(rotary_table(20, model.config.dim // 4)), io["h/freqs_cis_20"])
    freqs_cis = rotary_table(16, model.config.dim // 4)
    for name in "qk":
        got = rotate(io[f"h/layers.0.{name}_pre"].transpose(1, 2), freqs_cis).transpose(1, 2)
        close(got, io[f"h/layers.0.{name}_rot"], name=name)


def test_unpack():
    io = np.load(GOLDEN / "terdit/unpack.npz")
    for name in ("all", "rand"):
        got = unpack_ternary(torch.from_numpy(io[f"{name}_packed"])) + 1  # upstream's codes are the weights plus 1
        assert (got.numpy() == io[f"{name}_unpacked"]).all()


STE = np.load(GOLDEN / "terdit/ternary_ste.npz")


@pytest.mark.parametrize("case", sorted({k.split("/")[0] for k in STE.files if k.endswith("/codes")}))
def test_quantizer(case):
    w = torch.from_numpy(STE[f"{case}/W"]).to(getattr(torch, str(STE[f"{case}/dtype"]))).requires_grad_()
    codes = ternarize(w)
    codes.backward(torch.from_numpy(STE[f"{case}/grad_out"]).to(w.dtype))
    np.testing.assert_array_equal(codes.detach().float(), STE[f"{case}/codes"])
    np.testing.assert_array_equal(w.grad.float(), STE[f"{case}/grad_in"])


@pytest.mark.parametrize("case", ["layer_col", "layer_row"])
def test_ternary_layer(case):
    io = {k.split("/")[1]: torch.from_numpy(STE[k]) for k in STE.files if k.startswith(case + "/")}
    layer = TernaryLinear(12, 8, bias=True)
    with torch.no_grad():
        layer.weight.copy_(io["W"]), layer.alphas.copy_(io["alphas"]), layer.bias.copy_(io["bias"])
    x = io["x"].requires_grad_()
    y = layer(x)
    y.backward(io["grad_y"])
    close(y.detach(), io["y"])
    grads = {"W": layer.weight.grad, "alphas": layer.alphas.grad, "bias": layer.bias.grad, "x": x.grad}
    for name, grad in grads.items():
        close(grad, io[f"grad_{name}"], 5e-5, name)


def test_real_sizes():
    real = json.loads((GOLDEN / "terdit/real_configs.json").read_text())
    for size, name in (("600M", "terdit/DiT_Llama_600M_patch2"), ("4.2B", "terdit/DiT_Llama_3B_patch2")):
        for qk_norm in (False, True):
            want = real[f"{name}/qk{int(qk_norm)}"]
            with torch.device("meta"):
                model = DiT(Config(**SIZES[size], qk_norm=qk_norm), packed=True)
            shapes = dict(want["entries_outside_layers"])
            for i in range(want["n_layers"]):
                shapes |= {f"layers.{i}.{k}": v for k, v in want["entries_per_layer"].items()}
            got = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
            assert got == shapes
            ternary = 4 * sum(b.numel() for b in model.buffers())
            assert (ternary, sum(p.numel() for p in model.parameters())) == (want["ternary_params"], want["fp_params"])


# Diffusion ------------------------------------------------------------------------------------------------------------

TABLES, LOSSES = np.load(GOLDEN / "diffusion/tables.npz"), np.load(GOLDEN / "diffusion/losses.npz")


def test_tables():
    full = GaussianDiffusion()
    for name in TABLES.files:
        if name.startswith("spaced/"):
            _, respacing, what = name.split("/")
            close(getattr(GaussianDiffusion(respacing), what), TABLES[name], 1e-12, name)
        else:
            close(getattr(full, name), TABLES[name], 1e-12, name)


def fake_model(x, t, y):
    return torch.cat([0.3 * x + 0.01 * t.view(-1, 1, 1, 1) / 1000, torch.tanh(x)], dim=1)


def test_closed_forms():
    io = {k: torch.from_numpy(LOSSES[k]) for k in LOSSES.files}
    diffusion, t = GaussianDiffusion(), io["t"]
    x = diffusion.q_sample(io["x0"], t, io["noise"])
    close(x, io["q_sample"])
    mean, log_variance = diffusion.q_posterior(io["x0"], x, t)
    close(mean, io["q_posterior_mean"])
    close(log_variance.expand_as(x), io["q_posterior_log_variance"])
    for clip in (0, 1):
        got = diffusion.p_mean_variance(fake_model(x, t, None), x, t, clip_denoised=bool(clip))
        for name, value in got.items():
            close(value, io[f"p_mean_variance_clip{clip}/{name}"], name=name)


@pytest.mark.parametrize("case", ["default", "spaced50"])
def test_losses_and_their_gradients(case):
    io = {k: torch.from_numpy(LOSSES[k]) for k in LOSSES.files}
    diffusion = GaussianDiffusion("50" if case == "spaced50" else "")
    seen = []

    def model(x, t, y):
        seen.append(fake_model(x, t, y).requires_grad_())
        return seen[0]

    t = io["t50"] if case == "spaced50" else io["t"]
    losses = diffusion.training_losses(model, io["x0"], t, None, noise=io["noise"])
    losses["loss"].mean().backward()
    for name in ("loss", "mse", "vb"):
        close(losses[name].detach(), io[f"losses/{case}/{name}"], name=name)
    grad = io[f"losses/{case}/grad_model_out"]
    scale = (seen[0].grad * grad).sum() / (grad * grad).sum()  # the recorded loss was summed or averaged
    assert float(scale) == pytest.approx(1, rel=1e-4) or float(scale) == pytest.approx(1 / len(t), rel=1e-4)
    close(seen[0].grad / scale, grad, 5e-5)

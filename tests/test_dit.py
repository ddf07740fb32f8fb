"""Meta's DiT: against a second implementation by explicit formulas, from its files, and as sample.py draws from it."""

import math
import os
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from terdit import MetaDiTConfig, MetaDiT, load_model, save_checkpoint
from tests.test_checkpoint import Evil

TINY = dict(input_size=6, patch_size=2, in_channels=4, dim=24, n_layers=2, n_heads=3, num_classes=5)
HEADS = TINY["n_heads"]


def random_dit(**change):
    """A DiT whose every weight matters, at a spread that keeps attention and gates in their curved range."""
    model = MetaDiT(MetaDiTConfig(**TINY | change))
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    nn.init.normal_(model.pos_embed)
    return model.eval().requires_grad_(False)


def inputs(channels=4):
    """x, t and y of four samples."""
    rng = torch.Generator().manual_seed(7)
    x = torch.randn(4, channels, 6, 6, generator=rng)
    return x, torch.tensor([0, 999, 500.5, 17]), torch.tensor([0, 5, 2, 4])


@pytest.fixture
def dit_file(tmp_path):
    """A file like Meta's released ones: a bare state dict."""
    torch.save(random_dit().state_dict(), tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


# The model ------------------------------------------------------------------------------------------------------------


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


def test_xl_2_is_the_released_size():
    """292 tensors and 675,129,632 values, as DiT's training log says of DiT-XL/2 at 256x256."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in MetaDiT(MetaDiTConfig()).state_dict().items()}
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


# Its files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["released", "training", "training without ema", "saved by save_checkpoint"])
def test_load(tmp_path, kind):
    change = dict(learn_sigma=False) if kind == "released" else dict(patch_size=3, n_layers=3)
    model = random_dit(**change)
    state = model.state_dict()
    path = tmp_path / "dit.pt"
    if kind == "released":
        torch.save(state, path)
    elif kind == "training":  # as DiT's train.py writes it, arguments included
        other = random_dit(**change).state_dict()
        torch.save({"model": other, "ema": state, "opt": {}, "args": Namespace(model="DiT-XL/2", epochs=1400)}, path)
    elif kind == "training without ema":
        torch.save({"model": state}, path)
    else:
        save_checkpoint(path, model)
    loaded = load_model(path, n_heads=HEADS)
    assert loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    assert loaded.stored_bytes == dict(codes=0, rest=4 * sum(value.numel() for value in state.values()))


def test_imagenets_classes_are_named_by_their_index(tmp_path):
    torch.save(random_dit(num_classes=1000).state_dict(), tmp_path / "dit.pt")
    config = load_model(tmp_path / "dit.pt", n_heads=HEADS).config
    assert config.class_names[:3] == ["0", "1", "2"] and len(config.class_names) == 1000
    assert sample.pick_classes(["207", "88"], config) == [207, 88]
    assert sample.pick_classes(None, config) == [int(name) for name in sample.IMAGENET]


def test_other_classes_have_no_names(dit_file):
    assert load_model(dit_file, n_heads=HEADS).config.class_names is None


def test_what_the_shapes_do_not_tell(tmp_path, dit_file):
    """Heads are as in Meta's models of this width, the VAE is DiT's own, unless load_model is told otherwise."""
    for dim, heads in ((384, 6), (768, 12), (1152, 16)):
        torch.save(random_dit(dim=dim, n_layers=1, n_heads=heads).state_dict(), tmp_path / "wide.pt")
        config = load_model(tmp_path / "wide.pt").config
        assert (config.n_heads, config.vae, config.prediction) == (heads, "stabilityai/sd-vae-ft-mse", "eps")
    config = load_model(dit_file, n_heads=HEADS, vae=None, class_names=list("abcde")).config
    assert (config.n_heads, config.vae, config.class_names) == (HEADS, None, list("abcde"))


@torch.no_grad()
def test_dtype_is_that_of_the_whole_model(tmp_path, dit_file):
    want = load_model(dit_file, n_heads=HEADS)(*inputs())
    model = load_model(dit_file, dtype=torch.bfloat16, n_heads=HEADS)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    got = model(*inputs())
    assert got.dtype == torch.bfloat16
    assert 1e-4 * want.std() < (got - want).std() < 0.1 * want.std()
    with pytest.raises(ValueError, match="int8 is for ternary weights"):
        load_model(dit_file, dtype=torch.int8, n_heads=HEADS)
    half = {name: value.half() for name, value in random_dit().state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    assert load_model(tmp_path / "half.pt", n_heads=HEADS).pos_embed.dtype == torch.float32


def test_heads_must_split_the_width(dit_file):
    for heads in (5, 0):
        with pytest.raises(ValueError, match=f"dit.pt.*n_heads={heads}"):
            load_model(dit_file, n_heads=heads)


# Each row: what is put into a good state dict (None takes the tensor away), and the message.
DAMAGES = [
    ({"pos_embed": None}, "there is no pos_embed in it"),
    ({"final_layer.linear.weight": None}, "there is no final_layer.linear.weight in it"),
    ({"y_embedder.embedding_table.weight": torch.zeros(1, 24)}, "num_classes=0, expected a whole number of 1 to"),
    ({"x_embedder.proj.weight": torch.zeros(24, 4, 0, 0)}, "input_size=0, expected a whole number"),
    ({"x_embedder.proj.weight": torch.zeros(24)}, "not enough values to unpack"),
    ({"blocks.1.attn.qkv.bias": None}, "Missing key.*blocks.1.attn.qkv.bias"),
    ({"blocks.0.attn.q_norm.weight": torch.ones(8)}, "Unexpected key.*blocks.0.attn.q_norm.weight"),
    ({"blocks.1.attn.proj.weight": torch.ones(24, 20)}, "size mismatch for blocks.1.attn.proj.weight"),
    ({"blocks.1.mlp.fc1.weight": torch.ones(48, 24)}, "size mismatch for blocks.1.mlp.fc1.weight"),
    ({"pos_embed": torch.zeros(1, 10, 24)}, "size mismatch for pos_embed"),
    ({"final_layer.linear.weight": torch.ones(20, 24)}, "size mismatch for final_layer.linear.weight"),
    ({"pos_embed": torch.zeros(1, 9, 24).long()}, "pos_embed is torch.int64, expected floating point"),
    ({"pos_embed": torch.zeros(1).expand(1, 9, 10**8)}, "more than the file has"),
    ({"pos_embed": torch.zeros(1, 9, 24).to_sparse()}, "'pos_embed' is no plain tensor"),
    ({"pos_embed": "text"}, "'pos_embed' is no plain tensor"),
    ({f"blocks.{i}.x": torch.zeros(1) for i in range(100)}, "n_layers=100, but it holds only 132 tensors"),
]


@pytest.mark.parametrize("change, message", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = tmp_path / "dit.pt"
    state = {name: value for name, value in (random_dit().state_dict() | change).items() if value is not None}
    for content in (state, {"ema": state}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"dit.pt: damaged.*{message}") as e:
            load_model(path, n_heads=HEADS)
        assert "\n" not in str(e.value)


def test_a_file_without_blocks_is_refused(tmp_path):
    state = {name: value for name, value in random_dit().state_dict().items() if "blocks" not in name}
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(ValueError, match="dit.pt: damaged.*n_layers=0, expected a whole number of 1 to"):
        load_model(tmp_path / "dit.pt", n_heads=HEADS)


@pytest.mark.parametrize(
    "content, found",
    [
        ({"epoch": 3}, r"which holds \['epoch'\]"),
        ({"ema": {"epoch": 3}, "opt": {}}, r"which holds \['ema', 'opt'\]"),
        ({"ema": [1]}, r"which holds \['ema'\]"),
        ({"line\nbreak": 1}, r"which holds \['line\\nbreak'\]"),
        ([1, 2], "a list"),
        (Namespace(ema=1), "a Namespace"),
    ],
)
def test_what_is_neither_ours_nor_dits_is_told_in_one_message(tmp_path, content, found):
    torch.save(content, tmp_path / "x.pt")
    message = "x.pt: not a checkpoint of this project .* or of Meta's DiT, but a foreign file, "
    with pytest.raises(ValueError, match=message + found):
        load_model(tmp_path / "x.pt")


def test_a_file_that_is_cut_short_is_refused(dit_file):
    dit_file.write_bytes(dit_file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="dit.pt: not a checkpoint .* or of Meta's DiT, or cut short"):
        load_model(dit_file, n_heads=HEADS)


@pytest.mark.parametrize("where", ["args", "ema", "inside args", "a tensor"])
def test_a_hostile_file_runs_nothing(tmp_path, where):
    evil = Evil(tmp_path / "folder")
    content = {"ema": random_dit().state_dict(), "args": Namespace()}
    if where == "inside args":
        content["args"] = Namespace(evil=evil)
    elif where == "a tensor":
        content["ema"]["pos_embed"] = evil
    else:
        content[where] = evil
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: not a checkpoint .*may be hostile"):
        load_model(tmp_path / "x.pt", n_heads=HEADS)
    assert os.listdir(tmp_path) == ["x.pt"]


# Sampling -------------------------------------------------------------------------------------------------------------


class EnlargingVAE:
    """Stands for the SD VAE: three channels of the latents, eight times as large."""

    def __init__(self):
        self.largest = 0

    def decode(self, z):
        self.largest = max(self.largest, z.abs().max().item())
        return SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=8))


@pytest.mark.parametrize("kind", ["released", "training"])
def test_sample_py_draws_from_it(tmp_path, monkeypatch, capsys, dit_file, kind):
    path = dit_file
    if kind == "training":
        path = tmp_path / "trained.pt"
        torch.save({"ema": torch.load(dit_file), "args": Namespace(lr=1e-4)}, path)
    vae = EnlargingVAE()
    asked = []

    def load_vae(name, device):
        asked.append(name)
        return vae

    monkeypatch.setattr(sample, "load_vae", load_vae)
    flags = ["--ckpt", str(path), "--n-heads", str(HEADS), "--classes", "4", "0", "--steps", "2", "--device", "cpu"]
    sample.main([*flags, "--npz", "2", "--out", str(tmp_path / "x.npz")])
    sample.main([*flags, "--n", "2", "--out", str(tmp_path / "x.png"), "--vae", "another"])
    assert asked == ["stabilityai/sd-vae-ft-mse", "another"]
    assert vae.largest > 1.01 / 0.18215  # latents are not clipped to [-1, 1] as pixels are
    printed = capsys.readouterr().out
    assert "2-bit codes 0.00 MB, full-precision rest 0.12 MB" in printed and "packed layers" not in printed

    model = load_model(path, n_heads=HEADS)
    decode = sample.load_decoder("any", 0.18215, "cpu")
    want = sample.to_uint8(sample.sample_images(model, [4, 0], steps=2, sampler="ddpm", decode=decode))
    drawn = np.load(tmp_path / "x.npz")
    assert np.array_equal(drawn["arr_0"], want) and drawn["arr_1"].tolist() == [4, 0]
    assert want.shape == (2, 48, 48, 3) and want.std() > 10
    assert (tmp_path / "x.png").is_file()


def test_a_dit_of_pixels_is_told_by_an_override(tmp_path):
    torch.save(random_dit(in_channels=3).state_dict(), tmp_path / "dit.pt")
    model = load_model(tmp_path / "dit.pt", n_heads=HEADS, vae=None)
    unguided = sample.sample_images(model, [0, 4], cfg_scale=1, steps=2)
    guided = sample.sample_images(model, [0, 4], cfg_scale=4.0, steps=2)
    assert unguided.shape == (2, 3, 6, 6) and unguided.isfinite().all()
    assert not torch.equal(unguided, guided)

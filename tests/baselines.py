"""What the paper compares TerDiT with: quantization after training, and Meta's DiT.

    QUANTIZERS          quantizers that need no data: ternary, 2-bit round-to-nearest
    RECONSTRUCTIONS     2-bit quantizers that repair a layer's output on recorded inputs
    quantize_model      a full-precision terdit.DiT with one of them applied where TerDiT is ternary
    MetaDiT             DiT as Meta released it, which Large-DiT and TerDiT come from
    load_any            terdit.load_model, which reads Meta's files too
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

from terdit import Config, DiT, FinalLayer, LabelEmbedder, TimestepEmbedder
from terdit import load_model, modulate, read_checkpoint, softmax_attention, ternarize

# --------------------------------------------------------------------------------------------------
# Quantization after training
#
# Each quantizer takes a weight (N, K), N outputs and K inputs. It returns the dequantized weight,
# of the same shape and dtype, and the bits a weight that the quantized one takes. All store 2 bits
# a weight, ternary included (four in a byte, as TerDiT packs them), and fp16 scales: the
# dequantized weight is made with scales that are rounded to fp16.


def ternary_absmean(weight):
    """What TerDiT trains with, applied at once: ternarize(W) * mean|W| (BitNet b1.58)."""
    alpha = weight.abs().mean().half().to(weight.dtype)
    return ternarize(weight) * alpha, 2 + 16 / weight.numel()


def ternary_least_squares(weight):
    """The same codes with alpha = <W, codes> / <codes, codes>: the least |W - alpha codes|^2."""
    codes = ternarize(weight)
    n_nonzero = codes.abs().sum().clamp(min=1)  # <codes, codes>
    alpha = ((weight * codes).sum() / n_nonzero).half().to(weight.dtype)
    return codes * alpha, 2 + 16 / weight.numel()


def min_max_grid(weight, group):
    """-> scale and zero point of each weight, both (N, K), and the bits that a weight takes.

    Four levels lie between the least and the greatest weight of a group. A group stores a scale and
    a 2-bit zero point.
    """
    scales = []
    zeros = []
    parts = weight.split(group or weight.shape[1], dim=1)
    for part in parts:
        # The range is widened to hold 0, as in GPTQ. A range that lacks 0 would be out of the zero
        # point's reach.
        low = part.amin(1, keepdim=True).clamp(max=0)
        high = part.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 3).half().to(weight.dtype)
        scale = torch.where(scale == 0, 1, scale)  # a group of zeros
        zero = (-low / scale).round().clamp(0, 3)
        scales.append(scale.expand_as(part))
        zeros.append(zero.expand_as(part))
    return torch.cat(scales, 1), torch.cat(zeros, 1), 2 + (16 + 2) * len(parts) / weight.shape[1]


def round_to_grid(weight, scale, zero):
    codes = ((weight / scale).round() + zero).clamp(0, 3)
    return (codes - zero) * scale


def round_to_nearest(weight, group=None):
    """2-bit asymmetric min/max rounding per output channel, or in groups of `group` along K.

    The core of Q-DiT (arXiv 2406.17343), without its search for group sizes and its quantized
    activations.
    """
    scale, zero, bits = min_max_grid(weight, group)
    return round_to_grid(weight, scale, zero), bits


def reconstruct(weight, moments, group=None):
    """2-bit codes on round_to_nearest's grid, chosen to keep the layer's output on recorded inputs.

    moments (K, K) is X^T X of the inputs X (samples, K). Minimises |X W^T - X Q^T|^2 greedily: it
    rounds column after column, and after each one moves the weights that are not yet rounded to
    make up for the error, in closed form (GPTQ, arXiv 2210.17323; 1% damping). Q-Diffusion (arXiv
    2302.04304) has the same aim, but learns the rounding of whole blocks.
    """
    scale, zero, bits = min_max_grid(weight, group)
    w = weight.to(torch.float64, copy=True)
    damping = 0.01 * moments.diagonal().mean()
    h = moments.double() + damping * torch.eye(len(moments), dtype=torch.float64)
    # Row j of the inverse's upper Cholesky factor says how the columns after j make up for an error
    # in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for j in range(w.shape[1]):
        rounded = round_to_grid(w[:, j], scale[:, j], zero[:, j])
        error = (w[:, j] - rounded) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
        w[:, j] = rounded
    return w.to(weight.dtype), bits


QUANTIZERS = {
    "ternary absmean": ternary_absmean,
    "ternary least squares": ternary_least_squares,
    "2-bit per channel": round_to_nearest,
    "2-bit groups of 128": partial(round_to_nearest, group=128),
    "2-bit groups of 64": partial(round_to_nearest, group=64),
}
RECONSTRUCTIONS = {
    "2-bit per channel, reconstructed": reconstruct,
    "2-bit groups of 64, reconstructed": partial(reconstruct, group=64),
}


def record_moments(model, linears, calibration):
    """Run calibration(model) -> layer's name: X^T X (K, K) float64 of its inputs X."""
    moments = {}

    def record(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + (x.T @ x).double()

    hooks = []
    for name, module in linears.items():
        hooks.append(module.register_forward_pre_hook(partial(record, name)))
    calibration(model)
    for hook in hooks:
        hook.remove()
    return moments


@torch.no_grad()
def quantize_model(model, method, calibration=None):
    """-> a copy of a full-precision terdit.DiT, quantized where TerDiT is ternary.

    method: a name in QUANTIZERS or RECONSTRUCTIONS. The latter need calibration(model), which runs
    the model on typical inputs, as Q-Diffusion does by sampling. `bits_per_weight` of the copy is
    the mean over the quantized weights.
    """
    model = copy.deepcopy(model)
    modules = model.layers.named_modules()
    linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    moments = record_moments(model, linears, calibration) if method in RECONSTRUCTIONS else {}
    all_bits = 0
    n_weights = 0
    for name, module in linears.items():
        weight = module.weight.float()  # bf16 would round the grid itself
        if name in moments:
            quantized, bits = RECONSTRUCTIONS[method](weight, moments[name])
        else:
            quantized, bits = QUANTIZERS[method](weight)
        module.weight.copy_(quantized)
        all_bits += bits * weight.numel()
        n_weights += weight.numel()
    model.bits_per_weight = all_bits / n_weights
    return model


# --------------------------------------------------------------------------------------------------
# Meta's DiT (Peebles & Xie, arXiv 2212.09748), as its released files need it
#
# It is read and run, not trained, so it has no initial values. What it shares with terdit.DiT is
# not written again.


@dataclass
class MetaDiTConfig(Config):
    """The sizes of DiT-XL/2 at 256x256. DiT has no multiple_of, norm_eps, qk_norm, pos_embed."""

    dim: int = 1152
    n_layers: int = 28
    n_heads: int = 16
    ternary: bool = False
    adaln_norm: bool = False
    vae: str | None = "stabilityai/sd-vae-ft-mse"  # of DiT's sample.py

    @property
    def cond_dim(self):
        return self.dim


class MetaDiTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        out = softmax_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(-2))  # (B, T, D)


class MetaDiTBlock(nn.Module):
    """TransformerBlock before LLaMA: LayerNorm without gains, GELU, biases, no rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.attn = MetaDiTAttention(config)
        fc1 = nn.Linear(config.dim, 4 * config.dim)
        fc2 = nn.Linear(4 * config.dim, config.dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU("tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class MetaDiT(nn.Module):
    """Meta's DiT of any size; the default is DiT-XL/2 at 256x256. Names are those of its files."""

    unpatchify = DiT.unpatchify
    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, config):
        super().__init__()
        self.config = config
        p = config.patch_size
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.in_channels, config.dim, p, p)})
        self.t_embedder = TimestepEmbedder(config.dim)
        self.y_embedder = LabelEmbedder(config.num_classes, config.dim)
        # Fixed sines of column and row.
        self.pos_embed = nn.Parameter(torch.empty(1, config.n_tokens, config.dim))
        self.blocks = nn.ModuleList([MetaDiTBlock(config) for _ in range(config.n_layers)])
        self.final_layer = FinalLayer(config)

    def forward(self, x, t, y):
        """As DiT.forward, for x of the config's size alone, because the positions are a table."""
        patches = self.x_embedder["proj"](x.to(self.pos_embed.dtype))  # (B, D, H / p, W / p)
        h = patches.flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c), x.shape[2])


def meta_dit_config(state):
    """MetaDiTConfig from the shapes in a state dict of DiT. The heads are in no shape: in Meta's
    models they are 72 wide in XL, and 64 in L, B and S."""
    dim, _, patch_size, _ = state["x_embedder.proj.weight"].shape
    num_classes = len(state["y_embedder.embedding_table.weight"]) - 1  # without the null label
    return MetaDiTConfig(
        input_size=round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        patch_size=patch_size,
        dim=dim,
        n_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        n_heads=16 if dim == 1152 else max(1, dim // 64),
        num_classes=num_classes,
        class_names=[str(i) for i in range(num_classes)],  # indices of ImageNet's classes
    )


def load_any(path, device="cpu", dtype=torch.float32):
    """terdit.load_model, or the MetaDiT of a file that Meta released."""
    if Path(path).is_file():
        state = read_checkpoint(path, "a checkpoint of this project or of Meta's DiT", mmap=True)
        if "x_embedder.proj.weight" in state:  # DiT's convolution; Large-DiT has a linear layer
            with torch.device("meta"):
                model = MetaDiT(meta_dit_config(state))
            state = {name: value.to(dtype) for name, value in state.items()}
            model.load_state_dict(state, assign=True)
            return model.eval().requires_grad_(False).to(device)
    return load_model(path, device, dtype)

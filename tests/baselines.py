"""What the paper compares TerDiT with: Meta's DiT, and quantization after training.

    DiTXL, load_dit     DiT-XL/2 (Peebles & Xie, arXiv 2212.09748), able to read its released .pt files
    QUANTIZERS          weight quantizers that need no data: per-tensor ternary, 2-bit round-to-nearest
    RECONSTRUCTIONS     2-bit quantizers that repair a layer's output on recorded inputs
    quantize_model      a full-precision terdit.DiT with one of them applied where TerDiT is ternary

    model = load_dit("DiT-XL-2-256x256.pt")
    small = quantize_model(load_model("full.pt"), "2-bit groups of 64")

Letters in the shape comments are terdit's: B images in a batch, C channels, H and W height and width, T tokens, D the
model's width. A weight is (N, K).
"""

import copy
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from terdit import Config, DiT, FinalLayer, LabelEmbedder, TimestepEmbedder, modulate, read_checkpoint, ternarize

# ----------------------------------------------------------------------------------------------------------------------
# DiT, the model that Large-DiT and TerDiT came from


@dataclass
class DiTConfig(Config):
    """terdit.Config with DiT-XL/2's sizes at 256x256.

    DiTXL ignores the fields that belong to Large-DiT alone: multiple_of, norm_eps, qk_norm and so on.
    """

    dim: int = 1152
    n_layers: int = 28
    n_heads: int = 16
    mlp_dim: int = 4608  # 4 dim
    ternary: bool = False
    adaln_norm: bool = False
    vae: str | None = "stabilityai/sd-vae-ft-mse"  # DiT's sample.py decodes with it; DiT's files do not name it

    def __post_init__(self):
        if self.n_heads < 1 or self.dim % self.n_heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of n_heads={self.n_heads}, and of 4 for the positions")

    @property
    def cond_dim(self):
        return self.dim


def sincos_positions(grid, dim):
    """DiT's fixed 2-D positions (MAE's table) -> (1, grid * grid, dim) fp32, row by row.

    The first half of the channels encodes the column, the second half the row. Each half holds the sines, then the
    cosines, of position / 10000^(i / (dim / 4)).
    """
    freqs = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * freqs
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    columns = line.expand(grid, -1, -1)  # (grid, grid, D / 2): the same in every row
    rows = line[:, None].expand(-1, grid, -1)  # (grid, grid, D / 2): the same in every column
    return torch.cat([columns, rows], dim=2).flatten(0, 1)[None].float()


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (B, T, 3, heads, head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, head_dim) each
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(-2))  # (B, T, D)


class Block(nn.Module):
    """terdit.TransformerBlock before LLaMA: LayerNorm without gains, GELU for SwiGLU, biases, no rotary positions."""

    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(cfg)
        fc1 = nn.Linear(cfg.dim, cfg.mlp_dim)
        fc2 = nn.Linear(cfg.mlp_dim, cfg.dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(approximate="tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c)  # (B, 6 * D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class DiTXL(nn.Module):
    """Meta's DiT of any size; DiTXL(DiTConfig()) is DiT-XL/2 at 256x256. Parameter names are those of its files.

    It can stand in for a terdit.DiT in sample.py. What both models have in common is not written again here: the final
    layer is terdit.FinalLayer, and the embedders of timestep and label, unpatchify and forward_with_cfg are terdit's,
    too. A change to one of them changes this baseline. Labels are dropped by the data loader, not by the model.
    """

    unpatchify = DiT.unpatchify
    forward_with_cfg = DiT.forward_with_cfg

    def __init__(self, config):
        super().__init__()
        self.config = cfg = config
        conv = nn.Conv2d(cfg.in_channels, cfg.dim, cfg.patch_size, stride=cfg.patch_size)
        self.x_embedder = nn.Sequential(OrderedDict(proj=conv))
        self.t_embedder = TimestepEmbedder(cfg.dim)
        self.y_embedder = LabelEmbedder(cfg.num_classes, cfg.dim)
        table = sincos_positions(cfg.input_size // cfg.patch_size, cfg.dim)
        self.pos_embed = nn.Parameter(table, requires_grad=False)  # (1, T, D)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.n_layers)])
        self.final_layer = FinalLayer(cfg, cfg.in_channels * (2 if cfg.learn_sigma else 1))
        self.init_weights()

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the convolution starts as a linear layer
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for block in (*self.blocks, self.final_layer):  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        """As terdit.DiT.forward: x (B, C, H, W), t (B,) in 0..999, y (B,) -> (B, 2C, H, W), or C if not learn_sigma.

        The positions are a fixed table, so x of another size is a ValueError.
        """
        channels = self.config.in_channels
        size = self.config.input_size
        if x.shape[1:] != (channels, size, size):
            raise ValueError(f"x is {tuple(x.shape)}, expected (B, {channels}, {size}, {size})")
        patches = self.x_embedder(x.to(self.pos_embed.dtype))  # (B, D, H / p, W / p)
        h = patches.flatten(2).transpose(1, 2) + self.pos_embed  # (B, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            h = block(h, c)
        return self.unpatchify(self.final_layer(h, c), size)


DIT_FILE = "a state dict of DiT (facebookresearch/DiT)"


def read_dit(path_or_state_dict):
    """-> a name for messages, and the state dict itself, which DiT's train.py keeps under "ema" and "model"."""
    if isinstance(path_or_state_dict, Mapping):
        name = "state dict"
        state = path_or_state_dict
    else:
        name = str(path_or_state_dict)
        with torch.serialization.safe_globals([Namespace]):  # train.py keeps its arguments beside the weights
            state = read_checkpoint(path_or_state_dict, DIT_FILE)
    for key in ("ema", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return name, state[key]
    return name, state


def dit_sizes(state):
    """Config fields that the shapes in a state dict of DiT tell. The last row of the label table is the null label."""
    dim, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    n_tokens = state["pos_embed"].shape[1]
    out_dim = len(state["final_layer.linear.weight"])
    layers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    return dict(
        input_size=round(n_tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        dim=dim,
        mlp_dim=len(state["blocks.0.mlp.fc1.weight"]),
        n_layers=1 + max(layers),
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        learn_sigma=out_dim == 2 * in_channels * patch_size**2,
    )


def load_dit(path_or_state_dict, n_heads=16, **overrides):
    """DiT's released .pt file, a checkpoint of its train.py (the EMA is taken), or such a state dict -> DiTXL.

    The model is in eval mode, fp32, on the CPU, and shares the fp32 tensors of a state dict. n_heads is in no shape (16
    in DiT-L and XL, 12 in B, 6 in S): a wrong one that divides the width goes unnoticed and draws nonsense. `overrides`
    replace config fields, for example vae=None for a model of pixels. Raises FileNotFoundError, or ValueError that says
    what was found and what was expected. No code in a file is run.
    """
    name, state = read_dit(path_or_state_dict)
    try:
        fields = dit_sizes(state) | dict(n_heads=n_heads) | overrides
        with torch.device("meta"):
            model = DiTXL(DiTConfig(**fields))
        model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    except KeyError as e:
        some = ", ".join(map(str, list(state)[:4])) or "nothing"
        raise ValueError(f"{name}: not {DIT_FILE}: no {e.args[0]} in it, but {some}, ...") from None
    except (ValueError, TypeError, IndexError, AttributeError, ArithmeticError, RuntimeError) as e:
        one_line = " ".join(str(e).split())
        raise ValueError(f"{name}: not {DIT_FILE}, or damaged: {one_line[:300]}") from None
    return model.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# Quantization after training
#
# Each quantizer takes a weight (N, K) and returns the dequantized weight, of the same shape and dtype, and the bits a
# weight that the quantized one takes. All store 2 bits a weight, ternary included (four in a byte, as TerDiT packs
# them), and fp16 scales: the dequantized weight is made with scales that are rounded to fp16.


def round_to_fp16(scale):
    return scale.half().to(scale.dtype)


def ternary_absmean(weight):
    """What TerDiT trains with, applied at once: ternarize(W) * mean|W|, one scale a tensor (BitNet b1.58)."""
    alpha = round_to_fp16(weight.abs().mean())
    return ternarize(weight) * alpha, 2 + 16 / weight.numel()


def ternary_least_squares(weight):
    """The same codes with the alpha that minimises |W - alpha codes|^2, <W, codes> / <codes, codes>."""
    codes = ternarize(weight)
    nonzero = codes.abs().sum()  # <codes, codes>
    alpha = round_to_fp16((weight * codes).sum() / nonzero.clamp(min=1))
    return codes * alpha, 2 + 16 / weight.numel()


def min_max_grid(weight, group):
    """Scale and zero point of each weight, both (N, K): four levels between the least and the greatest of its group."""
    scales = []
    zeros = []
    for part in weight.split(group or weight.shape[1], dim=1):
        # The range is widened to hold 0, as in GPTQ. Q-DiT does not widen it, and clamps the zero point to 0..3: a
        # range that lacks 0 is then out of reach.
        low = part.amin(1, keepdim=True).clamp(max=0)
        high = part.amax(1, keepdim=True).clamp(min=0)
        scale = round_to_fp16((high - low) / 3)
        scale = torch.where(scale == 0, 1, scale)  # a group of zeros
        zero = (-low / scale).round().clamp(0, 3)
        scales.append(scale.expand_as(part))
        zeros.append(zero.expand_as(part))
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def round_to_grid(weight, scale, zero):
    codes = ((weight / scale).round() + zero).clamp(0, 3)
    return (codes - zero) * scale


def grid_bits(weight, group):
    """Bits a weight: 2 for its code, and its share of its group's fp16 scale and 2-bit zero point."""
    k = weight.shape[1]
    groups = -(-k // (group or k))  # in each row, rounded up
    return 2 + (16 + 2) * groups / k


def round_to_nearest(weight, group=None):
    """2-bit asymmetric min/max rounding per output channel, or in groups of `group` along K; the last may be shorter.

    This is the weight quantizer at the core of Q-DiT (arXiv 2406.17343). What Q-DiT puts around it is left out: a
    search for each layer's group size, GPTQ's corrections (see reconstruct), quantized activations.
    """
    scale, zero = min_max_grid(weight, group)
    return round_to_grid(weight, scale, zero), grid_bits(weight, group)


def reconstruct(weight, moments, group=None):
    """2-bit codes on round_to_nearest's grid, chosen to keep the layer's output on recorded inputs X (samples, K).

    moments (K, K) is X^T X. Minimises |X W^T - X Q^T|^2 greedily: it rounds column after column, and after each one
    moves the weights that are not yet rounded to make up for the error, in closed form (GPTQ, arXiv 2210.17323; 1%
    damping; the grid stays as it was before any move). Q-Diffusion (arXiv 2302.04304) has the same aim, but learns the
    rounding of whole blocks on inputs from all timesteps of its own sampler: this is its idea, not its method.
    """
    if not moments.isfinite().all() or moments.diagonal().mean() <= 0:
        raise ValueError("reconstruct needs recorded inputs that are finite and not all zero")
    scale, zero = min_max_grid(weight, group)
    scale = scale.double()
    zero = zero.double()
    w = weight.to(torch.float64, copy=True)
    h = moments.double()
    damping = 0.01 * h.diagonal().mean()
    h = h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)
    # Row j of the inverse's upper Cholesky factor says how the columns after j make up for an error in column j.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for j in range(w.shape[1]):
        rounded = round_to_grid(w[:, j], scale[:, j], zero[:, j])
        error = (w[:, j] - rounded) / upper[j, j]
        w[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
        w[:, j] = rounded
    return w.to(weight.dtype), grid_bits(weight, group)


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
    """Run calibration(model) -> X^T X (K, K) float64 of the inputs X of each linear layer, by the layer's name."""
    moments = {}

    def record(name, module, inputs):
        x = inputs[0].flatten(0, -2).float()
        moments[name] = moments.get(name, 0) + (x.T @ x).double()

    hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in linears.items()]
    calibration(model)
    for hook in hooks:
        hook.remove()
    missed = [name for name in linears if name not in moments]
    if missed:
        raise ValueError(f"calibration never ran {len(missed)} of the model's layers, {missed[0]} for one")
    return moments


@torch.no_grad()
def quantize_model(model, method, calibration=None):
    """-> a copy in eval mode of a full-precision terdit.DiT, whose linear layers are quantized where TerDiT is ternary.

    method: a name in QUANTIZERS or RECONSTRUCTIONS. The latter need calibration(model), which runs the model on typical
    inputs, as Q-Diffusion does by sampling: lambda m: sample_images(m, y, seed=1). One run of the full-precision copy
    feeds all layers. The copy's `bits_per_weight` is the mean over the quantized weights. Raises ValueError.
    """
    if method not in QUANTIZERS and method not in RECONSTRUCTIONS:
        names = [*QUANTIZERS, *RECONSTRUCTIONS]
        raise ValueError(f"method={method!r}, expected one of: {'; '.join(names)}")
    if not isinstance(model, DiT) or model.config.ternary:
        it_is = "a ternary one" if isinstance(model, DiT) else type(model).__name__
        raise ValueError(f"expected a full-precision terdit.DiT (ternary=False), got {it_is}")
    if method in RECONSTRUCTIONS and calibration is None:
        raise ValueError(f"{method!r} needs calibration: a function that runs the model on typical inputs")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    moments = record_moments(model, linears, calibration) if method in RECONSTRUCTIONS else {}
    all_bits = 0
    for name, module in linears.items():
        weight = module.weight.float()  # bf16 would round the grid itself
        if method in RECONSTRUCTIONS:
            quantized, bits = RECONSTRUCTIONS[method](weight, moments[name])
        else:
            quantized, bits = QUANTIZERS[method](weight)
        module.weight.copy_(quantized)
        all_bits += bits * weight.numel()
    model.bits_per_weight = all_bits / sum(module.weight.numel() for module in linears.values())
    return model

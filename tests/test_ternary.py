"""Ternary weights and their packing: worked examples, gradients, and the fast paths against the plain ones."""

import pytest
import torch
import torch.nn.functional as F

from terdit import Config, DiT, PackedTernaryLinear, TernaryLinear
from terdit import check_packed, pack_model, pack_ternary, ternarize, unpack_ternary

SMALL = dict(input_size=8, patch_size=2, in_channels=3, dim=32, n_layers=2, n_heads=4, multiple_of=16, num_classes=5)


def test_quantizer_by_hand():
    # mean|W| = (0.9 + 0.1 + 0.4 + 0.6) / 4 = 0.5: in units of it 1.8, -0.2, 0.8, -1.2
    w = torch.tensor([[0.9, -0.1], [0.4, -0.6]])
    assert ternarize(w).tolist() == [[1, 0], [1, -1]]


def test_halves_round_to_even():
    # mean|W| = 1, eps = 0: +-0.5 goes to 0, anything above it to 1, 1.5 (which would be 2) is clipped
    w = torch.tensor([[0.5, -0.5], [1.5, -1.5]])
    assert ternarize(w, eps=0.0).tolist() == [[0, 0], [1, -1]]
    w = torch.tensor([[0.5, 0.5001], [1.5, 1.4999]])
    assert ternarize(w, eps=0.0).tolist() == [[0, 1], [1, 1]]


def test_straight_through():
    w = torch.randn(6, 5, requires_grad=True)
    g = torch.randn(6, 5)
    ternarize(w).backward(g)
    assert torch.equal(w.grad, g)


def test_ternarize_leaves_the_weight_alone():
    w = torch.randn(8, 8)
    before = w.clone()
    assert set(ternarize(w).unique().tolist()) == {-1, 0, 1}
    assert torch.equal(w, before)


def plain(x, layer):
    """TernaryLinear without its autograd Function: what the fast path must equal."""
    return F.linear(x, ternarize(layer.weight) * layer.alphas, layer.bias)


def test_gradients_add_up():
    """The backward scales the matmul's gradient in place: no shared layer, second backward or derivative may feel it."""
    torch.manual_seed(1)
    layer, x = TernaryLinear(24, 24), torch.randn(5, 24)
    results = []
    for forward in (layer, lambda z: plain(z, layer)):
        layer.zero_grad()
        loss = forward(forward(x)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        loss = forward(x).square().sum()
        alpha_grad = torch.autograd.grad(loss, [layer.weight, layer.alphas], create_graph=True)[1]
        second = torch.autograd.grad(alpha_grad.sum(), layer.alphas)[0]
        results.append([layer.weight.grad, layer.alphas.grad, second])
    for got, want in zip(*results):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alpha", [0.07, -0.3])
def test_fast_layer_equals_plain(autocast, alpha):
    torch.manual_seed(1)
    layer, x = TernaryLinear(48, 24, bias=True), torch.randn(3, 7, 48)
    torch.nn.init.normal_(layer.weight, std=0.1), torch.nn.init.normal_(layer.bias)
    layer.alphas.data.fill_(alpha)
    results = []
    for forward in (layer, lambda z: plain(z, layer)):
        layer.zero_grad()
        z = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = forward(z)
        y.float().square().sum().backward()
        results.append([y, z.grad, layer.weight.grad, layer.bias.grad, layer.alphas.grad])
    assert torch.equal(results[0][0], results[1][0])  # the same bits forward
    # alpha's gradient is divided by alpha here, and bf16 rounds the product that is summed: 2^-8, and more by cancelling
    for got, want, tol in zip(*results, [0, 1e-6, 1e-5, 1e-6, 1e-5] if not autocast else [0, 1e-2, 1e-2, 1e-2, 5e-2]):
        assert (got - want).abs().max() <= tol * want.abs().max()


def test_alpha_gradient_by_finite_differences():
    layer, x = TernaryLinear(16, 8).double(), torch.randn(4, 16).double()
    torch.nn.init.normal_(layer.weight), layer.alphas.data.fill_(0.4)
    layer(x).square().sum().backward()
    h = 1e-6
    with torch.no_grad():
        up, down = (((layer(x) * (0.4 + d) / 0.4) ** 2).sum() for d in (h, -h))
    assert layer.alphas.grad.item() == pytest.approx((up - down).item() / (2 * h), rel=1e-5)


def test_zero_alpha_has_finite_gradients():
    layer = TernaryLinear(8, 8)
    torch.nn.init.normal_(layer.weight), layer.alphas.data.zero_()
    layer(torch.randn(2, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_packing_by_hand():
    # One column, four rows: 1, 0, -1, 1 are codes 2, 1, 0, 2 = 0b10_01_00_10
    assert pack_ternary(torch.tensor([[1], [0], [-1], [1]])).tolist() == [[0b10010010]]
    # Eight rows: byte row 0 holds rows 0, 2, 4, 6; byte row 1 rows 1, 3, 5, 7
    codes = torch.tensor([[1], [-1], [0], [1], [0], [0], [-1], [1]])
    assert pack_ternary(codes).tolist() == [[0b10010100], [0b00100110]]


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (192, 64), (12, 0)])
def test_packing_round_trip(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0] // 4, shape[1])
    assert torch.equal(unpack_ternary(packed), codes)
    check_packed(packed)


def test_packing_refuses():
    with pytest.raises(ValueError, match=r"multiple of 4, got \(6, 2\)"):
        pack_ternary(torch.zeros(6, 2))
    for bad in (2.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="-1, 0 and 1"):
            pack_ternary(torch.full((4, 2), bad))
    with pytest.raises(ValueError, match="multiple of 4"):
        PackedTernaryLinear(8, 6)


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_code_3_is_found(shift):
    packed = pack_ternary(torch.randint(-1, 2, (16, 9)))
    packed[2, 5] |= 3 << shift
    with pytest.raises(ValueError, match="code 3"):
        check_packed(packed)


def test_every_legal_byte_passes():
    legal = [b for b in range(256) if all(b >> s & 3 != 3 for s in (0, 2, 4, 6))]
    assert len(legal) == 81
    check_packed(torch.tensor([legal], dtype=torch.uint8))
    for b in set(range(256)) - set(legal):
        with pytest.raises(ValueError):
            check_packed(torch.tensor([[b]], dtype=torch.uint8))


def awake(model):
    """Give every parameter a value that matters: at initialisation the blocks are the identity."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.uniform_(p, 0.1, 0.5)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, dict(adaln_norm=False), dict(qk_norm=True, learn_sigma=False)])
def test_packed_model_gives_the_same_bits(change):
    model = awake(DiT(Config(**{**SMALL, **change})))
    packed = pack_model(model)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5])
    want = model(x, t, y)
    assert want.std() > 0.01
    assert torch.equal(packed(x, t, y), want)  # same codes, same product with alpha, same matmul
    ternary = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear))
    assert sum(b.numel() for b in packed.buffers()) * 4 == ternary  # exactly 2 bits a weight


def test_packing_refuses_what_it_cannot_pack():
    with pytest.raises(ValueError, match="full-precision"):
        pack_model(DiT(Config(**SMALL, ternary=False, adaln_norm=False)))
    model = DiT(Config(**SMALL))
    model.layers[1].attention.wv.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.attention.wv.weight .* not finite"):
        pack_model(model)

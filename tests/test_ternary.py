"""Ternary weights and their packing: examples by hand, gradients, and the fast layers against the plain ones."""

import pytest
import torch

from terdit import Config, DiT, FastPackedTernaryLinear, FastTernaryLinear, PackedTernaryLinear, TernaryLinear
from terdit import check_packed, pack_model, pack_ternary, ternarize, unpack_ternary
from tests.helpers import SMALL, awake

# The quantizer --------------------------------------------------------------------------------------------------------


def test_quantizer_by_hand():
    # mean|W| = (0.9 + 0.1 + 0.4 + 0.6) / 4 = 0.5. In units of it the weights are 1.8, -0.2, 0.8 and -1.2.
    w = torch.tensor([[0.9, -0.1], [0.4, -0.6]])
    assert ternarize(w).tolist() == [[1, 0], [1, -1]]


def test_halves_round_to_even():
    # mean|W| = 1 and eps = 0: 0.5 and -0.5 round to 0, and 1.5 rounds to 2, which is clipped to 1.
    w = torch.tensor([[0.5, -0.5], [1.5, -1.5]])
    assert ternarize(w, eps=0.0).tolist() == [[0, 0], [1, -1]]
    # Just above a half rounds up.
    w = torch.tensor([[0.5, 0.5001], [1.5, 1.4999]])
    assert ternarize(w, eps=0.0).tolist() == [[0, 1], [1, 1]]


def test_gradient_passes_straight_through():
    w = torch.randn(6, 5, requires_grad=True)
    grad = torch.randn(6, 5)
    ternarize(w).backward(grad)
    assert torch.equal(w.grad, grad)


def test_ternarize_leaves_the_weight_alone():
    w = torch.randn(8, 8)
    before = w.clone()
    assert set(ternarize(w).unique().tolist()) == {-1, 0, 1}
    assert torch.equal(w, before)


# The layer ------------------------------------------------------------------------------------------------------------

LAYERS = [TernaryLinear, FastTernaryLinear]


def make_layer(kind, in_features, out_features, alpha):
    layer = kind(in_features, out_features, bias=True)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.constant_(layer.alphas, alpha)
    return layer


def twin(layer, kind):
    """A layer of another class with the same weights."""
    copy = kind(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None)
    copy.load_state_dict(layer.state_dict())
    return copy


def assert_near(got, want, tol):
    assert (got - want).abs().max() <= tol * want.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alpha", [0.07, -0.3])
def test_fast_layer_equals_plain(autocast, alpha):
    plain = make_layer(TernaryLinear, 48, 24, alpha)
    fast = twin(plain, FastTernaryLinear)
    x = torch.randn(3, 7, 48)

    def outputs_and_gradients(layer):
        z = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(z)
        y.float().square().sum().backward()
        return dict(y=y, x=z.grad, weight=layer.weight.grad, bias=layer.bias.grad, alphas=layer.alphas.grad)

    got = outputs_and_gradients(fast)
    want = outputs_and_gradients(plain)
    assert torch.equal(got["y"], want["y"])  # the forward gives the same bits
    if autocast:
        # bf16 rounds the products that alpha's gradient sums up: 2^-8, and more where they cancel.
        tolerances = dict(x=1e-2, weight=1e-2, bias=1e-2, alphas=5e-2)
    else:
        tolerances = dict(x=1e-6, weight=1e-5, bias=1e-6, alphas=1e-5)
    for name, tol in tolerances.items():
        assert_near(got[name], want[name], tol)


def test_fast_gradients_add_up():
    """The fast backward pass scales a gradient in place, and nobody else may see that.

    So we check a layer that is used twice, a second backward pass, and a second derivative.
    """
    plain = TernaryLinear(24, 24)
    fast = twin(plain, FastTernaryLinear)
    x = torch.randn(5, 24)

    def gradients(layer):
        loss = layer(layer(x)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        loss = layer(x).square().sum()
        _, alpha_grad = torch.autograd.grad(loss, [layer.weight, layer.alphas], create_graph=True)
        (second,) = torch.autograd.grad(alpha_grad.sum(), layer.alphas)
        return layer.weight.grad, layer.alphas.grad, second

    for got, want in zip(gradients(fast), gradients(plain)):
        assert_near(got, want, 1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_alpha_gradient_by_finite_differences(kind):
    layer = make_layer(kind, 16, 8, alpha=0.4).double()
    x = torch.randn(4, 16).double()
    layer(x).square().sum().backward()

    @torch.no_grad()
    def loss(alpha):
        layer.alphas.fill_(alpha)
        return layer(x).square().sum().item()

    h = 1e-6
    slope = (loss(0.4 + h) - loss(0.4 - h)) / (2 * h)
    assert layer.alphas.grad.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_zero_alpha_has_finite_gradients(kind):
    layer = make_layer(kind, 8, 8, alpha=0.0)
    layer(torch.randn(2, 8)).sum().backward()
    for p in layer.parameters():
        assert p.grad.isfinite().all()


# Packing --------------------------------------------------------------------------------------------------------------


def test_packing_by_hand():
    # One column of four rows: 1, 0, -1, 1 are the codes 2, 1, 0, 2, in bits 10 01 00 10.
    assert pack_ternary(torch.tensor([[1], [0], [-1], [1]])).tolist() == [[0b10010010]]
    # Eight rows: the first byte holds rows 0, 2, 4 and 6, the second holds rows 1, 3, 5 and 7.
    codes = torch.tensor([[1], [-1], [0], [1], [0], [0], [-1], [1]])
    assert pack_ternary(codes).tolist() == [[0b10010100], [0b00100110]]


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (192, 64), (12, 0)])
def test_packing_round_trip(shape):
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0] // 4, shape[1])
    assert torch.equal(unpack_ternary(packed), codes)
    check_packed(packed)


def test_packing_refuses_odd_heights():
    with pytest.raises(ValueError, match=r"multiple of 4, got \(6, 2\)"):
        pack_ternary(torch.zeros(6, 2))
    with pytest.raises(ValueError, match="multiple of 4"):
        PackedTernaryLinear(8, 6)


@pytest.mark.parametrize("value", [2.0, 0.5, float("nan")])
def test_packing_refuses_what_is_not_ternary(value):
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        pack_ternary(torch.full((4, 2), value))


def test_every_byte_without_code_3_passes_and_every_other_is_found():
    packed = pack_ternary(torch.randint(-1, 2, (16, 9)))
    passed = 0
    for byte in range(256):
        packed[2, 5] = byte
        if 3 in (byte >> 6, (byte >> 4) & 3, (byte >> 2) & 3, byte & 3):
            with pytest.raises(ValueError, match="code 3"):
                check_packed(packed)
        else:
            check_packed(packed)
            passed += 1
    assert passed == 3**4


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_packed_layers_give_the_bits_of_the_ternary_layer(bias):
    ternary = TernaryLinear(48, 24, bias=bias)
    state = ternary.state_dict()
    state["weight"] = pack_ternary(ternarize(ternary.weight))
    x = torch.randn(3, 7, 48)
    for kind in (PackedTernaryLinear, FastPackedTernaryLinear):
        packed = kind(48, 24, bias=bias)
        packed.load_state_dict(state)
        assert torch.equal(packed(x), ternary(x)), kind


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, dict(adaln_norm=False), dict(qk_norm=True, learn_sigma=False)])
def test_packed_model_gives_the_same_bits(change):
    model = awake(DiT(Config(**SMALL | change)))
    packed = pack_model(model)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    want = model(*inputs)
    assert want.std() > 0.01
    assert torch.equal(packed(*inputs), want)  # the same codes, the same product with alpha, the same matmul
    ternary = sum(m.weight.numel() for m in model.modules() if isinstance(m, TernaryLinear))
    assert sum(b.numel() for b in packed.buffers()) * 4 == ternary  # exactly 2 bits a weight


def test_pack_model_refuses_full_precision():
    with pytest.raises(ValueError, match="full-precision"):
        pack_model(DiT(Config(**SMALL, ternary=False, adaln_norm=False)))


def test_pack_model_refuses_weights_that_are_not_finite():
    model = DiT(Config(**SMALL))
    model.layers[1].attention.wv.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.attention.wv.weight .* not finite"):
        pack_model(model)

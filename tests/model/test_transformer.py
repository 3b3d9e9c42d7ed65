"""The dense model: how it starts, and that nothing looks ahead."""

import math

import pytest
import torch

from planearly.model.transformer import Shape, Transformer, rotary, rotate

SHAPE = Shape(layers=3, d_model=96, heads=4, d_ff=160, vocab_size=500, context=12)


@pytest.mark.parametrize("ffn", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_start_with_the_stated_deviation(ffn, tied):
    """sqrt(2 / (5 fan_in)); what writes to the residual stream is scaled by (2 layers)^-1/2."""
    shape = Shape(3, 96, 4, 160, 500, 12, ffn, tie_embeddings=tied)
    seen = set()
    for name, weight in Transformer(shape, seed=3).named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
            continue
        fan_in = 96 if name == "embed.weight" else weight.shape[1]
        expected = math.sqrt(0.4 / fan_in)
        if name.endswith(("attn.o.weight", "ffn.down.weight")):
            expected /= math.sqrt(2 * 3)
            seen.add(name.rpartition("blocks.")[2][2:])
        deviation = expected / math.sqrt(2 * weight.numel())  # of a sample's own deviation
        assert weight.std().item() == pytest.approx(expected, abs=5 * deviation), name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel())
    assert seen == {"attn.o.weight", "ffn.down.weight"}


def test_seeds_differ_and_repeat():
    one, again, other = (Transformer(SHAPE, seed).embed.weight for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_no_position_sees_a_later_one():
    model = Transformer(SHAPE, seed=0)
    tokens = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(0))
    before = model(tokens)
    tokens[:, 7] = (tokens[:, 7] + 1) % 500
    after = model(tokens)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert (after[:, 7:] - before[:, 7:]).abs().amin(dim=(0, 2)).min() >= 0
    assert ((after[:, 7:] - before[:, 7:]).abs().amax(dim=(0, 2)) > 1e-4).all()


def test_rotary_positions_depend_on_the_distance_alone():
    cos, sin = rotary(40, 8, 100.0)
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(8, generator=draw) for _ in "qk")
    products = {(i, j): float(rotate(q, cos[i], sin[i]) @ rotate(k, cos[j], sin[j]))
                for i, j in ((0, 0), (9, 9), (5, 2), (30, 27), (2, 5))}
    assert products[0, 0] == pytest.approx(float(q @ k), abs=1e-5)
    assert products[9, 9] == pytest.approx(products[0, 0], abs=1e-4)
    assert products[5, 2] == pytest.approx(products[30, 27], abs=1e-4)
    assert products[5, 2] != pytest.approx(products[2, 5], abs=1e-2)
    angle = 3 / 100.0 ** (2 / 8)  # of the second pair, three places on
    assert cos[3, 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sin[3, 5].item() == pytest.approx(math.sin(angle), abs=1e-6)

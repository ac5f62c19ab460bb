from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regsurgery.recipe import FILLS
from regsurgery.runtime.surgery import insert_registers, neuron_shift, pad_registers, strip_registers

NEURONS = [2, 5, 6]
SCALES = {1: [1.5], 4: [1.0, -0.5, 2.0, 0.0]}
SIZES = list(itertools.product([0, 1, 5], SCALES))  # num_prefix, num_registers
OPTIONS = list(itertools.product(FILLS, ["keep", "fill"], ["none", "reference"]))
# float64 against plain Python numbers: only the order of summation differs. The others: half a unit in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def reference(
    hidden: Tensor, *, num_prefix: int, scale: list[float], fill: str, prefix: str, compat: str, inside: bool = False
) -> list[list[list[float]]]:
    """DESIGN.md section 3 in plain Python numbers, item by item, neuron by neuron, token by token."""
    items = hidden.double().tolist()
    for item in items:
        num_tokens = len(item)
        first_register = num_prefix if inside else num_tokens - len(scale)
        registers = range(first_register, first_register + len(scale))
        patch_tokens = [t for t in range(num_prefix, num_tokens) if t not in registers]
        peaks = {}
        for j in NEURONS:
            peaks[j] = 0.0
            for t in range(num_tokens):
                if abs(item[t][j]) > abs(peaks[j]):
                    peaks[j] = item[t][j]
        if compat == "reference":
            shared = max(peaks.values(), key=abs)
            peaks = dict.fromkeys(NEURONS, shared)
        for j in NEURONS:
            patches = [item[t][j] for t in patch_tokens]
            mean = sum(patches) / len(patches)
            std = math.sqrt(sum((value - mean) ** 2 for value in patches) / (len(patches) - 1))
            for t in [*(range(num_prefix) if prefix == "fill" else ()), *patch_tokens]:
                if fill == "zero":
                    item[t][j] = 0.0
                elif fill == "mean" or (fill == "outliers" and item[t][j] > mean + std):
                    item[t][j] = mean
            for r, factor in enumerate(scale):
                item[first_register + r][j] = factor * peaks[j]
    return items


def shift(
    hidden: Tensor, *, num_prefix: int, scale: list[float], fill: str = "zero", prefix: str = "keep",
    compat: str = "none", in_place: bool = False, inside: bool = False,
) -> Tensor:  # fmt: skip
    return neuron_shift(
        hidden, torch.tensor(NEURONS), num_prefix=num_prefix, inside_prefix=inside, scale=scale, fill=fill,
        fill_prefix=prefix == "fill", one_peak=compat == "reference", in_place=in_place,
    )  # fmt: skip


def hidden_values(num_prefix: int, num_registers: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Five different items; each listed neuron has its extreme on another patch, of either sign, or on a CLS token."""
    generator = torch.Generator().manual_seed(num_prefix + 10 * num_registers)
    hidden = torch.randn(5, num_prefix + 12 + num_registers, 8, generator=generator, dtype=torch.float64)
    hidden[0, num_prefix + 3, 2] = 30
    hidden[0, num_prefix + 4, 5] = -50
    hidden[1, num_prefix + 5, 5] = -20
    hidden[2, num_prefix, NEURONS] = torch.tensor([9.0, 11.0, -10.0], dtype=torch.float64)
    hidden[3, 0, 6] = 40
    return hidden.to(dtype)


def error(result: Tensor, expected: Any) -> float:
    return float((result.double() - torch.tensor(expected, dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("num_prefix, num_registers", SIZES)
@pytest.mark.parametrize("fill, prefix, compat", OPTIONS)
@pytest.mark.parametrize("inside", [False, True])
def test_it_equals_the_plain_reference(fill, prefix, compat, num_prefix, num_registers, inside):
    hidden = hidden_values(num_prefix, num_registers)
    given = hidden.clone()
    options: dict[str, Any] = {"num_prefix": num_prefix, "scale": SCALES[num_registers], "fill": fill, "prefix": prefix,
                               "compat": compat, "inside": inside}  # fmt: skip
    result = shift(hidden, **options)
    assert error(result, reference(given, **options)) < TOLERANCE[torch.float64]
    assert torch.equal(hidden, given)
    others = [j for j in range(8) if j not in NEURONS]
    assert torch.equal(result[..., others], given[..., others])
    assert not torch.equal(result, given)


@pytest.mark.parametrize("fill, prefix, compat", OPTIONS)
def test_an_item_does_not_depend_on_its_batch(fill, prefix, compat):
    hidden = hidden_values(1, 4)
    together = shift(hidden, num_prefix=1, scale=SCALES[4], fill=fill, prefix=prefix, compat=compat)
    for b in range(len(hidden)):
        alone = shift(hidden[b : b + 1], num_prefix=1, scale=SCALES[4], fill=fill, prefix=prefix, compat=compat)
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("option, other", [("prefix", "fill"), ("compat", "reference"), ("fill", "mean"),
                                           ("fill", "outliers"), ("fill", "keep")])  # fmt: skip
def test_every_option_makes_a_difference(option, other):
    hidden = hidden_values(1, 4)
    plain = shift(hidden, num_prefix=1, scale=SCALES[4])
    changed = shift(hidden, num_prefix=1, scale=SCALES[4], **{option: other})
    assert not torch.equal(plain, changed)


def test_a_negative_peak_keeps_its_sign():
    hidden = torch.zeros(1, 6, 8)
    hidden[0, 2, 5], hidden[0, 3, 5] = -7, 3
    result = shift(hidden, num_prefix=1, scale=[1.0, 2.0])
    assert result[0, :, 5].tolist() == [0, 0, 0, 0, -7, -14]


def test_the_positive_peak_wins_a_tie():
    hidden = torch.zeros(1, 5, 8)
    hidden[0, 1, 5], hidden[0, 2, 5] = -7, 7
    assert shift(hidden, num_prefix=1, scale=[1.0])[0, -1, 5] == 7


@pytest.mark.parametrize("token", [0, -1], ids=["prefix", "register"])
def test_a_peak_on_a_prefix_or_register_token_counts(token):
    hidden = torch.zeros(1, 5, 8)
    hidden[0, token, 5], hidden[0, 2, 5] = -9, 3
    result = shift(hidden, num_prefix=1, scale=[0.5])
    assert result[0, -1, 5] == -4.5
    assert result[0, 0, 5] == hidden[0, 0, 5]
    assert result[0, 2, 5] == 0


def test_values_from_the_deep_negative_side_are_no_outliers():
    hidden = torch.zeros(1, 12, 8)
    hidden[0, 3, 5], hidden[0, 4, 5] = -100, 40
    result = shift(hidden, num_prefix=1, scale=[1.0], fill="outliers")
    assert result[0, 3, 5] == -100
    assert result[0, 4, 5] == -6  # the mean over the ten patches
    assert result[0, -1, 5] == -100


@pytest.mark.parametrize("fill, prefix, compat", OPTIONS)
def test_in_place_returns_its_input_with_the_functional_result(fill, prefix, compat):
    hidden = hidden_values(1, 4)
    functional = shift(hidden, num_prefix=1, scale=SCALES[4], fill=fill, prefix=prefix, compat=compat)
    assert functional.data_ptr() != hidden.data_ptr()
    result = shift(hidden, num_prefix=1, scale=SCALES[4], fill=fill, prefix=prefix, compat=compat, in_place=True)
    assert result.data_ptr() == hidden.data_ptr()
    assert torch.equal(result, functional)
    assert torch.equal(hidden, functional)


def test_in_place_writes_into_a_tensor_that_is_not_contiguous():
    hidden = hidden_values(1, 1).transpose(0, 1).contiguous().transpose(0, 1)
    assert not hidden.is_contiguous()
    functional = shift(hidden.contiguous(), num_prefix=1, scale=SCALES[1])
    shift(hidden, num_prefix=1, scale=SCALES[1], in_place=True)
    assert torch.equal(hidden, functional)


def test_in_place_is_ignored_while_autograd_records():
    hidden = hidden_values(1, 1).requires_grad_()
    given = hidden.detach().clone()
    activation = hidden * 1
    result = shift(activation, num_prefix=1, scale=SCALES[1], in_place=True)
    assert result.data_ptr() != activation.data_ptr()
    assert torch.equal(activation, given)
    with torch.no_grad():
        assert shift(activation, num_prefix=1, scale=SCALES[1], in_place=True).data_ptr() == activation.data_ptr()


@pytest.mark.parametrize("fill, prefix", [("zero", "keep"), ("mean", "fill"), ("outliers", "fill")])
def test_its_gradient_is_right(fill, prefix):
    hidden = hidden_values(1, 4)[:2].requires_grad_()

    def shifted(x: Tensor) -> Tensor:
        return shift(x, num_prefix=1, scale=SCALES[4], fill=fill, prefix=prefix, in_place=True)

    assert torch.autograd.gradcheck(shifted, (hidden,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("in_place", [False, True])
def test_the_dtype_is_kept(dtype, fill, in_place):
    hidden = hidden_values(1, 4, dtype)
    expected = torch.tensor(reference(hidden, num_prefix=1, scale=SCALES[4], fill=fill, prefix="keep", compat="none"))
    result = shift(hidden, num_prefix=1, scale=SCALES[4], fill=fill, in_place=in_place)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected.double(), rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("start, rows", [(None, [0, 1, 2, 3, 7, 8]), (1, [0, 7, 8, 1, 2, 3]), (4, [0, 1, 2, 3, 7, 8])])
def test_registers_go_in_and_come_out_again(start, rows):
    tokens = torch.arange(4.0).reshape(1, 4, 1).repeat(2, 1, 3)
    registers = torch.tensor([7.0, 8.0]).reshape(1, 2, 1).repeat(1, 1, 3)
    longer = insert_registers(tokens, registers, start)
    assert longer[1, :, 2].tolist() == rows
    assert torch.equal(strip_registers(longer, (1,), 2, start), tokens)
    assert insert_registers(tokens.half(), registers, start).dtype == torch.float16


@pytest.mark.parametrize("start", [None, 0, 1, 3])
@pytest.mark.parametrize("dtype, free", [(torch.float32, 0), (torch.bool, True)])
def test_a_bias_has_no_effect_on_registers(start, dtype, free):
    bias = torch.tensor([[5.0, 0.0, 6.0], [1.0, 0.0, 0.0], [0.0, 2.0, 3.0]]).to(dtype)
    padded = pad_registers(bias[None], (-2, -1), 2, start)
    assert padded.shape == (1, 5, 5) and padded.dtype == dtype
    first = 3 if start is None else start
    assert bool((padded[0, first : first + 2] == free).all()) and bool((padded[0, :, first : first + 2] == free).all())
    assert torch.equal(strip_registers(padded, (1, 2), 2, start)[0], bias)

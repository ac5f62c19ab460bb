"""The rule by which registers follow the number of patches, and its inverse."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch

from regsurgery.errors import RecipeError
from regsurgery.recipe import Recipe, parse_recipe
from regsurgery.runtime.surgery import RegisterCount, neuron_shift, registers_for, repeated_registers

MINIMAL = "schema: 1\nregister_neurons: {7: [417]}\n"


@pytest.mark.parametrize("chosen_for", [1, 2, 3, 7, 16, 49, 64, 196, 256, 1369])
@pytest.mark.parametrize("num_registers", range(1, 18))
def test_the_rule_and_its_inverse(chosen_for, num_registers):
    count = RegisterCount(num_registers, chosen_for, num_prefix=5)
    totals = []
    for num_patches in range(1, 4 * chosen_for + 50):
        expected = max(1, floor(Fraction(num_registers * num_patches, chosen_for) + Fraction(1, 2)))
        assert registers_for(num_patches, num_registers, chosen_for) == expected
        assert count.beside(5 + num_patches) == expected
        assert count.among(5 + num_patches + expected) == expected
        totals.append(num_patches + expected)
    assert totals == sorted(set(totals))
    assert registers_for(chosen_for, num_registers, chosen_for) == num_registers


def test_without_a_number_of_patches_it_is_fixed():
    assert [registers_for(n, 3, None) for n in (1, 196, 5000)] == [3, 3, 3]
    assert registers_for(196, 0, None) == 0
    assert (RegisterCount(3).beside(10), RegisterCount(3).among(10)) == (3, 3)


def test_rows_are_repeated_in_turn():
    tokens = torch.arange(6.0).reshape(1, 3, 2)
    assert torch.equal(repeated_registers(tokens, 7), tokens[:, [0, 1, 2, 0, 1, 2, 0]])
    assert torch.equal(repeated_registers(tokens, 2), tokens[:, :2])


@pytest.mark.parametrize("inside", [False, True])
def test_one_factor_serves_any_number_of_registers(inside):
    hidden = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_prefix": 1, "inside_prefix": inside, "fill": "mean", "fill_prefix": False, "one_peak": False,
               "in_place": False}  # fmt: skip
    neurons = torch.tensor([2, 5])
    listed = neuron_shift(hidden, neurons, scale=[0.5] * 4, **options)
    assert torch.equal(listed, neuron_shift(hidden, neurons, scale=[0.5], num_registers=4, **options))
    assert not torch.equal(listed, neuron_shift(hidden, neurons, scale=[0.5], num_registers=3, **options))


# --- the key of a recipe --------------------------------------------------------------------------------------------


def refusal(lines: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(MINIMAL + lines, "some.yaml")
    return str(caught.value)


def test_the_key_is_read_and_written():
    recipe = parse_recipe(MINIMAL + "num_registers: 3\nnum_patches: 196", "some.yaml")
    assert (recipe.num_registers, recipe.num_patches) == (3, 196)
    assert parse_recipe(recipe.to_yaml(), "some.yaml") == recipe
    assert parse_recipe(MINIMAL + "num_patches: null", "some.yaml").num_patches is None
    assert list(recipe.as_dict()).index("num_patches") == list(recipe.as_dict()).index("num_registers") + 1


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "many", "[196]", "100000000000000000000"])
def test_a_number_of_patches_that_is_none_is_refused(value):
    assert "num_patches must be a whole number" in refusal(f"num_patches: {value}")


@pytest.mark.parametrize(
    "lines", ["mode: native", "mode: bias", "compat: reference", "num_registers: 2\nscale: [1, 2]"]
)  # fmt: skip
def test_what_cannot_follow_the_size_is_refused(lines):
    assert "num_patches needs mode: shift" in refusal(f"num_patches: 196\n{lines}")


def test_no_registers_cannot_follow_the_size():
    with pytest.raises(RecipeError, match="at least one register"):
        parse_recipe("schema: 1\nregister_neurons: {}\nnum_registers: 0\nnum_patches: 196", "some.yaml")


def test_other_modes_and_a_given_number_are_fixed():
    recipe = Recipe({7: (417,)}, num_registers=3, num_patches=196, scale=(1.0,) * 3)
    assert recipe.with_num_registers(3).num_patches is None
    for mode in ("native", "bias"):
        other = recipe.with_mode(mode)
        assert (other.num_registers, other.num_patches) == (3, None)
    assert recipe.with_mode("shift") == recipe
    assert recipe.as_single_shift().num_patches is None

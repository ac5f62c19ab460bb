"""What tools do to a model, done to its module form: replaced linears, hooks, gradients, replicas, traces, exports."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regsurgery.compiler.modes import bias
from regsurgery.compiler.modes.operation import Operation
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.images.image_set import image_set
from regsurgery.recipe import Recipe
from regsurgery.runtime.hidden import hidden_site
from regsurgery.runtime.surgery import (
    RegisterCount,
    _Shift,
    _shift_hidden,
    insert_registers,
    neuron_shift,
    shift_arguments,
)
from regsurgery.verification.live import still_patched
from tests.conftest import CHOSEN, Planted
from tests.e2e.test_parity import largest_difference, module_form, pictures, recipe_for
from tests.picos import PICOS, Pico, by_id

MODES = ("shift", "bias")
# Whole models have their tower's class, and parts that cannot be replicated or pickled as they stand.
EACH = pytest.mark.parametrize(
    ("pico", "mode"),
    [
        pytest.param(pico, mode, id=f"{pico.id}-{mode}")
        for pico in PICOS
        for mode in MODES
        if mode == "shift" or pico.id in CHOSEN
    ],
)


def surgery_of(planted: Planted, mode: str) -> Surgery:
    if mode == "shift":
        return perform(planted.located, recipe_for(planted, 2))
    recipe = Recipe({block: tuple(listed) for block, listed in planted.neurons.items()}, mode="bias")
    return bias.operate(Operation(planted.located, recipe, image_set(None, 4)))


class Reads(nn.Linear):
    """What stands in for a linear, as quantisation-aware training and adapters make it: a class of its own."""

    seen: Tensor

    def forward(self, input: Tensor) -> Tensor:
        self.seen = input.detach().clone()
        return super().forward(input)


def replace_downs(model: nn.Module, planted: Planted) -> list[Reads]:
    made = []
    for block in planted.neurons:
        path = planted.pico.down.format(block)
        holder, _, name = path.rpartition(".")
        stock: Any = model.get_submodule(path)
        new = Reads(stock.in_features, stock.out_features, stock.bias is not None)
        new.load_state_dict(stock.state_dict())
        setattr(model.get_submodule(holder), name, new.eval())
        made.append(new)
    return made


@EACH
def test_what_stands_in_for_the_down_projection_reads_shifted_values(
    pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    """Also with gradients, where nothing is written in place: a branch beside it is trained on what it will serve."""
    planted = planted_picos(pico)
    surgery = surgery_of(planted, mode)
    model = module_form(planted, surgery)
    images = pictures(2, planted.loaded.image_size)
    with torch.no_grad():
        expected = planted.loaded.call(model, images)
    readers = replace_downs(model, planted)
    with torch.no_grad():
        found = planted.loaded.call(model, images)
    without = [reader.seen for reader in readers]
    assert largest_difference(expected, found) <= planted.pico.tolerance
    found = planted.loaded.call(model, images)
    for reader, seen, (block, neurons) in zip(readers, without, planted.neurons.items(), strict=True):
        torch.testing.assert_close(reader.seen, seen, rtol=1e-5, atol=1e-5)
        patches, _ = surgery.sites.patched(surgery.plan.num_registers)
        assert float(seen[:, patches, neurons].abs().max()) == 0, f"block {block}"


@EACH
def test_the_surgery_is_seen_from_outside(pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    model = module_form(planted, surgery_of(planted, mode))
    images = pictures(2, planted.loaded.image_size)
    seen = still_patched(model, images, run=lambda pixels: planted.loaded.call(model, pixels))
    assert seen.problems == () and seen.blocks == tuple(sorted(planted.neurons))


@EACH
def test_a_replica_reads_its_own_parameter(pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted]) -> None:
    """As `nn.DataParallel` replicates: modules are shallow copies, linked again; parameters become attributes."""
    planted = planted_picos(pico)
    model = module_form(planted, surgery_of(planted, mode))
    images = pictures(2, planted.loaded.image_size)
    with torch.no_grad():
        expected = planted.loaded.call(model, images)
        replica = replicated(model)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever still reads the original is found out
        # Text towers multiply copies of their weights, which lie elsewhere, by other kernels.
        assert largest_difference(expected, planted.loaded.call(replica, images)) <= max(planted.pico.tolerance, 1e-6)


def replicated(model: nn.Module) -> nn.Module:
    copies: Any = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, made in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(made, name, copies[child])
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            setattr(made, name, None if value is None else value.detach().clone())
    return copies[model]


@EACH
def test_copies_and_pickles_are_patched_too(pico: Pico, mode: str, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    model = module_form(planted, surgery_of(planted, mode))
    images = pictures(2, planted.loaded.image_size)
    others = [copy.deepcopy(model)]
    if planted.pico.collector is None:  # transformers' hooks, which gather hidden states, cannot be pickled
        others.append(pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        expected = planted.loaded.call(model, images)
        for other in others:
            assert largest_difference(expected, planted.loaded.call(other, images)) <= planted.pico.tolerance
            assert list(other.state_dict()) == list(model.state_dict())


TRACED = ("hf-vit-classes", "hf-dinov2-swiglu", "timm-vit", "timm-eva02")


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("mode", MODES)
def test_a_trace_and_an_export_are_those_of_the_model(
    mode: str, name: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(by_id(name))
    stock: Any = Tensors(planted, planted.loaded.model)
    model: Any = Tensors(planted, module_form(planted, surgery_of(planted, mode)))
    images = pictures(2, planted.loaded.image_size)
    with torch.no_grad():
        expected = model(images)
        own = warnings_of(lambda: torch.jit.trace(stock, (images,)))
        assert warnings_of(lambda: torch.jit.trace(model, (images,))) <= own
        traced: Any = torch.jit.trace(model, (images,))
        torch.testing.assert_close(traced(images), expected)
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)


class Tensors(nn.Module):
    """A model that returns its first tensor: one that returns a mapping cannot be traced."""

    def __init__(self, planted: Planted, model: nn.Module) -> None:
        super().__init__()
        self.model, self._call = model, planted.loaded.call

    def forward(self, images: Tensor) -> Tensor:
        return next(iter(self._call(self.model, images).values()))


def warnings_of(run: Callable[[], Any]) -> set[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return {str(one.message).splitlines()[0] for one in caught}


@pytest.mark.parametrize("name", ["hf-vit-classes", "hf-clip-vision"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore:.*_compile flag on create_block_mask")
def test_flex_attention_is_given_room_for_what_was_added(
    mode: str, name: str, planted_picos: Callable[[Pico], Planted]
) -> None:
    planted = planted_picos(by_id(name))
    model: Any = module_form(planted, surgery_of(planted, mode))
    images = pictures(2, planted.loaded.image_size)
    with torch.no_grad():
        expected = planted.loaded.call(model, images)
        model.set_attn_implementation("flex_attention")
        assert largest_difference(expected, planted.loaded.call(model, images)) < 1e-4


# --- where the shift goes --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    pass


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.dropout(nn.functional.gelu(self.up(x)), 0.5, self.training)
        return self.down(hidden)


class Branching(Functional):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # no trace can follow this
            return super().forward(x)
        return super().forward(-x)


class SharedActivation(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), act, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def block_of(mlp: nn.Module) -> nn.Module:
    return nn.ModuleDict({"attention": Attention(), "mlp": mlp})


def shifted(mlp: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """A block whose MLP is shifted, and what it computes with the hidden activation shifted by hand."""
    options = shift_arguments(1, [1.0], "end", "zero", "keep", "none")
    stock = copy.deepcopy(mlp).eval()

    def by_hand(x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(stock.up(x))  # type: ignore[operator]
        return stock.down(neuron_shift(hidden, torch.tensor([2, 5]), **options, in_place=False))  # type: ignore[operator]

    block = block_of(mlp).eval()
    step = _Shift([2, 5], {**options, "in_place": True}, RegisterCount(1))
    _shift_hidden(block, "mlp.down", "attention", step)
    return block, by_hand


@pytest.mark.parametrize(
    ("kind", "grafted"), [(Functional, "mlp"), (Branching, "mlp.down"), (SharedActivation, "mlp.act")]
)
@torch.no_grad()
def test_where_the_shift_goes(kind: Any, grafted: str) -> None:
    torch.manual_seed(0)
    block, by_hand = shifted(kind(nn.GELU()) if kind is SharedActivation else kind())
    x = torch.rand(3, 6, 4)
    torch.testing.assert_close(block["mlp"](x), by_hand(x), rtol=0, atol=0)  # type: ignore[index]
    changed = [name for name, module in block.named_modules() if len(type(module).__mro__) > 3
               and type(module).__mro__[1].__module__.startswith("regsurgery")]  # fmt: skip
    assert changed == [grafted]
    again = pickle.loads(pickle.dumps(block["mlp"]))  # type: ignore[index]
    torch.testing.assert_close(again(x), by_hand(x), rtol=0, atol=0)


def test_dropout_inside_a_forward_follows_the_mode() -> None:
    block, by_hand = shifted(Functional())
    mlp: Any = block["mlp"]  # type: ignore[index]
    x = torch.rand(3, 6, 4)
    assert torch.equal(mlp(x), by_hand(x))
    mlp.train()
    assert not torch.equal(mlp(x), by_hand(x))


def test_an_activation_that_blocks_share_is_not_shifted_for_all() -> None:
    act = nn.GELU()
    both = nn.ModuleList([block_of(SharedActivation(act)), block_of(SharedActivation(act))])
    site = hidden_site(both, "0.mlp.down", "0.attention")
    assert site is not None and (site.module, site.inline) == (both[0]["mlp"], "down")  # type: ignore[index]


@torch.no_grad()
def test_registers_follow_the_tokens_to_their_device() -> None:

    tokens = torch.zeros(2, 5, 4, device="meta", dtype=torch.float16)
    assert insert_registers(tokens, torch.zeros(1, 1, 4), None).device.type == "meta"

"""Recipe + sites -> the plan of one surgery, and the `regsurgery` block of the patched checkpoint's config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from regsurgery.checkpoints.copying import copy_file
from regsurgery.checkpoints.writing import Place
from regsurgery.compiler.graph import common_path
from regsurgery.compiler.located import Located, OfLocated
from regsurgery.compiler.passes.pipeline import apply_passes, padded_modules
from regsurgery.compiler.passes.plan import Plan, follows_size, plan_surgery
from regsurgery.compiler.sites import Block, Sites
from regsurgery.errors import RecipeError
from regsurgery.frontends.loaded import Loaded
from regsurgery.recipe import Recipe
from regsurgery.runtime.surgery import ATTENTION_CONSTANTS, OTHER_REGISTER_TOKENS, REGISTER_TOKENS, repeated_registers
from regsurgery.version import __version__


@dataclass(frozen=True)
class Surgery(OfLocated):
    """Everything that verification and the back ends need.

    Attributes:
        graph_module: the patched graph, in the plain form of `trace.py`; it shares parameters with `loaded.model`,
            except those that `edit` replaces.
        config_block: the `regsurgery` entry of the patched checkpoint's config; plain data.
        place: how unchanged weight files get into the folder.
        edit: new values of parameters, by their names in memory (native mode), including the register tokens.
    """

    located: Located
    recipe: Recipe
    plan: Plan
    graph_module: fx.GraphModule
    config_block: dict[str, Any]
    edit: Mapping[str, Tensor] = field(default_factory=dict)
    place: Place = copy_file

    def as_written(self) -> Surgery:
        """The surgery as written: on the checkpoint as it was, whatever image size was traced."""
        return replace(self, located=self.located.as_written())

    @property
    def register_tokens(self) -> Tensor:
        """The register tokens of the graph, `[1, R, D]`."""
        return self.graph_module.get_parameter(self.plan.register_name).detach()

    def state(self) -> dict[str, Tensor]:
        """The original's edited state dict, by names in memory; without the register tokens."""
        return {name: self.edit.get(name, value) for name, value in self.loaded.model.state_dict().items()}

    @property
    def added_name(self) -> str:
        """The parameter of the graph that the original lacks."""
        return self.plan.constants_name if self.plan.constant_blocks else self.plan.register_name

    def new_tensors(self) -> dict[str, Tensor]:
        """The tensors that a patched checkpoint has in addition to the original's, by their names on disk.

        The number of register tokens is the config's, whatever the size of the trace.
        """
        if not self.plan.num_added:
            return {}
        tower = self.config_block["layouts"][0]["tower"]
        name = ATTENTION_CONSTANTS if self.plan.constant_blocks else self.sites.register_name
        added = self.graph_module.get_parameter(self.added_name).detach()
        if not self.plan.constant_blocks:
            added = repeated_registers(added, self.config_block["num_registers"])
        on_disk = f"{tower}.{name}".lstrip(".")
        return {self.loaded.added_name(self.added_name, on_disk): added}


def perform(located: Located, recipe: Recipe) -> Surgery:
    """Apply `recipe`, with its number of registers at the traced image size.

    Raises:
        RecipeError: a block or neuron of the recipe does not exist in the model.
        UnsupportedModelError: a pass cannot make room for the registers.
    """
    check_fit(recipe, located.sites)
    plan = plan_surgery(located.sites, recipe)
    graph_module, _ = apply_passes(located.traced, plan)
    return Surgery(located, recipe, plan, graph_module, _config_block(located, recipe, plan, graph_module))


def named(located: Located) -> Located:
    """`located`, with another name for the register tokens if the tower has something by the usual name."""
    loaded, tower = located.loaded, located.sites.tower_path
    on_disk = f"{_disk_path(loaded, tower)}.{REGISTER_TOKENS}".lstrip(".")
    taken = any(loaded.disk_name(name) == on_disk for name, _ in loaded.model.named_parameters())
    if not taken and not hasattr(loaded.model.get_submodule(tower), REGISTER_TOKENS):
        return located
    return replace(located, sites=replace(located.sites, register_name=OTHER_REGISTER_TOKENS))


def check_fit(recipe: Recipe, sites: Sites) -> None:
    for block, neurons in recipe.register_neurons.items():
        if block >= len(sites.blocks):
            raise RecipeError(
                f"block {block} under 'register_neurons' does not exist: the model has {len(sites.blocks)} blocks, "
                f"0 to {len(sites.blocks) - 1}; is the recipe for another model?"
            )
        size = sites.blocks[block].hidden_size
        for neuron in neurons:
            if neuron >= size:
                raise RecipeError(
                    f"neuron {neuron} of block {block} does not exist: its MLP has {size} hidden units, "
                    f"0 to {size - 1}; is the recipe for another model?"
                )


def common_block(loaded: Loaded, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """The part of the `regsurgery` entry that all modes share."""
    num_patches = follows_size(plan.sites, recipe)
    return {
        "version": __version__,
        "mode": recipe.mode,
        "num_registers": plan.num_registers if num_patches is None else recipe.num_registers,
        "num_patches": num_patches,
        "register_neurons": {str(block): list(neurons) for block, neurons in recipe.register_neurons.items()},
        "source": loaded.source.as_dict(),
        **({} if loaded.tower is None else {"tower": loaded.tower}),
    }


def _config_block(located: Located, recipe: Recipe, plan: Plan, graph_module: fx.GraphModule) -> dict[str, Any]:
    loaded, sites = located.loaded, located.sites
    collects = loaded.library == "transformers"
    biases = padded_modules(graph_module)
    in_memory = _layout(sites, recipe, biases, collects, lambda path: path, lambda block: block.attention_path)
    on_disk = _layout(
        sites,
        recipe,
        biases,
        collects,
        lambda path: _disk_path(loaded, path),
        lambda block: _disk_attention_path(loaded, block),
    )
    return {
        **common_block(loaded, recipe, plan),
        "fill": recipe.fill,
        "prefix": recipe.prefix,
        "compat": recipe.compat,
        "scale": [] if recipe.kind.constants else list(recipe.scale),
        "constant_blocks": list(plan.constant_blocks),
        "width": sites.width,
        "num_prefix": sites.num_prefix,
        "placement": sites.placement,
        "in_place_blocks": [str(block) for block in recipe.register_neurons if sites.blocks[block].in_place],
        **({} if sites.register_name == REGISTER_TOKENS else {"register_name": sites.register_name}),
        "layouts": [on_disk] if on_disk == in_memory else [on_disk, in_memory],
    }


def _layout(
    sites: Sites,
    recipe: Recipe,
    biases: Sequence[str],
    collects: bool,
    rename: Callable[[str], str],
    attention: Callable[[Block], str],
) -> dict[str, Any]:
    """Module paths of the sites, below the tower. Versions of a library may name the same modules differently."""
    tower = rename(sites.tower_path)

    def relative(path: str) -> str:
        return path.removeprefix(tower).lstrip(".") if tower else path

    blocks = [relative(rename(block.path)) for block in sites.blocks]
    return {
        "tower": tower,
        "insert": relative(rename(sites.insert_path)),
        "strip": blocks[-1],
        "attentions": [relative(attention(block)) for block in sites.blocks],
        "biases": [relative(rename(path)) for path in biases],
        "collectors": _collectors(blocks[0]) if collects else [],
        "down": {str(block): relative(rename(sites.blocks[block].down_path)) for block in recipe.register_neurons},
    }


def _collectors(first_block: str) -> list[str]:
    """The tower ("") and the modules between it and the list of blocks: `encoder` for the block `encoder.layer.0`."""
    holders = first_block.split(".")[:-2]
    return ["", *(".".join(holders[: depth + 1]) for depth in range(len(holders)))]


def _disk_path(loaded: Loaded, path: str) -> str:
    """The path of a module according to its parameters' names in the checkpoint file."""
    module = loaded.model.get_submodule(path)
    prefix = f"{path}." if path else ""
    names = [loaded.disk_name(prefix + name) for name, _ in module.named_parameters()]
    return common_path([name.rpartition(".")[0] for name in names if name is not None])


def _disk_attention_path(loaded: Loaded, block: Block) -> str:
    """The attention module by names on disk, where output and input projections may be in different modules."""
    if _holder(block.attention_weights) != block.attention_path:
        return _disk_path(loaded, block.attention_path)
    return _holder([name for weight in block.attention_weights if (name := loaded.disk_name(weight)) is not None])


def _holder(weights: Sequence[str]) -> str:
    """The innermost module that holds all the linears with these weights."""
    linears = [weight.rpartition(".")[0] for weight in weights]
    common = common_path(linears)
    return common.rpartition(".")[0] if common in linears else common

"""The recipe: which neurons to shift, and how. Strict, versioned YAML; what is not understood is refused.

Blocks and neurons are counted from 0.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import yaml

from regsurgery.errors import RecipeError, did_you_mean
from regsurgery.modes import MODES, Mode
from regsurgery.plain import plural
from regsurgery.strict_yaml import check_one_of, check_schema, mapping, shown, text_of

RECIPE_NAME = "recipe.yaml"  # in a patched folder
SCHEMA = 1
MAX_REGISTERS = 64
MAX_INDEX = 2**31 - 1
FILLS = ("zero", "mean", "outliers", "keep")
PREFIXES = ("keep", "fill")
REFERENCE = "reference"  # one shared extreme for all neurons of a block, as the authors' code has it
COMPATS = ("none", REFERENCE)
CHOSEN = ("register_neurons", "num_registers", "fill", "num_patches")  # settings that `find` decides


@dataclass(frozen=True)
class Recipe:
    """A validated recipe.

    Attributes:
        register_neurons: block -> ascending neuron indices, both counted from 0; blocks ascending.
        model: the Hub id or name that the recipe was made for; a mismatch is a warning.
        num_registers: register tokens to append; 0 only with no neurons.
        num_patches: the number of patches that `num_registers` was chosen for; if given, a model in mode shift
            appends more of them for larger images, see `runtime.surgery.registers_for`. None: always `num_registers`.
        mode: a name in `modes.MODES`.
        fill, prefix, compat: options of `runtime.surgery.neuron_shift`.
        scale: one factor per register.
        provenance: who found the neurons, on what, with which figures; echoed, never interpreted.
    """

    register_neurons: Mapping[int, tuple[int, ...]]
    model: str = ""
    num_registers: int = 1
    num_patches: int | None = None
    mode: str = "shift"
    fill: str = "zero"
    prefix: str = "keep"
    compat: str = "none"
    scale: tuple[float, ...] = (1.0,)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Mode:
        """The mode, as an object."""
        return MODES[self.mode]

    @property
    def num_neurons(self) -> int:
        return sum(len(neurons) for neurons in self.register_neurons.values())

    def with_num_registers(self, num_registers: int) -> Recipe:
        """The same recipe with another number of registers, for every image size; a common scale is kept."""
        if len(set(self.scale)) > 1:
            raise RecipeError("the recipe has one scale per register; change num_registers there")
        scale = (self.scale[0] if self.scale else 1.0,) * num_registers
        recipe = replace(self, num_registers=num_registers, num_patches=None, scale=scale)
        return _checked(recipe, "--num-registers")

    def with_compat(self, compat: str) -> Recipe:
        """The same recipe with other extremes, and with the same number of registers at every image size."""
        return _checked(replace(self, compat=compat, num_patches=None), "--compat")

    def with_mode(self, mode: str) -> Recipe:
        """The same recipe in another mode; native mode needs no fill, and drops that of the shift.

        The number of registers follows the image size only in mode shift.
        """
        kind = MODES.get(mode, self.kind)  # one that is not known is refused below
        fill = "zero" if kind.stock else self.fill
        num_patches = self.num_patches if kind.follows_size else None
        return _checked(replace(self, mode=mode, fill=fill, num_patches=num_patches), "--mode")

    def changes_since_found(self) -> tuple[str, ...]:
        """Settings that differ from what `find` wrote, each as "num_registers 2 -> 4".

        Empty for a recipe that `find` did not write, or without what it chose (`chosen` of the provenance).
        """
        found_by, chosen = self.provenance.get("found_by"), self.provenance.get("chosen")
        if not (isinstance(found_by, str) and re.fullmatch(r"regsurgery \S+ find", found_by)):
            return ()
        if not isinstance(chosen, Mapping):
            return ()
        now = self.as_dict()
        return tuple(
            f"{key} {_setting(chosen[key])} -> {_setting(now[key])}"
            for key in CHOSEN
            if key in now
            and key in chosen
            and isinstance(chosen[key], (int, type(None)) if key == "num_patches" else type(now[key]))
            and _setting(chosen[key]) != _setting(now[key])
        )

    def table(self) -> list[dict[str, Any]]:
        """The rows of the table that `find` chose from; empty for a recipe without such a table.

        A provenance may hold anything: what is not a row is skipped. A row has a `name`, `num_registers`, `fill`,
        `outliers_per_image`, `register_norm`, `drift`, `cost`, and `kl` if the model has logits; `chosen`, `paper`.
        """
        rows = self.provenance.get("sweep")
        return [row for row in rows if _is_row(row)] if isinstance(rows, list) else []

    def papers_setting(self) -> Recipe | None:
        """The setting of Jiang et al. (arXiv 2506.08010) that `find` had in its table: the smallest set of neurons and
        one register. None for a recipe without it, and if it is the chosen one.
        """
        row = next((row for row in self.table() if row["paper"]), None)
        if row is None or row["chosen"]:
            return None
        try:
            return _checked(Recipe(by_blocks([(block, neuron) for block, neuron in row["neurons"]])), "sweep")
        except (KeyError, TypeError, ValueError, RecipeError):  # a provenance may hold anything
            return None

    def as_single_shift(self) -> Recipe:
        """The same neurons shifted onto one register: mode bias takes its constants from this."""
        return replace(self, mode="shift", num_registers=1, num_patches=None, scale=self.scale[:1])

    def as_dict(self) -> dict[str, Any]:
        """Plain data in the order of the contract, as `to_yaml` writes it."""
        scales = set(self.scale)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "register_neurons": {block: list(neurons) for block, neurons in self.register_neurons.items()},
            "num_registers": self.num_registers,
            "num_patches": self.num_patches,
            "mode": self.mode,
            "fill": self.fill,
            "prefix": self.prefix,
            "compat": self.compat,
            "scale": self.scale[0] if len(scales) == 1 else list(self.scale) if scales else 1.0,
            "provenance": dict(self.provenance),
        }

    def to_yaml(self) -> str:
        return yaml.dump(
            self.as_dict(), Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
        )


def by_blocks(neurons: Sequence[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """Block -> ascending neurons, blocks ascending, as in a recipe."""
    found: dict[int, list[int]] = {}
    for block, neuron in sorted(neurons):
        found.setdefault(block, []).append(neuron)
    return {block: tuple(listed) for block, listed in found.items()}


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that writes a value out wherever it occurs; `strict_yaml` does not read aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


KEYS = [
    "schema",
    "model",
    "register_neurons",
    "num_registers",
    "num_patches",
    "mode",
    "fill",
    "prefix",
    "compat",
    "scale",
    "provenance",
]


def parse_recipe(text: str, where: str) -> Recipe:
    """Read a recipe from YAML text; `where` (a file name) opens every error message.

    Raises:
        RecipeError: malformed YAML, unknown key or value, a wrong type, a schema this version does not know.
    """
    data = mapping(text, where, "recipe", KEYS, RecipeError)

    def fail(message: str) -> NoReturn:
        raise RecipeError(f"{where}: {message}")

    check_schema(data, where, SCHEMA, RecipeError)
    if "register_neurons" not in data:
        fail("the key 'register_neurons' is missing; give it as {block: [neuron, ...]}")

    num_registers = data.get("num_registers", 1)
    if type(num_registers) is not int or not 0 <= num_registers <= MAX_REGISTERS:
        fail(f"num_registers must be a whole number from 0 to {MAX_REGISTERS}, found {shown(num_registers)}")
    num_patches = data.get("num_patches")
    if num_patches is not None and not (type(num_patches) is int and 1 <= num_patches <= MAX_INDEX):
        fail(
            f"num_patches must be a whole number from 1 to {MAX_INDEX}, or null for the same number of registers at "
            f"every image size, found {shown(num_patches)}"
        )
    scale = data.get("scale", 1.0)
    scales = scale if isinstance(scale, list) else [scale] * num_registers
    if not all(type(factor) in (int, float) and abs(factor) < 1e6 for factor in scales):
        fail(f"scale must be a number, or a list with one number per register, found {shown(scale)}")
    model = data.get("model", "")
    if not isinstance(model, str):
        fail(f"model must be text, found {shown(model)}")
    provenance = {} if data.get("provenance") is None else data["provenance"]
    if not isinstance(provenance, dict):
        fail("provenance must be a mapping")
    recipe = Recipe(
        register_neurons=_neurons(data["register_neurons"], fail),
        model=model,
        num_registers=num_registers,
        num_patches=num_patches,
        mode=data.get("mode", "shift"),
        fill=data.get("fill", "zero"),
        prefix=data.get("prefix", "keep"),
        compat=data.get("compat", "none"),
        scale=tuple(float(factor) for factor in scales),
        provenance=provenance,
    )
    return _checked(recipe, where)


def _neurons(data: Any, fail: Any) -> dict[int, tuple[int, ...]]:
    if not isinstance(data, dict):
        fail("register_neurons must be {block: [neuron, ...]}")
    result: dict[int, tuple[int, ...]] = {}
    for block in data:
        if not _is_index(block):
            fail(f"block {shown(block)} under 'register_neurons' must be a whole number from 0 to {MAX_INDEX}")
    for block, neurons in sorted(data.items()):
        if not isinstance(neurons, list) or not neurons:
            fail(f"block {block} under 'register_neurons' must have a list of at least one neuron")
        for neuron in neurons:
            if not _is_index(neuron):
                fail(f"neuron {shown(neuron)} of block {block} must be a whole number from 0 to {MAX_INDEX}")
        if len(set(neurons)) < len(neurons):
            twice = next(neuron for neuron, times in Counter(neurons).items() if times > 1)
            fail(f"neuron {twice} of block {block} is listed twice")
        result[block] = tuple(sorted(neurons))
    return result


ROW = {"name": str, "fill": str, "num_registers": int, "chosen": bool, "paper": bool,
       **dict.fromkeys(("outliers_per_image", "register_norm", "drift", "cost"), (int, float))}  # fmt: skip


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("kl"), (int, float, type(None))):
        return False
    return all(isinstance(row.get(key), kind) for key, kind in ROW.items())


def _setting(value: Any) -> str:
    """A setting as text: equal for equal settings, in whatever order neurons are listed."""
    if not isinstance(value, Mapping):
        return shown(value, "")
    pairs = [
        (block, neuron)
        for block, neurons in value.items()
        for neuron in (neurons if isinstance(neurons, (list, tuple)) else [neurons])
    ]
    return shown(", ".join(f"{block}:{neuron}" for block, neuron in sorted(pairs, key=_by_number)) or "none", "")


def _by_number(pair: tuple[Any, Any]) -> tuple[Any, ...]:
    return tuple((0, part, "") if type(part) is int else (1, 0, str(part)) for part in pair)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INDEX


def _checked(recipe: Recipe, where: str) -> Recipe:
    for key, value, allowed in (
        ("mode", recipe.mode, tuple(MODES)),
        ("fill", recipe.fill, FILLS),
        ("prefix", recipe.prefix, PREFIXES),
        ("compat", recipe.compat, COMPATS),
    ):
        check_one_of(key, value, allowed, where, RecipeError)
    if not 0 <= recipe.num_registers <= MAX_REGISTERS:
        raise RecipeError(f"{where}: num_registers must be from 0 to {MAX_REGISTERS}, found {recipe.num_registers}")
    if recipe.num_registers == 0 and recipe.register_neurons:
        raise RecipeError(
            f"{where}: num_registers is 0 but neurons are listed; clearing them without a register to take their "
            "values harms the model: set num_registers to 1"
        )
    if recipe.kind.stock and (recipe.fill != "zero" or recipe.compat != "none" or len(set(recipe.scale)) > 1):
        raise RecipeError(f"{where}: mode native needs fill: zero, compat: none and one scale for all registers")
    if recipe.num_patches is not None and (
        not recipe.kind.follows_size or recipe.compat != "none" or len(set(recipe.scale)) != 1
    ):
        raise RecipeError(
            f"{where}: num_patches needs mode: shift, compat: none, at least one register and one scale for all "
            "registers; leave it out for the same number of registers at every image size"
        )
    if recipe.kind.fitted and not recipe.register_neurons:
        raise RecipeError(f"{where}: mode {recipe.mode} needs register neurons")
    if len(recipe.scale) != recipe.num_registers:
        raise RecipeError(
            f"{where}: scale lists {len(recipe.scale)} numbers for {plural(recipe.num_registers, 'register')}; list "
            "one per register"
        )
    return recipe


# --- where recipes come from ----------------------------------------------------------------------------------------


@functools.cache
def bundled_recipes() -> Mapping[str, Recipe]:
    """Every recipe that ships with regsurgery, by name, in alphabetical order."""
    found = {}
    for entry in sorted(_bundled_folder().iterdir(), key=lambda entry: entry.name.removesuffix(".yaml")):
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = parse_recipe(entry.read_text("utf-8"), entry.name)
    return found


def _bundled_folder() -> Any:
    installed = resources.files("regsurgery") / "_recipes"  # a wheel carries the top-level recipes/ here
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(name_or_path: str) -> Recipe:
    """A recipe file, or a bundled recipe by name.

    Raises:
        RecipeError: neither a file nor a bundled name; the message suggests the nearest name.
    """
    path = Path(name_or_path)
    try:
        is_file = path.is_file()
    except OSError:  # a name that no file can have
        is_file = False
    if is_file:
        return read_recipe(path)
    bundled = bundled_recipes()
    if name_or_path in bundled:
        return bundled[name_or_path]
    hint = did_you_mean(name_or_path, list(bundled))
    raise RecipeError(
        f"{name_or_path[:300]}: no such recipe file, and no bundled recipe of that name"
        f"{hint or '; the bundled recipes are ' + ', '.join(bundled)}"
    )


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file.

    Raises:
        RecipeError: the file cannot be read, or is not a recipe.
    """
    return parse_recipe(text_of(path, "recipe", RecipeError), str(path))


def recipe_for_model(model_id: str) -> tuple[str, Recipe] | None:
    """The bundled recipe made for exactly this model id, with its name; the first by name if there are several."""
    for name, recipe in bundled_recipes().items():
        if recipe.model and recipe.model == model_id:
            return name, recipe
    return None

"""The most faithful cure: of all settings that leave no outlier, the one whose outputs drift least from the original's.

The search starts from the smallest set of neurons that suppresses the outliers (`selection.select`). Neurons join one
at a time, by drift: one that never makes an outlier alone may prepare what another completes. Registers are tried from
1 to twice the outliers per image, since each outlier is a place that attention can sink into. Sets are grown on a few
images and judged on others. If the drifts of two settings are within one standard error of their paired difference,
the one with fewer registers is chosen, then the one with fewer neurons, then the one whose neurons contribute more to
the outliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regsurgery.recipe import MAX_REGISTERS
from regsurgery.search.drift import DriftTrials, Neurons, Setting, Tried
from regsurgery.search.selection import STARVED

POOL = 6  # best candidates by contribution that may join
MAX_JOINED = 4
BEAM = 3  # sets per size that are judged; more images say more surely which of them is nearest
# A neuron joins if it takes away at least this share of the drift. A smaller share is within the variation between
# sets of images: on the ViT-Ti 6:189 takes 80 %; after it, 6:59 takes 10 to 20 %, and less than nothing on some
# divisions of the photos.
MIN_GAIN = 1 / 3
MAX_DROPPED = 8  # members whose removal is tried, starting with the last to join
FILLS = ("outliers",)  # in addition to zero, tried at the best setting
REGISTERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Cure:
    """What must hold of a setting before its drift counts.

    Attributes:
        original: outliers per image of the original.
        allowed: how many may remain.
        outlier_norm: mean norm of the original's outliers.
    """

    original: float
    allowed: float
    outlier_norm: float

    def gone(self, tried: Tried) -> bool:
        """Whether the outliers are gone."""
        return float(tried.outliers.mean()) <= self.allowed

    def holds(self, tried: Tried) -> bool:
        """Whether the outliers are gone and the registers have taken over their norm."""
        share = 1 - float(tried.outliers.mean()) / self.original
        return self.gone(tried) and float(tried.register_norm.mean()) >= STARVED * share * self.outlier_norm


@dataclass(frozen=True)
class SettingRow:
    """One row of the table: a setting, tried on the images that decide.

    Attributes:
        name: description of the setting.
        num_images: how many images decided.
        cost: tokens added, in percent.
        chosen: whether it is the recipe's setting; `paper`: the smallest set with one register.
    """

    name: str
    setting: Setting
    tried: Tried
    cost: float
    chosen: bool = False
    paper: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the contract of `find --json` and of a recipe's provenance."""
        figures = self.tried.means()
        return {
            "name": self.name,
            "neurons": [list(neuron) for neuron in self.setting.neurons],
            "top_k": len(self.setting.neurons),
            "num_registers": self.setting.num_registers,
            "fill": self.setting.fill,
            **({} if self.setting.compat == "none" else {"compat": self.setting.compat}),
            "outliers_per_image": figures.pop("outliers"),
            **figures,
            "cost": self.cost,
            "chosen": self.chosen,
            "paper": self.paper,
        }


@dataclass(frozen=True)
class Choice:
    """The chosen setting, and the table it was chosen from.

    Attributes:
        ranked: the settings that may be chosen, best first; the first is `setting`.
    """

    ranked: tuple[Setting, ...]
    rows: tuple[SettingRow, ...]

    @property
    def setting(self) -> Setting:
        return self.ranked[0]

    def with_setting(self, setting: Setting) -> Choice:
        """The same table with another of `ranked` chosen."""
        rows = tuple(replace(row, chosen=row.setting == setting) for row in self.rows)
        return Choice((setting, *(one for one in self.ranked if one != setting)), rows)

    def beside(self, row: SettingRow) -> Choice:
        """`row` chosen instead; the setting that was is called ours."""
        rows = tuple(replace(one, name=f"{one.name} (ours)", chosen=False) if one.chosen else one for one in self.rows)
        return Choice((row.setting, *self.ranked), (*rows, replace(row, chosen=True)))


def register_counts(outliers: float, fixed: int | None = None) -> tuple[int, ...]:
    """The numbers of registers to try: from 1 to twice the outliers per image; or only `fixed`."""
    if fixed is not None:
        return (fixed,)
    most = min(MAX_REGISTERS, max(2, math.ceil(2 * outliers)))
    return tuple(sorted({count for count in (*REGISTERS, round(outliers)) if 1 <= count <= most}))


def grow(
    trials: DriftTrials, smallest: Neurons, ranked: Sequence[tuple[int, int]], cure: Cure, counts: Sequence[int]
) -> tuple[list[Neurons], int]:
    """Sets of neurons, each nearer to the original than the smaller ones, and the number of registers that they grew
    with. The smallest comes first, the nearest last.

    Args:
        ranked: candidates, best first.
        counts: numbers of registers that may be tried.
    """
    typical = min(counts, key=lambda count: abs(count - cure.original))
    current, tried = _best(trials, [Setting(smallest, count) for count in dict.fromkeys((min(counts), typical))])
    count, path = current.num_registers, [smallest]
    pool = [neuron for neuron in ranked if neuron not in smallest][:POOL]
    while len(current.neurons) - len(smallest) < MAX_JOINED and pool:
        larger = [Setting(tuple(sorted((*current.neurons, neuron))), count) for neuron in pool]
        cured = [setting for setting in larger if cure.holds(trials(setting))]
        if not cured:
            break
        cured.sort(key=lambda setting: float(trials(setting).drift.mean()))
        found = trials(cured[0])
        if not _gains(found, tried):
            break
        rivals = [setting.neurons for setting in cured[1:BEAM] if _gains(trials(setting), tried)]
        current, tried = cured[0], found
        path += [*rivals, current.neurons]
        pool = [neuron for neuron in pool if neuron not in current.neurons]
    joined = [neuron for neuron in current.neurons if neuron not in smallest]
    for member in [*joined, *smallest][:MAX_DROPPED] if len(path) > 1 else []:
        fewer = Setting(tuple(neuron for neuron in current.neurons if neuron != member), count)
        found = trials(fewer)
        if cure.holds(found) and float(found.drift.mean()) <= float(tried.drift.mean()):
            current, tried = fewer, found
    return (path if current.neurons in path else [*path, current.neurons]), count


def choose(
    trials: DriftTrials,
    sets: Sequence[Neurons],
    count: int,
    cure: Cure,
    counts: Sequence[int],
    num_tokens: int,
    *,
    ranked: Sequence[tuple[int, int]] = (),
    fills: Sequence[str] = FILLS,
) -> Choice:
    """Try the settings that matter on the images of `trials`, and choose.

    Args:
        sets: from `grow`; the first is the smallest.
        count: the number of registers that they grew with; the numbers tried start there.
        num_tokens: of the original, for the cost of a register.
        ranked: candidates, best first: among equally large and near sets, the one with better candidates is taken.
        fills: fills other than `zero` to try at the best setting.
    """
    cells: dict[Setting, Tried] = {}
    places = {neuron: place for place, neuron in enumerate(ranked)}

    def tried(setting: Setting) -> Tried:
        cells[setting] = trials(setting)
        return cells[setting]

    def place(neurons: Neurons) -> list[int]:
        return sorted(places.get(neuron, len(places)) for neuron in neurons)

    for neurons in sets:
        if len(neurons) == len(sets[-1]):
            tried(Setting(neurons, count))
    rivals = {setting: found for setting, found in cells.items() if cure.holds(found)} or dict(cells)
    nearest = _ranked(rivals, place)[0].neurons
    best = _walk(tried, nearest, count, counts)
    for neurons in sets:
        if len(neurons) != len(nearest):
            tried(Setting(neurons, best))
    for fill in fills:
        tried(Setting(nearest, best, fill))
    paper = Setting(sets[0], 1)
    for neurons in dict.fromkeys((nearest, sets[0])):
        tried(Setting(neurons, 1))
    selectable = {setting: found for setting, found in cells.items() if setting.num_registers in counts}
    order = _ranked({setting: found for setting, found in selectable.items() if cure.holds(found)}, place)
    if not order:
        order = (Setting(sets[0], min(counts)),)
        tried(order[0])
    unused = Setting((), 1)
    rows = [SettingRow("unused register", unused, trials(unused), 100 / num_tokens)]
    for setting, found in sorted(cells.items(), key=_order):
        cost = 100 * setting.num_registers / num_tokens
        rows.append(SettingRow(_name(setting, sets[0]), setting, found, cost, setting == order[0], setting == paper))
    return Choice(order, tuple(rows))


def _walk(tried: Callable[[Setting], Tried], neurons: Neurons, count: int, counts: Sequence[int]) -> int:
    """The number of registers with the least drift, from `count` on: down while that helps, else up while it does."""

    def drift(at: int) -> float:
        return float(tried(Setting(neurons, counts[at])).drift.mean())

    start = best = counts.index(count)
    least = drift(start)
    for step in (-1, 1):
        at = start + step
        while 0 <= at < len(counts):
            found = drift(at)
            if found >= least:
                break
            best, least = at, found
            at += step
        if best != start:  # a valley: the other side is higher
            break
    if best > 0:  # fewer registers, if they drift as little
        drift(best - 1)
    return counts[best]


def _ranked(cells: Mapping[Setting, Tried], place: Callable[[Neurons], list[int]]) -> tuple[Setting, ...]:
    """All of `cells`, the chosen one first: among those near the best, fewer registers come first, then fewer neurons,
    then the lowest `place`. One register counts as near if several do not take away `MIN_GAIN` of its drift.
    """
    if not cells:
        return ()
    best, least = min(cells.items(), key=lambda cell: float(cell[1].drift.mean()))

    def near(setting: Setting, found: Tried) -> bool:
        mean, error = found.worse_than(least)
        if mean <= error:
            return True
        # If one register drifts nearly as little as several, the network does not use its outliers as sinks.
        one = setting.num_registers == 1 and setting.neurons == best.neurons and setting.fill in ("zero", best.fill)
        if one and not _gains(least, found):
            return True
        fewer = len(setting.neurons) < len(best.neurons) or (setting.fill == "zero" != best.fill)
        return fewer and setting.num_registers <= best.num_registers and not _gains(least, found)

    chosen = [setting for setting, found in cells.items() if near(setting, found)]
    rest = [setting for setting in cells if setting not in chosen]
    drift = {setting: float(found.drift.mean()) for setting, found in cells.items()}
    chosen.sort(
        key=lambda one: (one.num_registers, len(one.neurons), one.fill != "zero", place(one.neurons), drift[one])
    )
    return (*chosen, *sorted(rest, key=drift.__getitem__))


def _gains(new: Tried, old: Tried) -> bool:
    """Whether another neuron is worth it: it takes away `MIN_GAIN` of the drift, and more than one standard error."""
    more, error = old.worse_than(new)
    return more >= MIN_GAIN * float(old.drift.mean()) and more > error


def _best(trials: DriftTrials, settings: Sequence[Setting]) -> tuple[Setting, Tried]:
    return min(((one, trials(one)) for one in settings), key=lambda cell: float(cell[1].drift.mean()))


def _order(cell: tuple[Setting, Tried]) -> tuple[Any, ...]:
    setting, _ = cell
    return len(setting.neurons), setting.neurons, setting.num_registers, setting.fill != "zero"


def _name(setting: Setting, smallest: Neurons) -> str:
    """Text for the neurons: the smallest set, or what joined it and what left it."""
    joined = [f"+{block}:{neuron}" for block, neuron in setting.neurons if (block, neuron) not in smallest]
    left = [f"-{block}:{neuron}" for block, neuron in smallest if (block, neuron) not in setting.neurons]
    return " ".join(("smallest", *joined, *left))

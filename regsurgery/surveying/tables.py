"""The records of a survey as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regsurgery.evaluation.result import number
from regsurgery.modes import MODES
from regsurgery.plain import plural
from regsurgery.recipe import bundled_recipes
from regsurgery.surveying.listed import Entry, Expected
from regsurgery.surveying.records import CRASHED, FAILED, NOTHING, REFUSED, Record
from regsurgery.surveying.stages import DOCTOR, FIND, OURS, PAPER, Variant

SETTINGS = {PAPER: "paper's", OURS: "ours"}
DOWNLOAD = "download"  # a part of a stage, see `Progress.stage`


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        note: what is to be known about it.
    """

    title: str
    note: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def filled(self) -> Table:
        """The same, without the columns in which no row has anything."""
        kept = [number for number in range(len(self.head)) if any(row[number] for row in self.rows)]
        head, *rows = (tuple(row[number] for number in kept) for row in (self.head, *self.rows))
        return replace(self, head=head, rows=tuple(rows))


@dataclass(frozen=True)
class Surveyed:
    """A model of the list, and the records of its stages, in their order."""

    entry: Entry
    records: tuple[Record, ...]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def failures(self) -> tuple[Record, ...]:
        """The stages that failed; a mode or a task that the model does not allow is refused, which is no failure."""
        return tuple(
            record
            for record in self.records
            if record.outcome in (CRASHED, FAILED) or (record.outcome == REFUSED and record.stage in (DOCTOR, FIND))
        )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The ways in which it was patched, or should have been."""
        tried = [Variant(setting, mode) for setting in (PAPER, OURS) for mode in MODES]
        return tuple(variant for variant in tried if self.record(variant.patch) is not None)

    def record(self, stage: str) -> Record | None:
        return next((record for record in self.records if record.stage == stage), None)

    def result(self, stage: str) -> Mapping[str, Any]:
        """What a stage found; empty unless it is done."""
        record = self.record(stage)
        return (record.result if record is not None else None) or {}

    @property
    def verdict(self) -> str:
        """`doctor`'s word, or how far it got."""
        record = self.record(FIND) or self.record(DOCTOR)
        if record is None:
            return "not begun"
        verdict = self.result(DOCTOR).get("verdict")
        return str(verdict) if verdict and record.outcome != NOTHING else record.outcome

    @property
    def summary(self) -> str:
        """One line: the verdict, and what was found."""
        found = self.result(FIND)
        if not found:
            return self.verdict
        registers = plural(found["num_registers"], "register")
        return f"{self.verdict}: {_neurons(found['register_neurons'])}; {registers}"

    def figure(self, variant: Variant, task: str, name: str) -> Mapping[str, Any] | None:
        """The row of that name among the figures of a task; if every block has one, that of the last block but one."""
        rows = [row for row in self.result(variant.scored(task)).get("figures", ()) if row["name"] == name]
        return rows[-2:][0] if rows else None

    def as_dict(self) -> dict[str, Any]:
        return {**self.entry.as_dict(), "records": [record.as_dict() for record in self.records]}


def tables(models: Sequence[Surveyed]) -> tuple[Table, ...]:
    """All tables; one without rows is left out, and in each a column that no row fills."""
    made = (_models(models), _cures(models), _published(models), _costs(models), _errors(models))
    return tuple(table.filled() for table in made if table.rows)


def machines(models: Sequence[Surveyed]) -> list[str]:
    """The machines that the records come from, each as a line."""
    found = [record.machine for model in models for record in model.records if record.machine]
    lines = []
    for one in found:
        gpu = f", {one['gpu']}" if one.get("gpu") else ""
        packages = ", ".join(
            f"{name} {one[name]}" for name in one if name not in ("cpu", "cores", "memory_gb", "gpu") and one[name]
        )
        lines.append(f"{one['cpu']}, {one['cores']} cores, {one['memory_gb']} GB{gpu}; {packages}")
    return list(dict.fromkeys(lines))


# --- the tables -------------------------------------------------------------------------------------------------------


def _models(models: Sequence[Surveyed]) -> Table:
    rows = []
    for model in models:
        doctor, find = model.result(DOCTOR), model.result(FIND)
        rows.append(
            (
                model.name,
                model.entry.model,
                model.verdict,
                number(doctor.get("outliers_per_image")),
                _text(doctor.get("emergence_block")),
                _neurons(find.get("register_neurons")),
                _text(find.get("num_registers")),
                str(doctor.get("reason", "") if not find else ""),
            )
        )
    head = ("model", "checkpoint", "verdict", "outliers per image", "from block", "neurons", "registers", "why")
    return Table(
        "Models", "Neurons and registers are those of our setting; blocks are counted from 0.", head, tuple(rows)
    )


def _cures(models: Sequence[Surveyed]) -> Table:
    rows = []
    for model in models:
        for variant in model.variants:
            patched = model.record(variant.patch)
            assert patched is not None
            result = patched.result or {}
            rows.append(
                (
                    model.name,
                    SETTINGS[variant.setting],
                    variant.mode,
                    _text(len(_listed(result["register_neurons"])) if result else None),
                    _text(result.get("num_registers")),
                    _change(model.figure(variant, "norms", "outliers per image")),
                    _change(model.figure(variant, "norms", "max")),
                    _after(model.figure(variant, "fidelity", "KL divergence")),
                    _after(model.figure(variant, "fidelity", "same first class")),
                    _after(_of_output(model, variant)),
                    _after(model.figure(variant, "fidelity", "cosine of patches, outliers aside")),
                    _change(best(model, variant)),
                    _accuracy(model, variant),
                    patched.error or "",
                )
            )
    head = ("model", "setting", "mode", "neurons", "registers", "outliers per image", "largest norm", "KL",
            "same class", "cosine of output", "cosine of patches", "LOST", "top-1", "not patched, because")  # fmt: skip
    note = (
        "Before → after, with 95 % intervals. The paper's setting is the smallest set of neurons with one register; "
        "where it is missing, ours is the same. Norms are those after the last block but one, outlier patches are left "
        "out of the cosine. LOST is the best of its settings for each model."
    )
    return Table("Cures", note, head, tuple(rows))


def _published(models: Sequence[Surveyed]) -> Table:
    rows = []
    for model in models:
        for expected in model.entry.expected:
            measured = (_measured(model, expected, setting) for setting in (PAPER, OURS))
            about = "; ".join(text for text in (expected.images, expected.note) if text)
            mode = expected.mode if expected.figure in ("num_neurons", "largest_norm", "lost", "accuracy") else ""
            rows.append((model.name, expected.figure, mode, published(expected), *measured, expected.source, about))
    head = ("model", "figure", "mode", "published", "measured, paper's", "measured, ours", "source", "published for")
    return Table(
        "Published and measured", "Published figures are of other images: read them by eye.", head, tuple(rows)
    )


def _costs(models: Sequence[Surveyed]) -> Table:
    rows = [
        (
            model.name,
            record.stage,
            f"{record.seconds:.1f}",
            f"{record.parts[DOWNLOAD]:.1f}" if DOWNLOAD in record.parts else "",
            "" if record.peak_rss_mb is None else f"{record.peak_rss_mb:.0f}",
            "" if record.peak_gpu_mb is None else f"{record.peak_gpu_mb:.0f}",
        )
        for model in models
        for record in model.records
    ]
    note = (
        "Peak memory is that of the stage's process so far, libraries included; the tasks of one patched model share a "
        "process, in the order of the rows, and the first of them opens it."
    )
    return Table(
        "Cost", note, ("model", "stage", "seconds", "of them download", "peak MiB", "peak GPU MiB"), tuple(rows)
    )


def _errors(models: Sequence[Surveyed]) -> Table:
    rows = [
        (model.name, record.stage, record.outcome, record.error)
        for model in models
        for record in model.records
        if record.error is not None
    ]
    return Table("What failed, or is not possible", "", ("model", "stage", "outcome", "why"), tuple(rows))


# --- cells ------------------------------------------------------------------------------------------------------------


def best(model: Surveyed, variant: Variant) -> Mapping[str, Any] | None:
    """LOST's CorLoc as a row: of the original and of the patched model, each in its best setting."""
    rows = [row for row in model.result(variant.scored("lost")).get("figures", ()) if row["name"] == "CorLoc"]
    if not rows:
        return None
    found = {}
    for side in ("original", "patched"):
        known = [row[side] for row in rows if row[side] is not None]
        found[side] = max(known, key=lambda one: one["value"]) if known else None
    return found


def _of_output(model: Surveyed, variant: Variant) -> Mapping[str, Any] | None:
    """The cosine of the main output, whatever that is called; `fidelity` has it before those of tokens."""
    rows = model.result(variant.scored("fidelity")).get("figures", ())
    return next((row for row in rows if row["name"].startswith("cosine of ")), None)


def published(expected: Expected) -> str:
    """What was published, as text."""
    if expected.recipe is not None:
        return f"{bundled_recipes()[expected.recipe].num_neurons} listed"
    if expected.value is not None:
        return str(expected.value)
    known = (value for value in (expected.original, expected.patched) if value is not None)
    return " → ".join(str(value) if isinstance(value, int) else number(value) for value in known)


def _measured(model: Surveyed, expected: Expected, setting: str) -> str:
    """The figure that a published one is to be compared with; "" if it is not there."""
    doctor, find = model.result(DOCTOR), model.result(FIND)
    if expected.figure in ("verdict", "emergence_block"):
        return _text(doctor.get(expected.figure))
    if expected.figure == "neurons":
        return _agreement(find, expected) if find and setting == OURS else ""
    same = setting == PAPER and find.get("paper_is_chosen")
    variant = Variant(OURS if same else setting, expected.mode)
    if expected.figure == "num_neurons":
        patched = model.result(variant.patch)
        return _text(len(_listed(patched["register_neurons"])) if patched else None)
    if expected.figure == "lost":
        return _change(best(model, variant))
    if expected.figure == "accuracy":
        return _accuracy(model, variant)
    return _change(model.figure(variant, "norms", "max"))


def _accuracy(model: Surveyed, variant: Variant) -> str:
    """Top-1, and whether it is zero-shot."""
    shown = _change(model.figure(variant, "classify", "top-1"))
    zero_shot = "prompts" in model.result(variant.scored("classify")).get("settings", {})
    return f"{shown} zero-shot" if shown and zero_shot else shown


def _agreement(find: Mapping[str, Any], expected: Expected) -> str:
    """How many of a recipe's neurons are among as many of `find`'s best candidates."""
    assert expected.recipe is not None
    recipe = bundled_recipes()[expected.recipe]
    listed = {(block, neuron) for block, neurons in recipe.register_neurons.items() for neuron in neurons}
    best_ones = {(block, neuron) for block, neuron in find["ranked"][: len(listed)]}
    return f"{len(listed & best_ones)} of {len(listed)} among the first {len(listed)} candidates"


def _listed(register_neurons: Mapping[str, Sequence[int]]) -> list[str]:
    return [f"{block}:{neuron}" for block, neurons in register_neurons.items() for neuron in neurons]


def _neurons(register_neurons: Mapping[str, Sequence[int]] | None, most: int = 8) -> str:
    """The first neurons, and how many there are."""
    listed = _listed(register_neurons or {})
    return ", ".join(listed) if len(listed) <= most else f"{', '.join(listed[:most])}, … ({len(listed)})"


def _change(row: Mapping[str, Any] | None) -> str:
    """`before → after (low to high)`."""
    if row is None or row.get("patched") is None:
        return ""
    before = row.get("original")
    return " → ".join([*([number(before["value"])] if before else []), _after(row)])


def _after(row: Mapping[str, Any] | None) -> str:
    estimate = None if row is None else row.get("patched")
    if estimate is None:
        return ""
    interval = "" if estimate["low"] is None else f" ({number(estimate['low'])} to {number(estimate['high'])})"
    return f"{number(estimate['value'])}{interval}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)

"""`find`: search for register neurons and write a recipe; in one go, in parts, or with several processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.whole import check_parent, replace_file
from regsurgery.errors import OutputError, RecipeError, UserError
from regsurgery.models import open_model
from regsurgery.options import FindOptions, SearchOptions, takes
from regsurgery.recipe import REFERENCE, find_recipe

if TYPE_CHECKING:
    from regsurgery.search.decide import Found
    from regsurgery.search.find import Task
    from regsurgery.search.processes import Processes
    from regsurgery.search.shares import FoundPart, Part
    from regsurgery.search.statistics_file import Statistics


@takes(FindOptions)
def find(model: str | Path, output: str | Path | None = None, *, options: FindOptions) -> Found:
    """Find the register neurons of `model`, how many registers they need, and what the patches keep.

    Of the settings that leave no outlier token, the chosen one has the least drift of outputs from the original's, on
    images that took no part in the search.

    If started by `torchrun` or `accelerate launch`, the processes share the images; the first one writes.

    Args:
        output: recipe file to write. A recipe that `find` wrote there before is replaced, anything else refused. A
            journal next to it (`<output>.journal`) lets a killed search continue.
        options: see `options.FindOptions`; its fields are the keyword arguments.

    Raises:
        NothingToFixError: there are no outlier tokens, or MLP neurons are not their cause.
        UserError: the input is at fault; see `errors`.
    """
    from regsurgery.search.processes import processes
    from regsurgery.search.shares import Part
    from regsurgery.search.statistics_file import read_parts

    output = None if output is None else Path(output)
    if options.merge and options.compat == REFERENCE:
        raise UserError("--compat reference: looks at the images itself, which --merge does not; leave one of them out")
    if output is not None:
        _check_recipe_output(output)
    with processes() as group:
        parts = read_parts([Path(path) for path in options.merge]) if options.merge else None
        part = None if parts is None else Part(1, len(parts))  # any will do, to look at the pilot's images
        task = _task(model, options, part, group)
        journal = None if output is None else output.absolute().with_name(f"{output.name}.journal")
        found = search_for(task, journal, parts)
        if output is not None and group.is_first:
            replace_file(output, found.recipe.to_yaml().encode())
    return found


@takes(SearchOptions)
def find_part(model: str | Path, stats: str | Path, part: tuple[int, int], options: SearchOptions) -> FoundPart:
    """Run one part of `find`, as a job of an array; `find(merge=...)` puts the parts together.

    Args:
        stats: statistics file to write; an earlier one is replaced, anything else refused. A journal next to it
            (`<stats>.journal`) lets a killed part continue.
        part: `(i, n)`, the i-th of n parts, i from 1. Parts share the images by batches of 8, or by whole tars if there
            are at least n WebDataset tars and `num_images` is not given.
        options: the same as for `find`, identical in every part.

    Raises:
        NothingToFixError: there are no outlier tokens, or MLP neurons are not their cause.
        UserError: the input is at fault; see `errors`.
    """
    from regsurgery.search.find import find_part as search
    from regsurgery.search.processes import processes
    from regsurgery.search.shares import Part
    from regsurgery.search.statistics_file import check_statistics_output

    chosen, stats = Part.parse(f"{part[0]}/{part[1]}"), Path(stats)
    check_statistics_output(stats)
    with processes() as group:
        return search(_task(model, options, chosen, group), chosen, stats)


def search_for(task: Task, journal: Path | None, parts: dict[Path, Statistics] | None = None) -> Found:
    """`search.find.find`, and one line that says what was found."""
    from regsurgery.search.find import find as search

    with task.located.loaded.files.unchanged():
        found = search(task, journal, parts)
    recipe = found.recipe
    neurons = ", ".join(f"{b}:{n}" for b, listed in recipe.register_neurons.items() for n in listed)
    tokens = "1 register token" if recipe.num_registers == 1 else f"{recipe.num_registers} register tokens"
    task.progress.say(f"register neurons (block:neuron): {neurons}; {tokens}; {found.second_resolution.note}")
    return found


def _task(model: str | Path, options: SearchOptions, part: Part | None, group: Processes) -> Task:
    """The search of one process, which has its share of the images."""
    from regsurgery.search.find import Task
    from regsurgery.search.shares import share_out

    say = options.progress.say
    share = share_out(options.images, options.num_images, seed=options.seed, say=say, part=part, processes=group)
    located = open_model(model, options, options.image_size)
    options.progress.say(f"preprocessing: {located.loaded.preprocess_note}; images: {share.own.note}")
    return Task(located, share, options, group)


def _check_recipe_output(output: Path) -> None:
    check_parent(output)
    if not output.exists():
        return
    try:
        ours = " find" in str(find_recipe(str(output)).provenance.get("found_by"))
    except RecipeError:
        ours = False
    if not ours:
        raise OutputError(f"{output}: exists and was not written by regsurgery find; choose another file with -o")

"""Settings of other libraries, changed for a while.

They apply to the whole process, in every thread, and are restored afterwards, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT: Any = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set `owner.name` to `value` for the block; an attribute that `owner` itself lacked is removed afterwards."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and warnings of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without progress bars of datasets, and without its message to a server about every load, even of local files."""
    import datasets.config

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with replaced(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False):
            yield
    finally:
        if not bars:
            datasets.enable_progress_bars()

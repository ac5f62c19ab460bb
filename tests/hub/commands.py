"""The command line in a process whose Hub is the loopback server: huggingface_hub reads that once, when imported."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Done

TOKEN = "hf_me"


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """What makes huggingface_hub talk to `url`, with its cache in `home`."""
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    return settings | ({} if token is None else {"HF_TOKEN": token})


@contextlib.contextmanager
def process(url: str, home: Path) -> Iterator[Callable[..., Any]]:
    """A function that calls a function of the process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(url, home).items():
            patch.setenv(name, value)
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


def run(*argv: Any, token: str | None = TOKEN) -> Done:
    """`regsurgery ARGV`; to be called in the process."""
    from regsurgery.cli.app import main

    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["regsurgery", *map(str, argv)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def load_and_run(repo: str, pixels: Any, **options: Any) -> Any:
    """The logits of `regsurgery.load(repo)`, or its error in words; to be called in the process."""
    import torch

    import regsurgery
    from regsurgery.errors import RegsurgeryError

    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            output = regsurgery.load(repo, **options)(pixels)
    except RegsurgeryError as error:
        return str(error)
    return getattr(output, "logits", output)


def loaded(model: str, **options: Any) -> dict[str, Any] | str:
    """Library and recorded source of MODEL, or its error in words; to be called in the process."""
    from regsurgery.errors import RegsurgeryError
    from regsurgery.frontends.load import load
    from regsurgery.options import LoadOptions

    try:
        found = load(model, LoadOptions(**options))
    except RegsurgeryError as error:
        return str(error)
    return {"library": found.library, **found.source.as_dict()}

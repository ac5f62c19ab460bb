"""How a process ends that nobody planned for: bugs, little memory, standard streams that are closed or full."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regsurgery.cli.console import console
from regsurgery.errors import (
    EXIT_BUG,
    EXIT_NO_MEMORY,
    EXIT_USER_ERROR,
    CheckpointError,
    UserError,
    library_fails,
)
from regsurgery.garbage import SELDOM, collect_seldom, objects_stay
from regsurgery.memory import shortage
from regsurgery.plain import code, markdown, plain
from tests.commands import PROGRAM, Done

HOSTILE = "\x1b]0;gone\x1b[31m[/red] :smile: \u202eevil\x9b1m"
SHOWN = "\\x1b]0;gone\\x1b[31m[/red] :smile: \\u202eevil\\x9b1m"
TORCH_CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to " \
    "allocate 602112000 bytes. Error code 12 (Cannot allocate memory)"  # fmt: skip


def shell(command: str, **env: str) -> Done:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **env})
    return Done(done.returncode, done.stdout, done.stderr)


def from_memory(text: str) -> Exception:
    error = CheckpointError(text)
    error.__cause__ = MemoryError()
    return error


LACKS = {
    "python": (MemoryError(), ""),
    "torch": (RuntimeError(TORCH_CPU), " (602112000 bytes were asked for)"),
    "cuda": (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), " (20.00 MiB were asked for)"),
    "numpy": (MemoryError("Unable to allocate 7.45 GiB for an array"), " (7.45 GiB were asked for)"),
    "linker": (ImportError("libtorch_cpu.so: failed to map segment from shared object"), ""),
    "system": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ""),
    "threads": (RuntimeError("can't start new thread"), ""),
    "worker": (RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. "), ""),
    "what comes of it": (from_memory("model: cannot be built"), ""),
}


@pytest.mark.parametrize("kind", LACKS)
def test_too_little_memory_is_one_line_and_an_exit_code(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    error, asked = LACKS[kind]

    def fail(*args: Any, **how: Any) -> None:
        raise error

    monkeypatch.setattr("regsurgery.commands.doctor.doctor", fail)
    done = run("doctor", "demo")
    assert (done.code, done.out) == (EXIT_NO_MEMORY, "")
    assert done.err.startswith(f"error: memory is short{asked}: end other programs or raise the limit")
    assert done.err.count("\n") == 1


def test_other_errors_are_not_taken_for_it() -> None:
    assert shortage(RuntimeError("expected 3 channels")) is None
    assert shortage(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) is None
    loop = ValueError("x")
    loop.__cause__ = KeyError("y")
    loop.__cause__.__context__ = loop
    assert shortage(loop) is None


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v")
def test_a_limit_under_which_torch_cannot_be_imported(tmp_path: Path) -> None:
    done = shell(f"ulimit -v 1000000; {PROGRAM} patch demo -o {tmp_path / 'out'}")
    assert done.code == EXIT_NO_MEMORY and not (tmp_path / "out").exists()
    note, error = done.err.splitlines()[0], done.err.splitlines()[-1]
    assert note.startswith("note: the limit of 976 MiB (ulimit -v)")
    assert error.startswith("error: memory is short") and "Traceback" not in done.err


def test_a_bug_has_an_exit_code_of_its_own_and_its_traceback() -> None:
    program = "import regsurgery.__main__ as m, regsurgery.cli.app as a; a.main = lambda: 1 / 0; m.run()"
    done = shell(f'{sys.executable} -c "{program}"')
    assert done.code == EXIT_BUG
    assert "ZeroDivisionError" in done.err and done.err.splitlines()[-1].startswith(
        "error: this is a bug in regsurgery"
    )
    assert shell(f'{sys.executable} -c "{program}" 2>/dev/full').code == EXIT_BUG


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    for arguments in ("families", "--help", "families --json"):
        assert shell(f"{PROGRAM} {arguments} {closed}").code == 0
    assert shell(f"{PROGRAM} patch demo -o /nowhere/out {closed}").code == EXIT_USER_ERROR


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    opened = f"number = open({str(tmp_path / 'opened')!r}, 'w').fileno()"
    program = f"import regsurgery.__main__ as m; m._open_standard_streams(); {opened}; raise SystemExit(number)"
    assert shell(f'{sys.executable} -c "{program}" <&- >&- 2>&-').code > 2


def test_full_streams() -> None:
    done = shell(f"{PROGRAM} families >/dev/full")
    assert done.code == EXIT_USER_ERROR
    assert done.err.startswith("error: standard output, or a temporary file: No space left on device; free some space")
    assert shell(f"{PROGRAM} patch demo -o /nowhere/out 2>/dev/full").code == EXIT_USER_ERROR
    assert shell(f"{PROGRAM} families | head -0; echo ${{PIPESTATUS[0]}}").out == "141\n"


def test_a_terminal_that_lacks_characters() -> None:
    program = "import regsurgery.__main__ as m, regsurgery.cli.app as a; a.main = lambda: print(chr(0x2588)); m.run()"
    done = shell(f'{sys.executable} -c "{program}"', PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done == (0, "\\u2588\n", "")


NOT_UTF8 = os.fsdecode(b"p\xff")
WRITERS = {
    "patch": ("patch", "demo", "--recipe", "demo", "-o"),
    "find": ("find", "demo", "--num-images", "2", "-o"),
    "report": ("report", "nowhere", "-o"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_name_for_the_output_that_is_not_utf8(run: Callable[..., Done], tmp_path: Path, command: str) -> None:
    done = run(*WRITERS[command], tmp_path / NOT_UTF8)
    assert done.code == EXIT_USER_ERROR and done.err.splitlines()[-1].startswith("error: ")
    assert "p\\udcff: not UTF-8" in done.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [NOT_UTF8, "a\nb", "a\x1bb"])
def test_names_in_a_source_that_checksums_cannot_hold(
    run: Callable[..., Done], demo_folder: Path, tmp_path: Path, name: str
) -> None:
    model = shutil.copytree(demo_folder, tmp_path / "model")
    (model / name).touch()
    done = run("patch", model, "--recipe", "demo", "-o", tmp_path / "out")
    assert done.code == EXIT_USER_ERROR and done.err.endswith("name\n") and name not in done.err


def test_what_is_printed_does_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    shown = console()
    shown.print(HOSTILE, soft_wrap=True)
    table = Table("head", title=HOSTILE)
    table.add_row(HOSTILE)
    shown.print(table)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 3 and all(c.isprintable() or c == "\n" for c in out)


def test_an_error_does_not_act_on_the_terminal(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("verify", tmp_path / HOSTILE.replace("/", ""))
    assert done.code == EXIT_USER_ERROR and SHOWN.replace("/", "") in done.err and "\x1b" not in done.err


def test_text_for_markdown() -> None:
    assert plain("a\nb\x1b") == "a\nb\\x1b"
    assert markdown("<img src=x>|[a](b)\n# _b_ `c`") == "&lt;img src=x>\\|\\[a\\](b) # \\_b\\_ \\`c\\`"
    assert markdown("# head") == "\\# head" and markdown("2 -> 4 of a_b & c (95 %)") == "2 -> 4 of a_b & c (95 %)"
    assert code("a`b|c\n\x1b") == "a'b¦c \\x1b"


def test_of_an_endless_name_a_message_has_the_beginning_and_the_end() -> None:
    path = "/" + "p" * 1000
    assert str(UserError(f"{path}: no {'ab' * 9000}z; give another")) == (
        f"{path}: no {'ab' * 100}[…]{('ab' * 9000 + 'z;')[-100:]} give another"
    )


def test_what_a_library_cannot_load_is_one_line_with_what_to_do() -> None:
    said = str(library_fails("timm", Path("folder"), ValueError("a\nb")))
    assert said.startswith("folder: timm cannot load it: a b; correct what this names, or get the files again")


def test_garbage_is_collected_as_usual_once_a_model_is_open() -> None:
    usual = gc.get_threshold()
    collect_seldom()
    collect_seldom()
    assert gc.get_threshold() == (SELDOM, *usual[1:])
    with objects_stay():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_threshold() == usual

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.cli
import typer.main
from typer.testing import CliRunner

from regsurgery.cli.app import app, main
from regsurgery.cli.screen import Screen
from regsurgery.errors import OutputError
from regsurgery.formats import FORMATS
from regsurgery.recipe import MODES, bundled_recipes, find_recipe, parse_recipe
from tests.commands import PROGRAM, Done

REFERENCE = Path(__file__).parents[2] / "docs" / "cli.md"
REGENERATE = "typer regsurgery.cli.app utils docs --name regsurgery --title 'The command line' --output docs/cli.md"
VALID = "schema: 1\nregister_neurons: {7: [417]}\n"
TYPO = VALID + "num_register: 1\n"


def program(*args: object, **env: str) -> Done:
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True, env={**os.environ, **env})
    return Done(done.returncode, done.stdout, done.stderr)


def commands(command=None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], typer.core.TyperCommand]]:
    """Every command and group, with the words that call it."""
    command = command or typer.main.get_command(app)
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


COMMANDS = {" ".join(path): command for path, command in commands()}
LEAVES = {name: one for name, one in COMMANDS.items() if name and not getattr(one, "no_args_is_help", False)}


# --- every command --------------------------------------------------------------------------------------------------


def test_the_commands_are_found():
    assert {"patch", "recipes", "recipes validate", "families"} <= set(COMMANDS)


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_json_and_quiet(name):
    options = {option for parameter in LEAVES[name].params for option in parameter.opts}
    assert {"--json", "--quiet", "-q"} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_parses(name, run):
    epilog = COMMANDS[name].epilog
    assert epilog is not None and epilog.startswith(f"Example: regsurgery {name}".rstrip())
    assert epilog in run(*name.split(), "--help").out
    words = iter(shlex.split(epilog.partition(" > ")[0])[2:])
    command, context = COMMANDS[""], None
    for word in words:
        command = command.commands[word]
        if not hasattr(command, "commands"):
            context = command.make_context(word, list(words))
    assert context is not None


def test_no_help_imports_a_model_library():
    """What makes `--help` quick; benchmarks/startup.py has the figures."""
    calls = [[*name.split(), "--help"] for name in COMMANDS]
    code = f"""
import contextlib, io, sys
from regsurgery.cli import app as cli
for args in {calls}:
    sys.argv = ["regsurgery", *args]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        cli.main()
    assert out.getvalue().startswith("Usage: " + " ".join(["regsurgery", *args[:-1]])), out.getvalue()
heavy = {{"torch", "numpy", "transformers", "timm", "open_clip", "huggingface_hub", "rich", "yaml"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_reference_is_what_typer_generates(tmp_path, monkeypatch):
    monkeypatch.setattr(typer.cli, "state", typer.cli.State())
    arguments = ["regsurgery.cli.app", *shlex.split(REGENERATE)[2:-1], str(tmp_path / "cli.md")]
    assert CliRunner().invoke(typer.cli.app, arguments).exit_code == 0
    same = (tmp_path / "cli.md").read_text("utf-8") == REFERENCE.read_text("utf-8")
    assert same, f"docs/cli.md is not what the commands say; regenerate it: {REGENERATE}"


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, said, what_next",
    [
        (["ptch"], "regsurgery: no such command 'ptch'. Did you mean 'patch'", "see regsurgery --help"),
        (["patch"], "regsurgery patch: missing argument", "see regsurgery patch --help"),
        (["patch", "demo"], "regsurgery patch: missing option '--output' / '-o';", "see regsurgery patch --help"),
        (["patch", "demo", "--imges", "x"], "no such option: --imges (", "see regsurgery patch --help"),
        (["patch", "demo", "-o"], "option '-o' requires an argument;", "see --help of the command"),
        (["patch", "demo", "x", "-o", "y"], "unexpected extra argument", "see regsurgery patch --help"),
        (["doctor", "demo", "--num-images", "0"], "invalid value for '--num-images':", "see regsurgery doctor --help"),
        (["doctor", "demo", "--num-images", "x"], "invalid value for '--num-images':", "see regsurgery doctor --help"),
        (["recipes", "lst"], "no such command 'lst'. Did you mean 'list'?", "see regsurgery recipes --help"),
        (["recipes", "-q", "list"], "--quiet: write it after list: regsurgery recipes list --quiet", "--help"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_says_what_next(run, args, said, what_next):
    done = run(*args)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: regsurgery")
    assert done.err.endswith(f"{what_next}\n") and done.err.count("\n") == 1
    assert said in done.err


def test_no_command_at_all_shows_the_help_as_an_error(run):
    done = run()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: regsurgery ") and "patch" in done.err


@pytest.mark.parametrize(
    "option, said",
    [
        (("--mode", "shft"), "mode shft: not one of shift, native, bias; did you mean 'shift'?"),
        (("--format", "onx"), f"format onx: not one of {', '.join(FORMATS)}; did you mean 'onnx'?"),
        (("--num-registers", "65"), "--num-registers 65: must be from 1 to 64"),
        (("--recipe", "dmo"), "dmo: no such recipe file"),
    ],
)
def test_a_wrong_value_is_refused_before_the_model_is_read(run, tmp_path, monkeypatch, option, said):
    monkeypatch.setattr("regsurgery.models.load", lambda *args, **how: pytest.fail("the model was read"))
    done = run("patch", "demo", "-o", tmp_path / "out", *option)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {said}") and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "model, said",
    [
        ("timm:vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'?"),
        ("timm:vit_tiny_patch16_224.augreg_in22k", "did you mean 'vit_tiny_patch16_224.augreg_in21k'?"),
        ("timm:", "timm.list_pretrained() in Python lists them"),
        ("nobody/no-such-model", "HF_HUB_OFFLINE is set: unset it, check the spelling, or give a folder"),
        ("", "MODEL is empty; give a folder, a Hub id, timm:NAME, open_clip:ARCH/TAG or demo"),
        (__file__, ".bin, .pt, .pth, .ckpt, or the folder that holds the checkpoint"),
    ],
)
def test_a_model_that_is_none_is_told_what_to_give(run, model, said):
    done = run("doctor", model, "-q")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {model}") or not model
    assert done.err.endswith(f"{said}\n") and done.err.count("\n") == 1


def ends_with(error: BaseException):
    def command(*args: object, **how: object) -> None:
        raise error

    return command


def test_an_interrupt_is_one_line_and_130(run, monkeypatch):
    monkeypatch.setattr("regsurgery.commands.doctor.doctor", ends_with(KeyboardInterrupt()))
    done = run("doctor", "demo")
    assert (done.code, done.out) == (130, "")
    assert done.err.startswith("error: interrupted; ") and done.err.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("regsurgery.commands.doctor.doctor", ends_with(ZeroDivisionError()))
    monkeypatch.setattr(sys, "argv", ["regsurgery", "doctor", "demo"])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.fixture
def ctrl_c():
    """Interrupts are heard, which a shell switches off for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_a_folder_is_verified_leaves_nothing(run, tmp_path, monkeypatch):
    def press(*args: object, **how: object) -> None:
        assert list(tmp_path.iterdir()) != []  # it is written there before it gets its name
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("regsurgery.verification.folder.verify_folder", press)
    done = run("patch", "demo", "-q", "-o", tmp_path / "out", "--num-images", "4")
    assert (done.code, done.out) == (130, "")
    assert done.err.startswith("error: interrupted; ") and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


ENDING = pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])


@pytest.fixture
def handlers():
    """The signals that end the command line have their defaults (`nohup pytest`), and afterwards what they had."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    yield dict.fromkeys(numbers, signal.SIG_DFL)
    for number, handler in before.items():
        signal.signal(number, handler)


@ENDING
@pytest.mark.usefixtures("handlers")
def test_a_signal_that_ends_a_run_leaves_nothing(name, code, run, tmp_path, monkeypatch):
    def end(*args: object, **how: object) -> None:
        assert list(tmp_path.iterdir()) != []
        try:
            signal.raise_signal(getattr(signal, name))
        finally:
            signal.raise_signal(getattr(signal, name))  # the second of `timeout` comes while things are removed

    monkeypatch.setattr("regsurgery.verification.folder.verify_folder", end)
    done = run("patch", "demo", "-q", "-o", tmp_path / "out", "--num-images", "4")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: ended by {name}; nothing is left half written") and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_ends_by_itself_leaves_the_handlers_as_they_were(run, handlers):
    assert run("families", "-q").code == 0
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_a_signal_that_was_ignored_stays_ignored(run, handlers, monkeypatch):
    """`nohup`."""
    heard = []
    monkeypatch.setattr("regsurgery.commands.doctor.doctor", lambda *args, **how: heard.append(signal.raise_signal(1)))
    monkeypatch.setattr("regsurgery.cli.screen.Screen.diagnosed", ends_with(OutputError("done")))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    done = run("doctor", "demo")
    assert heard == [None] and done.err == "error: done\n"


def test_no_room_for_output_and_temporary_files(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([PROGRAM, "families"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*No space left on device; free some space.*\n", done.stderr)


@pytest.mark.parametrize("number, end", [(2, "No usable temporary directory found in ['/tmp']"), (28, "No space left")])
def test_a_library_without_room_for_its_files(run, monkeypatch, number, end):
    monkeypatch.setattr("regsurgery.commands.doctor.doctor", ends_with(OSError(number, end)))
    monkeypatch.setattr("regsurgery.cli.ending.forget", lambda stream: None)  # pytest has its own streams
    done = run("doctor", "demo")
    assert (done.code, done.out) == (2, "")
    assert end in done.err and "set TMPDIR" in done.err and done.err.count("\n") == 1


def test_another_error_of_the_system_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(
        "regsurgery.commands.doctor.doctor", ends_with(FileNotFoundError(2, "No such file or directory", "x"))
    )
    monkeypatch.setattr(sys, "argv", ["regsurgery", "doctor", "demo"])
    with pytest.raises(FileNotFoundError):
        main()


def test_no_folder_for_temporary_files(run, tmp_path, monkeypatch):
    def none(*args: object, **how: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    done = run("patch", "demo", "-q", "-o", tmp_path / "out", "--num-images", "4")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch("error: temporary files .*No usable temporary directory.*set TMPDIR.*\n", done.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [("families", "--json"), ("families",), ("families", "--help"), ("recipes", "x")])
def test_output_that_nobody_reads_any_more_is_no_error(args):
    read, write = os.pipe()
    os.close(read)
    failing = args == ("recipes", "x")  # that writes to stderr
    to = {"stdout": subprocess.PIPE, "stderr": write} if failing else {"stdout": write, "stderr": subprocess.PIPE}
    done = subprocess.run([PROGRAM, *args], **to)
    os.close(write)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (2 if failing else 141, b"", b"")


# --- recipes --------------------------------------------------------------------------------------------------------


def test_recipes_alone_is_recipes_list(run):
    alone = run("recipes")
    assert alone == run("recipes", "list")
    assert alone.code == 0
    for name in bundled_recipes():
        assert f" {name} " in alone.out
    listed = run("recipes", "--json")
    assert listed == run("recipes", "list", "--json")
    assert set(json.loads(listed.out)) == set(bundled_recipes())


@pytest.mark.parametrize("command", ["recipes", "families"])
def test_a_narrow_table_cuts_no_name_off(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "60")
    assert "…" not in run(command).out


def test_a_recipe_is_shown_as_it_is_read(run, tmp_path):
    shown = run("recipes", "show", "vit-tiny")
    assert (shown.code, shown.err) == (0, "")
    assert parse_recipe(shown.out, "shown") == find_recipe("vit-tiny")
    (tmp_path / "mine.yaml").write_text(VALID, "utf-8")
    mine = json.loads(run("recipes", "show", tmp_path / "mine.yaml", "--json").out)
    assert (mine["register_neurons"], mine["fill"]) == ({"7": [417]}, "zero")
    unknown = run("recipes", "show", "vit-tny")
    assert (unknown.code, unknown.out) == (2, "")
    assert "did you mean 'vit-tiny'?" in unknown.err


def test_validate_names_file_key_and_remedy(run, tmp_path):
    good, typo, absent = (tmp_path / name for name in ("good.yaml", "typo.yaml", "absent.yaml"))
    good.write_text(VALID, "utf-8")
    typo.write_text(TYPO, "utf-8")
    assert run("recipes", "validate", good) == Done(0, f"{good}: valid; 1 register neuron in block 7, mode shift\n", "")
    done = run("recipes", "validate", typo, good, absent)
    assert done.code == 2
    assert done.out.startswith(f"{good}: valid") and done.out.count("\n") == 1
    problem = f"{typo}: unknown key 'num_register'; did you mean 'num_registers'?"
    assert done.err.splitlines()[0] == f"error: {problem}"
    assert done.err.splitlines()[1].startswith(f"error: {absent}: cannot be read (No such file or directory)")
    as_json = run("recipes", "validate", typo, good, "--json")
    assert as_json.code == 2
    assert json.loads(as_json.out) == {
        "valid": False,
        "recipes": [
            {"file": str(typo), "valid": False, "error": problem},
            {"file": str(good), "valid": True, "error": None},
        ],
    }


@pytest.mark.parametrize("args", ["recipes", "recipes list", "recipes show demo", "families", "families --markdown"])
def test_quiet_is_silent_and_json_one_object(run, args):
    assert run(*args.split(), "--quiet") == Done(0, "", "")
    for more in (("--json",), ("--json", "--quiet")):
        done = run(*args.split(), *more)
        assert (done.code, done.err) == (0, "")
        assert isinstance(json.loads(done.out), dict)


# --- progress -------------------------------------------------------------------------------------------------------


def work(**how: bool) -> None:
    with Screen(**{"as_json": False, "quiet": False, **how}) as screen:
        screen.stage("load")
        screen.stage("norms", 30)
        screen.advance(10)
        screen.say("a [fact]")


def test_progress_is_plain_lines_where_nothing_can_be_drawn(capsys, monkeypatch):
    work()
    assert capsys.readouterr() == ("", "load\nnorms: 0 of 30\na [fact]\n")
    monkeypatch.setattr("regsurgery.cli.screen.PLAIN_EVERY", 0.0)
    work()
    assert capsys.readouterr() == ("", "load\nnorms: 0 of 30\nnorms: 10 of 30 after 0 s, about 0 s left\na [fact]\n")


@pytest.mark.parametrize("how", ["as_json", "quiet"])
@pytest.mark.parametrize("terminal", ["0", "1"])
def test_no_progress_with_json_and_quiet(capsys, monkeypatch, how, terminal):
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    work(**{how: True})
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_and_colours_unless_no_color(capsys, monkeypatch):
    colour = re.compile(r"\x1b\[(?:\d+;)*[39][0-7]m")
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    work()
    err = capsys.readouterr().err
    assert colour.search(err) and "━" in err and "10/30" in err and "/?" not in err
    monkeypatch.setenv("NO_COLOR", "1")
    work()
    err = capsys.readouterr().err
    assert not colour.search(err) and "━" in err and "10/30" in err


# --- completion -----------------------------------------------------------------------------------------------------


def completed(monkeypatch, capsys, *words: str) -> list[str]:
    """What bash is offered for the last word, without a bash."""
    monkeypatch.setenv("_REGSURGERY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["regsurgery", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    "words, offered",
    [
        (("pa",), ["patch"]),
        (("patch", "demo", "--mode", ""), list(MODES)),
        (("patch", "demo", "--format", "o"), [name for name in FORMATS if name.startswith("o")]),
        (("patch", "demo", "--recipe", ""), list(bundled_recipes())),
        (("patch", "demo", "--recipe", "vi"), ["vit-tiny"]),
        (("recipes", "show", "dinov2"), ["dinov2-large", "dinov2-large-torchhub"]),
        (("recipes", ""), ["list", "show", "validate"]),
        (("doctor", "dem"), ["demo"]),
        (("doctor", "facebook/"), ["facebook/dinov2-large"]),
        (("doctor", "open"), ["open_clip:"]),
        (("doctor", "--num-i"), ["--num-images"]),
        (("doctor", "./"), []),
        (("patch", "demo", "-o", ""), []),
    ],
)
def test_the_shell_is_offered(monkeypatch, capsys, words, offered):
    assert completed(monkeypatch, capsys, *words) == offered


def test_models_of_timm_are_offered_by_what_their_names_begin_with(monkeypatch, capsys):
    offered = completed(monkeypatch, capsys, "doctor", "ti")
    assert {"timm:", "timm:vit_", "timm:deit3_"} <= set(offered)
    assert not any("*" in name for name in offered)


def test_completion_installs_itself_into_bash_and_is_quick(tmp_path):
    script = f"""
{PROGRAM} --install-completion; source ~/.bash_completions/regsurgery.sh
export PYTHONPROFILEIMPORTTIME=1
COMP_WORDS=(regsurgery patch demo --recipe v); COMP_CWORD=4; _regsurgery_completion {PROGRAM}
echo "${{COMPREPLY[*]}}"
"""
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "vit-tiny"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "regsurgery.cli.completion" in imported
    assert not {"torch", "transformers", "timm", "rich"} & imported

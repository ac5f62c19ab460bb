"""`push` to the tests' own Hub: ended at any request, or on a folder that is written again meanwhile."""

from __future__ import annotations

import copy
import os
import queue
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from regsurgery.checkpoints.sums import write_sums
from regsurgery.emit.published import published
from regsurgery.hub.space import space_of
from regsurgery.options import PushOptions
from regsurgery.settings import replaced
from tests.drills import Row, drill, tries
from tests.drills.patched import another, patched_demo, with_report
from tests.drills.running import ENDING, Forked, at_the_hub, ended
from tests.hub.commands import environment
from tests.hub.server import Hub, Repo

MODEL, SPACE = "me/model", "spaces/me/model-report"
WRITING = ("/upload/", "/commit/")  # in requests
CHANGED = ("the source changed while it was read", "changed while it was pushed", "differs from SHA256SUMS")
Files = Mapping[str, bytes]


class Disturbed(Hub):
    """A Hub that calls `act` when it hears its request number `at`, from 1, and answers after that."""

    def __init__(self) -> None:
        super().__init__()
        self.at, self.act = 0, lambda: None
        self.open = threading.Semaphore(0)

    def disturbed(self, at: int, act: Callable[[], object]) -> None:
        """From the next request on."""
        self.requests.clear()
        self.at, self.act = at, act

    def fault(self, method: str, path: str) -> str:
        kind = super().fault(method, path)
        if len(self.requests) == self.at:
            self.act()
        return kind

    def get_request(self) -> Any:
        self.open.release()
        return super().get_request()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.open.acquire()

    def settle(self) -> None:
        """Wait until it has answered everything that it was asked; its clients are gone."""
        until = time.monotonic() + 30
        while self.open._value:
            assert time.monotonic() < until, self.requests
            time.sleep(0.002)

    def held(self) -> dict[str, Files]:
        """Repository -> what it has, without what the Hub itself puts into a new one."""
        self.settle()
        begun = {repo for repo, it in self.repos.items() if len(it.commits) > 1}
        return {repo: self.files(repo) if repo in begun else {} for repo in (MODEL, SPACE)}

    def again(self, repos: Mapping[str, Repo]) -> None:
        """As it was when it had these repositories, and nothing in its storage."""
        self.reset()
        self.repos = dict(copy.deepcopy(repos))


def push(server: Hub, folder: Path, place: Path, *more: str) -> Forked:
    """Start `regsurgery push`, with `tmp` and `home` in `place` as its own."""
    (place / "tmp").mkdir(exist_ok=True)
    env = {**environment(server.url, place / "home"), "TMPDIR": str(place / "tmp")}
    return Forked(["push", str(folder), MODEL, "-q", *more], env, None, at_the_hub, True)


def pushed(server: Disturbed, folder: Path, place: Path, *more: str) -> list[str]:
    """Push undisturbed; what the Hub was asked."""
    server.disturbed(0, lambda: None)
    code, said = ended(push(server, folder, place, *more))
    assert code == 0, said
    server.settle()
    return list(server.requests)


def signalled(server: Disturbed, at: int, number: int, folder: Path, place: Path) -> tuple[int, str]:
    """`push --space`, which gets a signal at the Hub's request `at`: exit code and stderr."""
    begun = queue.SimpleQueue[int]()
    server.disturbed(at, lambda: os.kill(begun.get(), number))
    process = push(server, folder, place, "--space")
    begun.put(process.pid)
    return ended(process)


def sent(folder: Path, url: str) -> dict[str, Files]:
    """Repository -> what an undisturbed `push --space` of a folder puts there, on the Hub at `url`."""
    with replaced(constants, "ENDPOINT", url):  # which the Space's page names
        space = space_of(folder, MODEL, PushOptions(space=True)).files
    both = {MODEL: published(folder, MODEL).files, SPACE: space}
    return {repo: {name: _bytes(file) for name, file in files.items()} for repo, files in both.items()}


def differing(found: Mapping[str, Files], expected: Mapping[str, Files]) -> list[str]:
    """Repository and name of what is not there, too much, or another."""
    return [
        f"{repo}: {name}"
        for repo, files in expected.items()
        for name in files.keys() | found[repo].keys()
        if found[repo].get(name) != files.get(name)
    ]


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def moments(heard: list[str], few: int) -> list[int]:
    """The numbers of requests to disturb: all; in the tests the last `few` that write."""
    writing = [number for number, request in enumerate(heard, 1) if any(word in request for word in WRITING)]
    return writing[-few:] if tries(1, 0) else [*range(1, len(heard) + 1)]


def words(seen: Counter[str]) -> str:
    return ", ".join(f"{what} {count} times" for what, count in seen.items())


@drill
def pushes_killed_at_every_request(place: Path) -> Row:
    """`kill -9` of `push --space` at any request leaves each repository as it was, or whole; the next finishes it."""
    old = with_report(patched_demo(place / "model"))
    (place / "other").mkdir()
    new = with_report(another(old, place / "other" / "model"))
    seen = Counter[str]()
    with Disturbed() as server:
        after = sent(new, server.url)
        for is_update in (False, True)[tries(1, 0) :]:
            server.again({})
            if is_update:
                pushed(server, old, place, "--space")
            was, repos = server.held(), copy.deepcopy(server.repos)
            for at in moments(pushed(server, new, place, "--space"), 2):
                server.again(repos)
                assert signalled(server, at, signal.SIGKILL, new, place)[0] == -signal.SIGKILL
                now = server.held()
                assert all(now[repo] in (was[repo], after[repo]) for repo in now), at
                seen["all of it" if now == after else "nothing new" if now == was else "the model alone"] += 1
                asked = pushed(server, new, place, "--space")
                assert differing(server.held(), after) == [], (at, asked)
    assert was not in ({}, after) and not list((place / "tmp").iterdir())
    return Row(seen.total(), f"the Hub had {words(seen)}; the same command finished it")


@drill
def pushes_ended_by_signals(place: Path) -> Row:
    """SIGTERM, SIGHUP and SIGINT end a push with their exit code and one line; nothing is left in TMPDIR."""
    folder, codes = with_report(patched_demo(place / "model")), Counter[str]()
    with Disturbed() as server:
        heard, repos = pushed(server, folder, place, "--space"), copy.deepcopy(server.repos)
        for at in moments(heard, 1):
            number, code = list(ENDING.items())[codes.total() % len(ENDING)]
            server.again(repos if at % 2 else {})
            found, said = signalled(server, at, number, folder, place)
            if found or at < len(heard):  # the last answer may be heard, and the push end, before the signal is
                assert found == code and said.startswith("error: ") and said.count("\n") == 1, (found, said)
            assert not list((place / "tmp").iterdir()), at
            codes[str(found)] += 1
    return Row(codes.total(), f"exit codes {words(codes)}; one line; nothing left")


@drill
def pushed_while_it_is_written_again(place: Path) -> Row:
    """Of a folder that is replaced, or written again, while it is pushed, the Hub gets the old or the new one, or none,
    which one line says.
    """
    first = patched_demo(place / "first")
    other = another(first, place / "second")
    versions = {"old": sent_model(first), "new": sent_model(other)}
    folder, seen = place / "model", Counter[str]()
    with Disturbed() as server:
        shutil.copytree(first, folder)
        for number, at in enumerate(moments(pushed(server, folder, place), 3)):
            server.again({})
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(first, folder)
            way = WAYS[number % len(WAYS)]
            server.disturbed(at, lambda way=way: way(folder, other))
            code, said = ended(push(server, folder, place))
            now = server.held()[MODEL]
            if code == 0:
                (which,) = [name for name, files in versions.items() if now == files]
                seen[f"pushed the {which} one"] += 1
            else:
                assert code == 2 and now == {} and any(word in said for word in CHANGED), (code, said)
                assert said.startswith(f"error: {folder}") and said.count("\n") == 1, said
                seen["refused"] += 1
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(other, folder)
            pushed(server, folder, place)
            assert server.held()[MODEL] == versions["new"]
    return Row(seen.total(), f"{words(seen)}; never a mixed one")


@drill
def two_pushes_to_one_repository(place: Path) -> Row:
    """Of two pushes to one repository the second to commit is told that it has changed; it has one folder, whole."""
    first = patched_demo(place / "first")
    other, told = another(first, place / "second"), 0
    with Disturbed() as server:
        for is_update in (False, True)[: tries(1, 2)]:
            server.again({})
            if is_update:
                pushed(server, first, place)
            repos, ends = copy.deepcopy(server.repos), list[int]()
            commit = next(i for i, asked in enumerate(pushed(server, other, place), 1) if "/commit/" in asked)
            server.again(repos)
            another_one = with_another_word(first, place / f"third-{is_update}")
            server.disturbed(commit, lambda ends=ends: ends.append(ended(push(server, other, place))[0]))
            code, said = ended(push(server, another_one, place))
            assert ends == [0] and code == 2 and "the repository has changed in the meantime" in said, (
                ends,
                code,
                said,
            )
            assert server.held()[MODEL] == sent_model(other)
            told += 1
    return Row(told, "the second was told that the repository has changed meanwhile")


def with_another_word(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    with (target / "README.md").open("a") as file:
        file.write("More.")
    write_sums(target)
    return target


def sent_model(folder: Path) -> Files:
    return {name: _bytes(file) for name, file in published(folder, MODEL).files.items()}


def replaced_by(folder: Path, other: Path) -> None:
    """As a new `patch` of the same output would, after `rm -r`."""
    ready = shutil.copytree(other, folder.with_name(".model.partial"))
    shutil.rmtree(folder)
    ready.rename(folder)


def written_over(folder: Path, other: Path) -> None:
    """As a training program saves its checkpoint: each file in place."""
    for path in sorted(other.iterdir()):
        shutil.copyfile(path, folder / path.name)


def half_written(folder: Path, other: Path) -> None:
    """As the same is seen in the middle of it."""
    for path in sorted(other.iterdir())[::2]:
        shutil.copyfile(path, folder / path.name)


def removed(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


WAYS = (replaced_by, written_over, half_written, removed)

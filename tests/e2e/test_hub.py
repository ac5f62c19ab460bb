"""Pushed to a Hub over HTTP, loaded from there, and what is left when something breaks on the way."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import regsurgery
from regsurgery.checkpoints.sums import check_sums, sha256, write_sums
from regsurgery.commands.patch import PatchResult
from regsurgery.emit.run_record import RUN_RECORD_NAME, read_run_record
from regsurgery.errors import HubError
from regsurgery.reporting.live import LIVE_FILES
from tests.conftest import Job
from tests.hub import commands
from tests.hub.commands import Done, environment
from tests.hub.server import LARGE, Fault, File, Hub, Repo

REPO = "me/model"
FRESH = Path(commands.__file__).with_name("fresh_load.py")
PUT, COMMIT, PART = "^/upload/", "/commit/", 1 << 18
MANY = 99


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub) -> Hub:
    server.reset()
    return server


@pytest.fixture(scope="module")
def call(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    with commands.process(server.url, tmp_path_factory.mktemp("home")) as call:
        yield call


@pytest.fixture(scope="module")
def run(call: Callable[..., Any]) -> Callable[..., Done]:
    return lambda *argv, token=commands.TOKEN: call(partial(commands.run, token=token), *argv)


@pytest.fixture(scope="module")
def demo(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, patched from a folder with an absolute path."""
    folder = tmp_path_factory.mktemp("demo-patched") / "demo"
    regsurgery.patch(str(demo_folder), folder, recipe="demo", num_images=8)
    return folder


@pytest.fixture(scope="module")
def whole(demo: Path) -> dict[str, bytes]:
    """What an undisturbed push of `demo` puts into a repository."""
    from regsurgery.emit.published import published

    files = published(demo, REPO).files
    return {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in files.items()}


def error_line(done: Done) -> str:
    """The error, which is one line, the last; before it stages and what the demo's path is published as."""
    *notes, line = done.err.splitlines()
    said = "checksums|local path .*|the photos in .*"
    told = re.compile(f"{said}|(upload|download|commit|verify|images|load|trace|match)(:.*)?")
    assert line.startswith("error: ") and all(told.fullmatch(note) for note in notes), done.err
    return line


def sums_hold(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    check_sums(folder)


def rewritten(demo: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    """A copy of `demo` with a change that its SHA256SUMS knows of."""
    shutil.copytree(demo, folder)
    change(folder)
    write_sums(folder)
    return folder


# --- what goes there ------------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_folder(
    hub: Hub, run: Callable[..., Done], demo: Path, demo_folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    done = run("push", demo, REPO, "--json", "--message", "a word")
    assert done.code == 0 and not done.err, done.err
    told = json.loads(done.out)
    assert hub.files(REPO) == whole
    assert told["files"] == {name: len(content) for name, content in whole.items()}
    assert told["commit"] == hub.repos[REPO].branches["main"] and told["url"].endswith(REPO)
    assert hub.repos[REPO].messages == ["a word"]
    sums_hold(whole, tmp_path / "download")
    kept = {name for name in whole if (demo / name).read_bytes() == whole[name]}
    assert kept >= {"model.safetensors", "modeling_regsurgery.py", "preprocessor_config.json"}
    texts = [name for name in whole if not name.endswith((".safetensors", ".py", ".png"))]
    assert [name for name in texts if str(demo_folder.parent) in whole[name].decode()] == []
    assert str(demo_folder) in (demo / "config.json").read_text() and told["paths"] == {str(demo_folder): "./demo"}
    card = whole["README.md"].decode()
    assert f'from_pretrained("{REPO}"' in card and f'regsurgery.load("{REPO}")' in card
    assert f"regsurgery reproduce {REPO}\n" in card and "stands for the path" not in card and '-patched"' not in card
    again = run("push", demo, REPO, "--quiet")
    assert again == (0, "", "")
    assert len(hub.repos[REPO].commits) == 2, "the same content makes no new commit"


@pytest.mark.slow
def test_a_repository_is_reproduced(hub: Hub, run: Callable[..., Done], demo: Path, demo_folder: Path) -> None:
    """A pushed card names its repository, and no folder of the machine that it came from."""
    assert run("push", demo, REPO).code == 0
    lost = run("reproduce", REPO)
    assert lost.code == 2 and "give its new place with --source" in lost.err
    done = run("reproduce", REPO, "--source", demo_folder, "--json")
    told = json.loads(done.out)
    assert done.code == 0 and told["identical"] and told["differences"] == {} and told["num_files"] >= 8


def test_a_dry_run_lists_files_and_asks_no_hub(hub: Hub, run: Callable[..., Done], demo: Path, whole: Any) -> None:
    told = json.loads(run("push", demo, REPO, "--dry-run", "--json", token=None).out)
    assert told["files"] == {name: len(content) for name, content in whole.items()}
    assert told["commit"] is None and told["url"] is None
    shown = run("push", demo, REPO, "--dry-run").out
    assert "model.safetensors" in shown and f"{len(whole['model.safetensors']):,}" in shown and "dry run" in shown
    assert hub.requests == [] and hub.repos == {}


def test_private_branches_and_pull_requests(hub: Hub, run: Callable[..., Done], demo: Path, whole: Any) -> None:
    assert run("push", demo, "club/model", "--private", "--revision", "v1", "-q") == (0, "", "")
    assert hub.repos["club/model"].private
    assert hub.files("club/model") == {} and hub.files("club/model", "v1").keys() == whole.keys()
    hub.repos[REPO] = Repo.new(False)
    opened = json.loads(run("push", demo, REPO, "--create-pr", "--json", token="hf_other").out)
    assert opened["pull_request"].endswith("/discussions/1")
    assert hub.files(REPO) == {} and hub.files(REPO, "refs/pr/1") == whole


def test_an_update_replaces_what_an_earlier_push_wrote(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    earlier = rewritten(demo, tmp_path / "earlier", lambda folder: (folder / "extra.txt").write_text("of then"))
    assert run("push", earlier, REPO).code == 0
    repo = hub.repos[REPO]
    repo.commits[repo.branches["main"]]["samples.png"] = File(b"the user's own", False)
    done = run("push", demo, REPO)
    assert done.code == 0 and "removed extra.txt" in done.out
    assert hub.files(REPO) == {**whole, "samples.png": b"the user's own"}


def test_what_others_wrote_is_replaced_by_force_alone(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes]
) -> None:
    hub.repos[REPO] = repo = Repo.new(False)
    repo.commits[repo.branches["main"]]["pytorch_model.bin"] = File(b"another model", True)
    done = run("push", demo, REPO)
    assert done.code == 2 and "regsurgery did not write its contents (1 files)" in done.err and "--force" in done.err
    assert hub.files(REPO) == {"pytorch_model.bin": b"another model"}
    assert run("push", demo, REPO, "--force").code == 0
    assert hub.files(REPO) == whole


def test_patch_pushes_what_it_wrote(hub: Hub, run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("patch", "demo", "-o", tmp_path / "out", "--num-images", "8", "--push", REPO, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["output"] == str(tmp_path / "out") and told["verify"]["passed"]
    assert told["pushed"]["commit"] == hub.repos[REPO].branches["main"]
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


# --- a Space beside the model ---------------------------------------------------------------------------------------

SPACE = "spaces/me/model-report"


@pytest.fixture(scope="module")
def with_report(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `demo` beside which a report and a live page lie; of them only what a push looks at."""
    folder = shutil.copytree(demo, tmp_path_factory.mktemp("reported") / "a demo")
    live = folder.with_name("a demo-report-live")
    live.mkdir()
    for name in LIVE_FILES:
        (live / name).write_bytes(f"of {name}".encode())
    (live / "index.html").write_text('<a href="../a%20demo-report.html">Back</a>')
    (live / "notes.txt").write_text("of the user")
    meta = f'<meta name="regsurgery-folder" content="{sha256(folder / "SHA256SUMS")}">'
    report = f'{meta}<a href="a%20demo-report-live/index.html">Try it</a>'
    folder.with_name("a demo-report.html").write_text(report)
    return folder


def test_report_and_live_page_become_a_space_beside_the_model(
    hub: Hub, run: Callable[..., Done], with_report: Path, whole: dict[str, bytes]
) -> None:
    done = run("push", with_report, REPO, "--space", "--json")
    assert done.code == 0, done.err
    told, files = json.loads(done.out), hub.files(SPACE)
    assert hub.files(REPO) == whole, "with or without a Space: the card does not change"
    assert files.keys() == {
        "README.md", "index.html", "regsurgery_space.json", "SHA256SUMS", *(f"live/{name}" for name in LIVE_FILES),
    }  # fmt: skip
    assert told["space"]["files"] == {name: len(content) for name, content in files.items()}
    assert told["space"]["commit"] == hub.repos[SPACE].branches["main"] and told["space"]["url"].endswith(SPACE)
    assert b'href="live/index.html"' in files["index.html"]
    assert files["live/index.html"] == b'<a href="../index.html">Back</a>'
    assert files["live/patched.onnx"] == b"of patched.onnx"
    readme = files["README.md"].decode()
    front = yaml.safe_load(readme.split("---\n")[1])
    assert front["sdk"] == "static" and front["models"] == [REPO] and f"({hub.url}/{REPO})" in readme
    for name, digest in (line.split("  ")[::-1] for line in files["SHA256SUMS"].decode().splitlines()):
        assert hashlib.sha256(files[name]).hexdigest() == digest
    again = run("push", with_report, REPO, "--space")
    assert again.code == 0 and f"pushed {len(files)} files to {hub.url}/{SPACE}" in again.out
    assert len(hub.repos[SPACE].commits) == 2, "the same content makes no new commit"
    assert "the photos in the report are published, too" in again.err


def test_a_space_is_named_planned_and_updated(
    hub: Hub, run: Callable[..., Done], with_report: Path, tmp_path: Path
) -> None:
    planned = run("push", with_report, REPO, "--space", "--space-name", "club/shown", "--dry-run")
    assert planned.code == 0 and "would go to club/shown" in planned.out and "live/original.onnx" in planned.out
    assert hub.requests == []
    assert run("push", with_report, REPO, "--space", "--private", "-q").code == 0
    assert hub.repos[SPACE].private and hub.repos[REPO].private
    only = tmp_path / "only.html"
    only.write_text(with_report.with_name("a demo-report.html").read_text().partition("<a")[0])
    done = run("push", with_report, REPO, "--space", "--report", only)
    assert done.code == 0 and "removed live/patched.onnx" in done.out
    assert hub.files(SPACE).keys() == {"README.md", "index.html", "regsurgery_space.json", "SHA256SUMS"}


def test_a_space_is_refused_before_anything_is_sent(
    hub: Hub, run: Callable[..., Done], demo: Path, with_report: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.html"
    other.write_text("of another folder")
    hub.repos["spaces/me/theirs"] = repo = Repo.new(False, space=True)
    repo.commits["second"] = {"app.js": File(b"their own", False)}
    repo.branches["main"] = "second"
    for folder, arguments, message in (
        (demo, [], "demo-report.html: cannot be read (No such file or directory); make it with `regsurgery report"),
        (with_report, ["--report", other], f"{other}: is not the report of {with_report} as it is now; make it"),
        (with_report, ["--create-pr"], "--space: goes to the Space's main branch"),
        (with_report, ["--space-name", "shown"], "it must be USER/NAME"),
        (with_report, ["--space-name", "me/theirs"], "regsurgery did not write its contents (1 files)"),
    ):
        done = run("push", folder, REPO, "--space", *arguments)
        assert done.code == 2 and message in done.err, done.err
    done = run("push", with_report, REPO, "--space-name", "me/shown")
    assert done.code == 2 and "--space-name me/shown: goes with --space" in done.err
    assert REPO not in hub.repos and hub.files("spaces/me/theirs") == {"app.js": b"their own"}


def test_a_space_that_broke_is_finished_by_the_same_command(
    hub: Hub, run: Callable[..., Done], with_report: Path, whole: dict[str, bytes]
) -> None:
    hub.faults = [Fault("POST", "spaces.*/commit/", "500")]
    done = run("push", with_report, REPO, "--space")
    assert done.code == 2 and f"`regsurgery push {with_report} {REPO} --space` finishes it" in error_line(done)
    assert hub.files(REPO) == whole and len(hub.repos[SPACE].commits) == 1
    assert run("push", with_report, REPO, "--space", "-q").code == 0
    assert len(hub.files(SPACE)) == 4 + len(LIVE_FILES)


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = [
    ([REPO], None, "no token; log in with `hf auth login`, or set HF_TOKEN"),
    ([REPO], "hf_gone", "the Hub does not accept the token"),
    ([REPO], "hf_reader", "the token of me may only read"),
    (["me/there"], "hf_other", "no permission to write there"),
    (["other/model"], "hf_me", "member of other"),
    (["library/model"], "hf_me", "me has only read access to library"),
    (["model"], "hf_me", "it must be USER/NAME"),
    (["me/a--b"], "hf_me", "not a valid repository name"),
    (["me/there", "--private"], "hf_me", "exists and is public"),
    ([REPO, "--create-pr"], "hf_me", "nothing to open a pull request on"),
    (["me/there", "--create-pr", "--revision", "v1"], "hf_me", "give either --create-pr or --revision"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "token", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_refused_by_name_token_or_permission(
    hub: Hub, run: Callable[..., Done], demo: Path, arguments: list[str], token: str | None, message: str
) -> None:
    hub.repos["me/there"] = Repo.new(False)
    done = run("push", demo, *arguments, token=token)
    assert done.code == 2 and message in done.err and error_line(done)
    assert hub.repos.keys() == {"me/there"} and hub.files("me/there") == {}


def test_patch_asks_the_hub_before_it_works(hub: Hub, run: Callable[..., Done], tmp_path: Path) -> None:
    for arguments, token, message in (
        (["--push", "a/b/c"], "hf_me", "not a valid repository name"),
        (["--push", REPO], "hf_reader", "may only read"),
        (["--push", REPO, "--no-verify"], "hf_me", "only verified folders are pushed"),
    ):
        done = run("patch", "no-such-model", "-o", tmp_path / "out", *arguments, token=token)
        assert done.code == 2 and message in done.err, "the Hub is asked before the model is looked for"
    assert not (tmp_path / "out").exists() and hub.repos == {}


def test_unverified_or_changed_folders_are_refused(
    hub: Hub, run: Callable[..., Done], demo: Path, tmp_path: Path
) -> None:
    def verdict(passed: bool | None, folder: Path) -> None:
        record = read_run_record(folder)
        record["verify"] = None if passed is None else {**record["verify"], "passed": passed}
        (folder / RUN_RECORD_NAME).write_text(json.dumps(record))

    def unlisted(folder: Path) -> None:
        sums = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "SHA256SUMS").write_text("".join(line for line in sums if RUN_RECORD_NAME not in line))

    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "not verified": (partial(verdict, None), "without verification"),
        "failed": (partial(verdict, False), "its verification failed"),
        "no record": (lambda folder: (folder / RUN_RECORD_NAME).unlink(), RUN_RECORD_NAME),
    }
    for name, (change, message) in cases.items():
        done = run("push", rewritten(demo, tmp_path / name, change), REPO)
        assert done.code == 2 and message in done.err, name
    stale = shutil.copytree(demo, tmp_path / "stale")
    weights = bytearray((stale / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (stale / "model.safetensors").write_bytes(weights)
    done = run("push", stale, REPO)
    assert done.code == 2 and "model.safetensors: differs from SHA256SUMS" in done.err
    unlisted(stale := shutil.copytree(demo, tmp_path / "unlisted"))
    done = run("push", stale, REPO)
    assert done.code == 2 and f"{RUN_RECORD_NAME}: not in SHA256SUMS" in done.err
    assert run("push", tmp_path / "nothing", REPO).code == 2
    assert hub.requests == []


def test_offline_is_said(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        regsurgery.push(demo, REPO)


# --- what breaks ----------------------------------------------------------------------------------------------------

HEALED = {  # the client tries again by itself
    "429 at preupload": ([Fault("POST", "/preupload/", "429")], None),
    "500 at the batch": ([Fault("POST", "/batch", "500")], None),
    "cut in the middle of a large file": ([Fault("PUT", PUT, "cut")], None),
    "cut in the middle of a part": ([Fault("PUT", PUT, "cut", 2, 2)], PART),
    "500 at a part": ([Fault("PUT", PUT, "500", 3, 3)], PART),
    "500 at completion": ([Fault("POST", "/complete/", "500")], PART),
    "a slow server": ([Fault("PUT", PUT, "slow"), Fault("POST", COMMIT, "slow"), Fault("GET", "whoami", "slow")], None),
}  # fmt: skip
BROKEN = {
    "whoami 500": ([Fault("GET", "whoami", "500")], None, "the Hub failed"),
    "whoami 429": ([Fault("GET", "whoami", "429")], None, "too many requests"),
    "whoami cut": ([Fault("GET", "whoami", "cut")], None, "the connection to the Hub broke"),
    "create 500": ([Fault("POST", "/repos/create", "500")], None, "the Hub failed"),
    "create 429": ([Fault("POST", "/repos/create", "429")], None, "too many requests"),
    "created, answer lost": ([Fault("POST", "/repos/create", "lost answer")], None, "the connection to the Hub broke"),
    "card check 500": ([Fault("POST", "/validate-yaml", "500")], None, "the Hub failed"),
    "storage 500 for good": ([Fault("PUT", PUT, "500", 1, MANY)], None, "the Hub failed"),
    "cut, then refused": ([Fault("PUT", PUT, "cut"), Fault("PUT", PUT, "403", 2, MANY)], None, "no permission"),
    "a part cut, then refused": ([Fault("PUT", PUT, "cut", 2, 2), Fault("PUT", PUT, "400", 3, 3)], PART, "refuses"),
    "bytes changed on the way": ([Fault("PUT", PUT, "corrupt")], None, "sha256"),
    "a part changed on the way": ([Fault("PUT", PUT, "corrupt", 2, 2)], PART, "sha256"),
    "no ETag of a part": ([Fault("PUT", PUT, "no etag", 2, 2)], PART, "etag"),
    "wrong ETag of a part": ([Fault("PUT", PUT, "wrong etag", 2, 2)], PART, "ETag"),
    "commit 500": ([Fault("POST", COMMIT, "500")], None, "the Hub failed"),
    "commit 429": ([Fault("POST", COMMIT, "429")], None, "too many requests"),
    "commit cut": ([Fault("POST", COMMIT, "cut")], None, "the connection to the Hub broke"),
    "committed, answer lost": ([Fault("POST", COMMIT, "lost answer")], None, "the connection to the Hub broke"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HEALED)
def test_a_passing_fault_is_overcome(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], fault: str
) -> None:
    hub.faults, part_bytes = HEALED[fault]
    hub.part_bytes = part_bytes or hub.part_bytes
    done = run("push", demo, REPO, "-q")
    assert done == (0, "", "")
    assert hub.files(REPO) == whole and hub.seen.keys() == set(hub.faults)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_push_leaves_nothing_that_loads_and_the_next_finishes(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], fault: str
) -> None:
    hub.faults, part_bytes, message = BROKEN[fault]
    hub.part_bytes = part_bytes or hub.part_bytes
    done = run("push", demo, REPO)
    assert done.code == 2 and error_line(done).startswith(f"error: {REPO}: ")
    assert message in done.err
    assert message == "no permission" or "run it again" in done.err or "finishes it" in done.err
    left = hub.files(REPO)
    assert left == (whole if fault == "committed, answer lost" else {})
    sent = len([request for request in hub.requests if request.startswith("PUT")])
    hub.faults = []
    assert run("push", demo, REPO, "-q").code == 0
    assert hub.files(REPO) == whole
    if fault.startswith("commit"):
        assert len([request for request in hub.requests if request.startswith("PUT")]) == sent, "sent twice"


@pytest.mark.slow
def test_a_killed_push_leaves_nothing_and_the_next_finishes(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hub.faults, hub.part_bytes = [Fault("PUT", PUT, "slow", 2, MANY)], PART
    command = [sys.executable, "-m", "regsurgery", "push", str(demo), REPO]
    process = subprocess.Popen(command, env={**os.environ, **environment(hub.url, tmp_path / "home")})
    while not hub.seen:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert hub.files(REPO) == {} and REPO in hub.repos
    hub.faults = []
    assert run("push", demo, REPO, "-q").code == 0
    assert hub.files(REPO) == whole


def test_a_broken_update_leaves_what_was_there(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert run("push", demo, REPO).code == 0
    newer = rewritten(demo, tmp_path / "newer", lambda folder: (folder / "extra.txt").write_text("new"))
    hub.faults = [Fault("POST", COMMIT, "500")]
    assert run("push", newer, REPO).code == 2
    assert hub.files(REPO) == whole
    assert run("push", newer, REPO).code == 0
    assert hub.files(REPO)["extra.txt"] == b"new" and len(hub.repos[REPO].commits) == 3


def test_a_change_meanwhile_is_not_overwritten(
    hub: Hub, run: Callable[..., Done], demo: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert run("push", demo, REPO).code == 0
    hub.faults = [Fault("POST", "/preupload/", "overtaken")]
    newer = rewritten(demo, tmp_path / "newer", lambda folder: (folder / "extra.txt").write_text("new"))
    done = run("push", newer, REPO)
    assert done.code == 2 and "the repository has changed in the meantime" in done.err
    assert hub.files(REPO) == {**whole, "theirs.txt": b"theirs"}


def test_a_new_repository_that_somebody_else_fills_meanwhile(hub: Hub, run: Callable[..., Done], demo: Path) -> None:
    hub.faults = [Fault("POST", "/preupload/", "overtaken")]
    done = run("push", demo, REPO)
    assert done.code == 2 and "the repository has changed in the meantime" in done.err
    assert hub.files(REPO) == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize("name", ["README.md", "model.safetensors"])
def test_a_folder_that_is_written_while_it_is_pushed_is_not_committed(
    hub: Hub, run: Callable[..., Done], demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = shutil.copytree(demo, tmp_path / "demo") / name
    answer = hub.fault

    def fault(method: str, asked: str) -> str:
        if "/batch" in asked:  # the sums were checked, and nothing is sent
            path.write_bytes(path.read_bytes()[:-1] + b"\0")
        return answer(method, asked)

    monkeypatch.setattr(hub, "fault", fault)
    done = run("push", path.parent, REPO)
    assert done.code == 2 and f"{path}: the source changed while it was read" in error_line(done)
    assert hub.files(REPO) == {}


# --- loaded from there ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def local_output(folder: Path, pixels: Tensor) -> Tensor:
    model: Any = regsurgery.load(folder)
    result = model.encode_image(pixels) if hasattr(model, "encode_image") else model(pixels)
    return getattr(result, "logits", result)


LOADING = {
    "undisturbed": [],
    "429 at the tree": [Fault("GET", "/tree/", "429")],
    "cut in the middle of a large file": [Fault("GET", "/cdn/", "cut answer")],
    "a wrong ETag": [Fault("HEAD", "model.safetensors", "wrong etag")],
    "a slow server": [Fault("GET", "/cdn/", "slow"), Fault("HEAD", "config.json", "slow")],
}


@pytest.mark.parametrize("fault", LOADING)
def test_load_by_repository_id(
    hub: Hub, run: Callable[..., Done], call: Callable[..., Any], demo: Path, pixels: Tensor, fault: str
) -> None:
    repo = f"me/load-{list(LOADING).index(fault)}"  # each with a cache of its own
    assert run("push", demo, repo).code == 0
    hub.faults = LOADING[fault]
    given = call(commands.load_and_run, repo, pixels)
    assert isinstance(given, Tensor), given
    assert torch.equal(given, local_output(demo, pixels))


def test_load_refuses_failures_changed_bytes_and_code_that_is_not_ours(
    hub: Hub, run: Callable[..., Done], call: Callable[..., Any], demo: Path, pixels: Tensor, tmp_path: Path
) -> None:
    assert run("push", demo, "me/failing").code == 0
    hub.faults = [Fault("GET", "/cdn/", "500")]
    assert "could not be reached (HTTP 500)" in call(commands.load_and_run, "me/failing", pixels)
    assert isinstance(call(commands.load_and_run, "me/failing", pixels), Tensor), "what is missing is fetched then"
    assert run("push", demo, "me/changed").code == 0
    hub.faults = [Fault("GET", "/cdn/", "corrupt")]
    assert "model.safetensors: differs from SHA256SUMS" in call(commands.load_and_run, "me/changed", pixels)

    def code(folder: Path) -> None:
        with (folder / "modeling_regsurgery.py").open("a") as file:
            file.write("import this\n")

    assert run("push", rewritten(demo, tmp_path / "code", code), "me/code").code == 0
    assert "would run unknown code" in call(commands.load_and_run, "me/code", pixels)
    trusted = call(partial(commands.load_and_run, trust_remote_code=True), "me/code", pixels)
    assert torch.equal(trusted, local_output(demo, pixels))
    assert "no such model on the Hub" in call(commands.load_and_run, "me/nowhere", pixels)


def test_verify_by_repository_id(hub: Hub, run: Callable[..., Done], demo: Path) -> None:
    assert run("push", demo, "me/verified").code == 0
    done = run("verify", "me/verified", "--json", "--num-images", "8")
    assert done.code == 0 and json.loads(done.out)["passed"]
    told, recorded = json.loads(done.out), read_run_record(demo)["verify"]
    assert told["outliers_per_image"] == pytest.approx(recorded["outliers_per_image"])


def in_a_fresh_process(hub: Hub, tmp_path: Path, repos: dict[str, str], pixels: Tensor) -> dict[str, list[Tensor]]:
    """The outputs of models on the Hub where `import regsurgery` fails; see `fresh_load.py`."""
    torch.save({"pixels": pixels, "repos": repos}, tmp_path / "manifest")
    settings = environment(hub.url, tmp_path / "home", token=None)
    command = [sys.executable, str(FRESH), str(tmp_path / "manifest")]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, **settings})
    return torch.load(tmp_path / "manifest.results")


@pytest.mark.slow
def test_the_demo_in_a_fresh_process(
    hub: Hub, run: Callable[..., Done], demo: Path, pixels: Tensor, tmp_path: Path
) -> None:
    assert run("push", demo, REPO).code == 0
    outputs = in_a_fresh_process(hub, tmp_path, {REPO: "auto"}, pixels)[REPO]
    expected = local_output(demo, pixels)
    assert len(outputs) == 2 and all(torch.equal(output, expected) for output in outputs)


HOWS = {
    ("timm", "shift"): "card alone",
    ("transformers", "shift"): "auto",
    ("open_clip", "shift"): "card alone",
    ("timm", "native"): "timm native",
    ("transformers", "native"): "auto",
    ("open_clip", "native"): "open_clip native",
}


@pytest.mark.real
def test_every_real_folder_in_a_fresh_process(
    hub: Hub,
    run: Callable[..., Done],
    patched_real: Callable[[str, str], tuple[Path, PatchResult]],
    tmp_path: Path,
) -> None:
    """The ViT-Ti of three libraries, in two modes: pushed, and loaded by its library's own line and by its card."""
    expected = {}
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for library, mode in HOWS:
        (folder, _), source = patched_real(library, mode), Job(library, mode).source
        done = run("push", folder, f"me/{library}-{mode}", "-q")
        assert done == (0, "", "")
        expected[f"me/{library}-{mode}"] = local_output(folder, pixels)
        for name, content in hub.files(f"me/{library}-{mode}").items():
            assert name.endswith(".safetensors") or str(source).encode() not in content, name
            assert name.endswith(".safetensors") or str(folder).encode() not in content, name
    repos = {f"me/{library}-{mode}": how for (library, mode), how in HOWS.items()}
    outputs = in_a_fresh_process(hub, tmp_path, repos, pixels)
    for repo, how in repos.items():
        assert len(outputs[repo]) == (1 if how == "card alone" else 2)
        assert all(torch.equal(output, expected[repo]) for output in outputs[repo]), repo


# --- recipes, revisions and subfolders from the Hub -----------------------------------------------------------------


def test_a_recipe_comes_from_a_patched_repository_without_its_weights(
    hub: Hub, run: Callable[..., Done], demo: Path, demo_folder: Path, tmp_path: Path
) -> None:
    assert run("push", demo, REPO, "-q").code == 0
    hub.requests.clear()
    done = run("patch", demo_folder, "--recipe", REPO, "-o", tmp_path / "out", "--num-images", 4)
    assert done.code == 0, done.err
    assert f"recipe: that of {REPO} on the Hub, revision " in done.err
    assert (tmp_path / "out" / "recipe.yaml").read_text() == (demo / "recipe.yaml").read_text()
    assert not [path for path in hub.requests if "safetensors" in path]
    assert run("recipes", "show", REPO).out == (demo / "recipe.yaml").read_text()
    assert "no such model on the Hub" in run("recipes", "show", "me/nothing").err
    held(hub, "me/plain", {"config.json": b"{}"})
    assert "me/plain: has no recipe.yaml, so it is no repository" in run("recipes", "show", "me/plain").err


def held(hub: Hub, name: str, files: dict[str, bytes]) -> Repo:
    """Put a repository with these files on the Hub."""
    hub.repos[name] = repo = Repo.new(private=False)
    stored = {path: File(content, path.endswith(LARGE)) for path, content in files.items()}
    hub.objects |= {file.oid: file.content for file in stored.values() if file.large}
    repo.commits[repo.branches["main"]] |= stored
    return repo


def content_of(folder: Path, below: str = "") -> dict[str, bytes]:
    return {below + path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def versions(hub: Hub, demo_folder: Path) -> Repo:
    """The demo under a branch v1 and a pull request, and in a folder; on the branch main there is nothing."""
    repo = held(hub, "me/versions", {})
    empty = repo.branches["main"]
    full = held(hub, "me/full", content_of(demo_folder) | content_of(demo_folder, "inner/"))
    repo.branches |= dict.fromkeys(("v1", "refs/pr/1"), full.branches["main"])
    repo.commits |= full.commits | {empty: repo.commits[empty]}
    return repo


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("me/versions@v1", {}),
        ("me/versions@v1", {"revision": "v1"}),
        ("me/versions", {"revision": "v1"}),
        ("hf-hub:me/versions@v1", {}),
        ("hf://me/versions", {"revision": "refs/pr/1"}),
        ("URL/me/versions/tree/v1", {}),
        ("URL/me/versions/tree/refs%2Fpr%2F1", {}),
        ("URL/me/versions/tree/v1/inner", {}),
        ("URL/me/versions/commit/COMMIT?a=b#c", {}),
        ("me/versions@COMMIT", {"subfolder": "inner"}),
    ],
)
def test_the_ways_to_name_a_place_on_the_hub(
    hub: Hub, call: Callable[..., Any], versions: Repo, model: str, options: dict[str, Any]
) -> None:
    commit = versions.branches["v1"]
    given = model.replace("URL", hub.url).replace("COMMIT", commit)
    found = call(partial(commands.loaded, given, **options))
    assert isinstance(found, dict), found
    assert found["id"] == given and found.get("repo", given) == "me/versions" and found["revision"] == commit


NOT_FOUND = [
    ("me/versions@v2", {}, "me/versions has no revision 'v2'; check its name"),
    ("me/versions@\ud800", {}, r"me/versions has no revision '\ud800'; check its name"),
    ("me/versions@v1", {"revision": "v2"}, "--revision v2: me/versions@v1 names another revision, v1; give one of"),
    ("URL/me/versions/tree/v1/inner", {"subfolder": "b"}, "names another subfolder, inner; give one of them"),
    ("URL/me/versions/tree/v1/outer", {}, "outer: has no folder 'outer' inside; check its name"),
    ("URL/me/versions/blob/v1/a/b.pth", {}, "one file of me/versions; give the repository, or download the file (hf "
     "download me/versions a/b.pth --revision v1) and give its path"),
    ("URL/me/versions/discussions", {}, "is a page about me/versions; give me/versions"),
    ("https://huggingface.co/datasets/me/versions", {}, "not a model on the Hugging Face Hub; give huggingface.co/"),
    ("https://[x/y", {}, "; give huggingface.co/USER/NAME"),
    ("https://example.com/a/b.pth", {}, "not on the Hugging Face Hub; download what is there, and give its path"),
    ("me/versions/inner", {}, "not a Hub id, which is USER/NAME; is inner a folder inside me/versions? Give it as "
     "--subfolder inner"),
    ("hf-hub:", {}, "hf-hub:: must be hf-hub:USER/NAME, or hf-hub:USER/NAME@REVISION"),
    ("timm:me/versions", {}, "of a repository on the Hub, give the id alone: me/versions"),
    ("me/" + "a" * 5000, {}, "has a name of 5000 bytes in it, more than files and models can have; check MODEL"),
    ("me/nothing", {}, "no such model on the Hub; check the spelling, or, if it is private, log in"),
    ("me/gated", {}, "only to those who accepted its terms: accept them on URL/me/gated, and log in with"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "options", "message"), NOT_FOUND, ids=[row[2][:40] for row in NOT_FOUND])
def test_what_is_not_on_the_hub_is_said_with_what_to_do(
    hub: Hub, call: Callable[..., Any], versions: Repo, model: str, options: dict[str, Any], message: str
) -> None:
    held(hub, "me/gated", {}).gated = True
    told = call(partial(commands.loaded, model.replace("URL", hub.url), **options))
    assert isinstance(told, str) and message.replace("URL", hub.url) in told and "\n" not in told, told


@pytest.mark.slow
def test_a_record_names_the_commit_though_the_branch_has_moved(
    hub: Hub, run: Callable[..., Done], versions: Repo, tmp_path: Path
) -> None:
    model, out = f"{hub.url}/me/versions/tree/v1/inner", tmp_path / "out"
    done = run("patch", model, "-o", out, "--recipe", "demo", "--num-images", 2, "--no-verify")
    assert done.code == 0, done.err
    versions.branches["v1"] = versions.branches["main"]
    done = run("reproduce", out)
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("model", "options", "library", "absent"),
    [
        ("me/both", {}, "open_clip", ""),
        ("me/both", {"library": "transformers"}, "transformers", "open_clip_model"),
        ("me/both", {"library": "open_clip"}, "open_clip", "/model.safetensors"),
        ("me/pickled", {"allow_pickle": True}, "transformers", ""),
        ("me/pickled", {"allow_pickle": True, "library": "open_clip"}, "open_clip", "/model.safetensors"),
    ],
)
def test_a_repository_of_two_libraries(
    hub: Hub, call: Callable[..., Any], tmp_path: Path, model: str, options: dict[str, Any], library: str, absent: str
) -> None:
    """Safetensors win over pickles; who names the library fetches no other's weights."""
    files = both_libraries(tmp_path)
    if model == "me/pickled":
        from safetensors.torch import load

        torch.save(load(files.pop("open_clip_model.safetensors")), tmp_path / "weights")
        files["open_clip_pytorch_model.bin"] = (tmp_path / "weights").read_bytes()
    held(hub, f"{model}-{len(options)}", files)  # each with a cache of its own
    found = call(partial(commands.loaded, f"{model}-{len(options)}", **options))
    assert isinstance(found, dict) and found["library"] == library, found
    assert not absent or not [path for path in hub.requests if absent in path and path.startswith("GET /me")]


def both_libraries(folder: Path) -> dict[str, bytes]:
    """A CLIP of open_clip and one of transformers, in one folder as they are published."""
    from tests.picos import by_id

    by_id("open-clip-no-ln-pre").build(folder / "both")
    by_id("hf-clip").build(folder / "both")
    return content_of(folder / "both")


def test_only_what_a_subfolder_needs_is_fetched(
    hub: Hub, run: Callable[..., Done], demo_folder: Path, tmp_path: Path
) -> None:
    files = {name: b"{}" for name in ("model_index.json", "unet/config.json", "unet/model.safetensors")}
    held(hub, REPO, files | content_of(demo_folder, "image_encoder/"))
    done = run("patch", REPO, "--recipe", "demo", "-o", tmp_path / "out")
    assert "its vision model is in image_encoder/: add --subfolder image_encoder" in done.err
    hub.requests.clear()
    done = run(
        "patch", REPO, "--subfolder", "image_encoder", "--recipe", "demo", "-o", tmp_path / "out", "--num-images", 4
    )
    assert done.code == 0, done.err
    assert not [path for path in hub.requests if "unet/" in path]

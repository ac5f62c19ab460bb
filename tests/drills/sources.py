"""A source that changes at any moment of `patch`."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

from regsurgery.checkpoints.sums import check_sums, sha256
from regsurgery.demo import write_demo
from regsurgery.verification.original import read_record
from tests.drills import Row, drill, tries
from tests.drills.patched import demo
from tests.drills.running import ended, patch

WEIGHTS = "model.safetensors"


@drill
def source_changed_while_read(place: Path) -> Row:
    """Weights of the same size, moved there or written over the old ones: refused, or the folder has the first or the
    second ones, under their own digest.
    """
    source, other, out = place / "source", place / "other", place / "out"
    write_demo(source)
    first = (source / WEIGHTS).read_bytes()
    tail = bytes(value if index % 4 else value ^ 1 for index, value in enumerate(first[-4096:]))
    second = first[:-4096] + tail  # another last bit in the last thousand float32
    moments, began = tries(4, 10), time.monotonic()
    assert ended(patch(source, out))[0] == 0
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    seen = Counter[str]()
    for moment in range(moments):
        for moved in (True, False):
            (source / WEIGHTS).write_bytes(first)
            process = patch(source, out)
            time.sleep(seconds * (moment + 0.5) / moments)
            if moved:
                other.write_bytes(second)
                other.replace(source / WEIGHTS)
            else:
                with (source / WEIGHTS).open("r+b") as file:
                    file.write(second)
            code, said = ended(process)
            if code == 0:
                check_sums(out)
                (weights,) = (file for file in read_record(out).files if file.name == WEIGHTS)
                other.write_bytes(first)
                before = weights.sha256 == sha256(other)
                assert before or weights.sha256 == sha256(source / WEIGHTS)
                header = 8 + int.from_bytes(first[:8], "little")
                written = (out / WEIGHTS).read_bytes()
                start = 8 + int.from_bytes(written[:8], "little")
                data = (first if before else second)[header:]
                assert written[start : start + len(data)] == data, "the folder has other weights than it says"
                shutil.rmtree(out)
                seen["changed after the last read" if before else "changed before the first read"] += 1
            else:
                assert code == 2 and "the source changed while it was read" in said, (code, said)
                assert not out.exists()
                seen["refused"] += 1
            other.unlink(missing_ok=True)
            assert sorted(place.iterdir()) == [source], list(place.iterdir())
    assert seen["refused"], seen
    outcome = ", ".join(f"{what}: {count}" for what, count in seen.items())
    return Row(2 * moments, f"{outcome}; no folder with other weights than it says")


@drill
def folder_switched_while_read(place: Path) -> Row:
    """A link to the source that leads to another version meanwhile: refused, or every file is of one of the two."""
    source, out, digests = place / "current", place / "out", list[dict[str, str]]()
    for version in ("a", "b"):
        folder = demo(place / version)
        for name in ("config.json", WEIGHTS):
            path = folder / name
            content = path.read_bytes()
            changed = content[:-1] + bytes([content[-1] ^ 1]) if name == WEIGHTS else content + b" "
            path.write_bytes(changed if version == "b" else content)
        (folder / "labels.txt").write_text(version)
        digests.append({path.name: sha256(path) for path in folder.iterdir()})
    moments, seen = tries(2, 10), Counter[str]()
    seconds = _seconds(place / "a", out)
    for moment in range(moments):
        switch(source, "a")
        process = patch(source, out)
        time.sleep(seconds * (moment + 0.5) / moments)
        switch(source, "b")
        code, said = ended(process)
        if code == 0:
            check_sums(out)
            written = {file.name: file.sha256 for file in read_record(out).files}
            assert written in digests, f"the folder has files of both: {written}"
            shutil.rmtree(out)
            seen["the old one" if written == digests[0] else "the new one"] += 1
        else:
            assert code == 2 and "the source changed while it was read" in said and not out.exists(), (code, said)
            seen["refused"] += 1
    outcome = ", ".join(f"{what} {count} times" for what, count in seen.items())
    return Row(moments, f"{outcome}; never a folder of both")


def switch(link: Path, version: str) -> None:
    """As a new version is put in place of the old one, at once."""
    new = link.with_name("next")
    new.symlink_to(version)
    new.replace(link)


def _seconds(source: Path, out: Path) -> float:
    """How long `patch` takes, once what it imports is there."""
    assert ended(patch(source, out))[0] == 0
    shutil.rmtree(out)
    began = time.monotonic()
    assert ended(patch(source, out))[0] == 0
    shutil.rmtree(out)
    return time.monotonic() - began

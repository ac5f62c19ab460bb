"""What the live page is made of: the preprocessing as it was measured, and onnxruntime-web from a registry."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torchvision.transforms import v2

from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.images.generated import dead_leaves
from regsurgery.progress import Progress
from regsurgery.reporting import onnxruntime_web
from regsurgery.reporting.onnxruntime_web import FILES, registry
from regsurgery.reporting.preprocessing import Preprocessing, measured

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BICUBIC, BILINEAR, LANCZOS = (
    v2.InterpolationMode.BICUBIC,
    v2.InterpolationMode.BILINEAR,
    v2.InterpolationMode.LANCZOS,
)


def model(*steps: Any, size: tuple[int, int] = (96, 96)) -> Any:
    """What is measured of a model: its preprocessing, made of `steps` on a picture."""
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    chain = v2.Compose([*steps, *tail])
    return SimpleNamespace(
        preprocess=lambda pictures: torch.stack([chain(picture) for picture in pictures]),
        image_size=size,
        preprocess_note="a test's",
        source=SimpleNamespace(name="a model", id="a model"),
    )


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((v2.Resize(107, BICUBIC), v2.CenterCrop(96)), (107, "bicubic")),
        ((v2.Resize(96, BILINEAR), v2.CenterCrop(96)), (96, "bilinear")),
        ((v2.Resize((96, 96), LANCZOS),), ((96, 96), "lanczos")),
    ],
)
def test_the_preprocessing_is_measured_and_gives_the_same_pixels(steps: Any, expected: tuple[Any, str]) -> None:
    import random

    subject = model(*steps)
    found = measured(subject)
    assert (found.resized, found.filter) == expected
    np.testing.assert_allclose((found.mean, found.scale), (MEAN, [1 / one for one in STD]), rtol=1e-5)
    for number, size in enumerate(((217, 131), (103, 340), (130, 130))):
        picture = dead_leaves(random.Random(number), max(size)).crop((0, 0, *size))
        pixels = (found(picture) / 255 - np.array(found.mean)) * np.array(found.scale)
        wanted = subject.preprocess([picture])[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(pixels, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width"), [(100, 131), (131, 100), (100, 141), (100, 143)], ids=lambda size: str(size)
)
def test_halves_are_rounded_as_measured(height: int, width: int) -> None:
    """Of a crop that leaves an odd number of pixels, torchvision rounds the half to even; others drop the fraction."""
    rounded = measured(model(v2.Resize(100, BICUBIC), v2.CenterCrop(96)))
    assert rounded.crop_rounds and not rounded.rounds
    crop = (slice((height - 96) // 2, (height - 96) // 2 + 96), slice((width - 96) // 2, (width - 96) // 2 + 96))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    dropped = Preprocessing(100, False, False, (96, 96), "bicubic", (0.0,) * 3, (1.0,) * 3)
    assert np.array_equal(dropped(picture), np.asarray(picture)[crop])
    wanted = np.asarray(v2.CenterCrop(96)(picture))
    assert np.array_equal(rounded(picture), wanted)


@pytest.mark.parametrize(
    "steps",
    [
        (v2.Resize(80, BICUBIC), v2.CenterCrop(96)),  # it pads
        (v2.Resize(107, BICUBIC), v2.CenterCrop(96), v2.RandomHorizontalFlip(1.0)),
        (v2.Resize(107, v2.InterpolationMode.NEAREST), v2.CenterCrop(96)),
    ],
    ids=("padded", "mirrored", "nearest"),
)
def test_another_preprocessing_is_refused(steps: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"a model .a test's. is not a resize and a centre crop"):
        measured(model(*steps))


# --- onnxruntime-web ------------------------------------------------------------------------------------------------


def archive(names: tuple[str, ...] = FILES) -> bytes:
    """A package as npm packs it, of which only `names` are in `dist/`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as packed:
        for name in ("package/package.json", *(f"package/dist/{name}" for name in names), "package/dist/large.wasm"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            packed.addfile(member, io.BytesIO(name.encode()))
    return stream.getvalue()


def integrity(content: bytes) -> str:
    """As the registry gives it."""
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes], None]:
    """Pins the integrity of some bytes; the cache is empty, and the network allowed."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda *names: tmp_path)
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

    def pin(content: bytes) -> None:
        monkeypatch.setattr(onnxruntime_web, "INTEGRITY", integrity(content))

    pin(archive())
    return pin


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """A registry: `requests` are the paths that were asked for, `content` what they are answered with."""
    state = SimpleNamespace(requests=[], content=archive(), status=200, protocol=None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            if state.protocol is not None:
                self.wfile.write(f"{state.protocol}\r\n\r\n".encode())
                return
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        state.url = f"http://127.0.0.1:{listening.server_port}/npm"
        yield state
        listening.shutdown()


def files(given: Path | None = None) -> dict[str, bytes]:
    return onnxruntime_web.onnxruntime_web(given, Progress())


def test_it_is_fetched_once_from_npms_registry(
    pinned: Any, server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("npm_config_registry", f"{server.url}/")
    assert files() == {name: f"package/dist/{name}".encode() for name in FILES} == files()
    assert server.requests == [f"/npm/onnxruntime-web/-/onnxruntime-web-{onnxruntime_web.VERSION}.tgz"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert files().keys() == set(FILES), "the cache needs no network"
    (kept,) = tmp_path.glob("*.tgz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"is not in the cache, or not whole, and HF_HUB_OFFLINE is set"):
        files()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert files().keys() == set(FILES) and kept.read_bytes() == whole and len(server.requests) == 2, "it is mended"


def test_the_registry_is_that_of_npm(pinned: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert registry() == "https://registry.npmjs.org/"
    (tmp_path / ".npmrc").write_text(
        "fund=false\nregistry = https://one.example/\n@scope:registry=https://two.example/\n"
    )
    assert registry() == "https://one.example/"
    monkeypatch.setenv("npm_config_registry", "https://three.example/npm")
    assert registry() == "https://three.example/npm"
    monkeypatch.delenv("npm_config_registry")
    (tmp_path / ".npmrc").unlink()
    (tmp_path / ".npmrc").mkdir()  # as unreadable as a file can be, for root too
    assert registry() == "https://registry.npmjs.org/"


def test_what_cannot_be_had_is_said_in_a_line(
    pinned: Callable[[bytes], None], server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as error:
            files()
        message = str(error.value)
        assert "npm pack onnxruntime-web@" in message and "--onnxruntime-web" in message and "\n" not in message
        return message

    monkeypatch.setenv("npm_config_registry", server.url)
    server.content = archive() + b"more"
    assert "is not onnxruntime-web" in refused() and not list(tmp_path.glob("*.tgz"))
    server.content = archive()[:-1]
    assert "is not onnxruntime-web" in refused() and not list(tmp_path.glob("*.tgz"))
    monkeypatch.setattr(onnxruntime_web, "MAX_BYTES", len(archive()) - 2)
    assert "cannot be fetched (more than 0 MiB)" in refused()
    server.protocol = "SPDY/1 200 OK"
    assert "cannot be fetched (SPDY/1 200 OK)" in refused()
    server.protocol = None
    for password in ("http://me:secret@127.0.0.1/", "http://me:secret@127.0.0.1:1/", "ftp://me:secret@127.0.0.1/"):
        monkeypatch.setenv("npm_config_registry", password)
        assert "secret" not in refused()
    monkeypatch.setenv("npm_config_registry", server.url)
    server.status = 404
    assert "cannot be fetched (HTTP Error 404" in refused()
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    assert "must be an https or http address" in refused()
    asked = len(server.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused() and len(server.requests) == asked


def test_an_archive_is_given_instead(pinned: Callable[[bytes], None], tmp_path: Path) -> None:
    path = tmp_path / "given.tgz"
    with pytest.raises(UserError, match=r"given.tgz: cannot be read \(No such file or directory\)"):
        files(path)
    path.write_bytes(archive())
    assert files(path).keys() == set(FILES)
    path.write_bytes(archive(FILES[:1]))
    with pytest.raises(UserError, match=r"given.tgz: is not onnxruntime-web"):
        files(path)
    pinned(path.read_bytes())
    with pytest.raises(UserError, match=r"given.tgz: has no ort"):
        files(path)

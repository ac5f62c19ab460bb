"""Which loader files run unasked: those that this or a released version writes, byte for byte."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from regsurgery.backends import modeling, open_clip, timm, transformers
from regsurgery.backends.released import RELEASED
from regsurgery.errors import CheckpointError
from regsurgery.runtime import transformers as host_transformers
from regsurgery.version import __version__

LOADERS: tuple[Any, ...] = (transformers, timm, open_clip)
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"


def source(*names: str) -> str:
    """The loader file of a transformers model with a config class and model classes of these names."""
    config, *models = names
    tail = transformers.CONFIG_CLASS.format(name=config, stock=f"transformers.{config}")
    for name in models:
        tail += transformers.CLASS.format(name=name, config=config, stock=f"transformers.{name}")
    return modeling.modeling_source(host_transformers, tail)


def test_a_changed_loader_has_a_version_of_its_own_and_every_release_keeps_its_digests() -> None:
    released = re.findall(r"^## \[(\d[^\]]*)\]", CHANGELOG.read_text("utf-8"), re.M)
    digests = tuple(loader.loader_digest() for loader in LOADERS)
    row = f'    "{__version__}": (\n' + "".join(f'        "{digest}",\n' for digest in digests) + "    ),"
    assert set(RELEASED) == set(released), f"in RELEASED of regsurgery/backends/released.py add\n{row}"
    assert RELEASED.get(__version__, digests) == digests, (
        f"{__version__} was released with other loader files: raise the version in regsurgery/version.py"
    )


def test_the_digest_does_not_depend_on_the_model() -> None:
    own = transformers.loader_digest()
    assert modeling.loader_digest(source("ViTConfig", "ViTModel", "ViTForImageClassification")) == own
    assert modeling.loader_digest(source("CLIPConfig", "CLIPModel")) == own


def test_what_transformers_is_told_has_one_name() -> None:
    assert modeling.REFUSAL == host_transformers.REFUSAL


def test_every_class_of_a_loader_can_be_mixed_in_before_a_model_class(tmp_path: Path) -> None:
    """Also where no module has the loader's name; transformers looks up annotations there."""
    from transformers import ViTModel

    (tmp_path / modeling.FILE_NAME).write_text(source("ViTConfig", "ViTModel"), "utf-8")
    loader = modeling.import_modeling(tmp_path, transformers.loader_digest(), trusted=False)
    del sys.modules[loader.__name__]
    mixins = loader._Grafted.__subclasses__()
    assert len(mixins) > 9
    for mixin in mixins:
        made = loader._grafted_class(mixin, ViTModel)
        assert made.__mro__[1] is mixin and made.config_class is ViTModel.config_class


def test_a_loader_is_found_by_its_classes_module_name(tmp_path: Path) -> None:
    """Transformers 5.0 opens the file of `sys.modules[cls.__module__]` when it makes a model."""
    (tmp_path / modeling.FILE_NAME).write_text(source("ViTConfig", "ViTModel"), "utf-8")
    loader = modeling.import_modeling(tmp_path, transformers.loader_digest(), trusted=False)
    module = sys.modules[loader.ViTModel.__module__]
    assert module is loader and module.__file__ == str(tmp_path / modeling.FILE_NAME)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "import this\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("ViTConfig with another", "ViTConfig  with another"),
        lambda text: text.replace("config_class = ViTConfig", "config_class = ViTModel"),
        lambda text: text.replace("\n\n\nclass ViTModel", "\nimport this\n\n\nclass ViTModel"),
        lambda text: text.replace("class ViTModel(PatchedModel, ", "class ViTModel(PatchedModel,  "),
        lambda text: text.replace("transformers.ViTModel", "transformers.Trainer"),
        lambda text: "import this\n" + text,
        lambda text: text.replace("import shutil", "import shutil, this"),
    ],
)
def test_every_other_byte_counts(change: Any) -> None:
    text = source("ViTConfig", "ViTModel")
    assert change(text) != text
    assert modeling.loader_digest(change(text)) != transformers.loader_digest()


def test_an_earlier_version_s_loader_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = "was_here = True\n"
    (tmp_path / modeling.FILE_NAME).write_text(older)
    assert timm.foreign_code(tmp_path) == modeling.FILE_NAME
    monkeypatch.setattr(modeling, "RELEASED", {"0.0.1": (modeling.loader_digest(older),)})
    assert timm.foreign_code(tmp_path) is None
    assert modeling.import_modeling(tmp_path, timm.loader_digest(), trusted=False).was_here


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"def load(:\n", "not Python"),
        (b"\0", "not Python"),
        (b"\xff\xfe", "not Python"),
        (b"x = " + b"(" * 100_000, "not Python"),
        (b"this_name_is_not_there", "fails with NameError: name"),
        (b"raise SystemError('no')", "fails with SystemError: no"),
    ],
)
def test_a_trusted_loader_that_is_broken_is_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / modeling.FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        modeling.import_modeling(tmp_path, timm.loader_digest(), trusted=True)
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        modeling.import_modeling(tmp_path, timm.loader_digest(), trusted=False)

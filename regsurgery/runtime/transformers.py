"""The transformers part of `modeling_regsurgery.py`. Copied into patched folders after `surgery.py`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import transformers  # noqa: F401

from regsurgery.runtime.surgery import operate

FOREIGN = "regsurgery_"  # before the stock model type, on disk
REFUSAL = "transformers_weights"  # on disk: what should name a weight file, and instead says how to load the folder
KEPT = FOREIGN + REFUSAL  # the same in memory, where transformers would look for that file


class PatchedConfig:
    """Mixed in before a stock config class: the stock config, with its own model type on disk.

    If code is not trusted, transformers loads the stock model for a model type that it knows: the unpatched one, with
    a warning at best. For an unknown type it refuses, and says that it needs `trust_remote_code=True`.

    A stock class that is named (`CLIPModel.from_pretrained`) asks nobody. It refuses a config whose entry for the name
    of the weight file is no such name, and shows it: the call that loads the patched model.
    """

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        config, kwargs = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if isinstance(config.get("model_type"), str):
            config["model_type"] = config["model_type"].removeprefix(FOREIGN)
        return _renamed(config, REFUSAL, KEPT), kwargs

    def to_json_string(self, *args: Any, **kwargs: Any) -> str:
        config = _renamed(json.loads(super().to_json_string(*args, **kwargs)), KEPT, REFUSAL)  # type: ignore[misc]
        if "model_type" in config:
            config["model_type"] = FOREIGN + config["model_type"].removeprefix(FOREIGN)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _renamed(config: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """`config` with another name for the entry `old`, in the configs inside it, too."""
    return {
        new if name == old else name: _renamed(value, old, new) if isinstance(value, dict) else value
        for name, value in config.items()
    }


class PatchedModel:
    """Mixed in before a stock transformers class: builds the stock model, then operates on it.

    In memory the `model_type` is the stock one, and the config class has the stock name and attributes, so that the
    rest of transformers treats the model like the stock one.
    """

    def __init__(self, config: Any, *args: Any, keep_registers: bool = False, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        operate(self, config.regsurgery, keep_registers=keep_registers)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers 4 saves auto_map but not the file that it points to, and neither version the files it imports.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for source in Path(__file__).parent.glob("*.py"):
            target = Path(save_directory) / source.name
            if source.name != "__init__.py" and target.resolve() != source.resolve():
                shutil.copyfile(source, target)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers 5 does not convert keys for custom code, and would leave its weights random.
        return False

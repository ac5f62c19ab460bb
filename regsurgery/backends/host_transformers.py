"""The transformers part of `modeling_regsurgery.py`. Copied into patched folders behind `runtime.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import transformers  # noqa: F401

from regsurgery.runtime import operate


class PatchedModel:
    """Mixed in front of a stock transformers class: builds the stock model, then operates on it.

    Stock `config_class` and `model_type` stay, so that every other part of transformers treats the model as what it is.
    """

    def __init__(self, config: Any, *args: Any, keep_registers: bool = False, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        operate(self, config.regsurgery, keep_registers=keep_registers)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers 4 saves auto_map but not the file that it points to.
        target = Path(save_directory) / "modeling_regsurgery.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.resolve() != Path(__file__).resolve():
            shutil.copyfile(__file__, target)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers 5 does not convert the keys of custom code and would leave its weights random.
        return False

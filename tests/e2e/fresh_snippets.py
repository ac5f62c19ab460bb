"""Run by tests in another process: the ```python blocks of model cards, as they are written.

`python fresh_snippets.py JOBS`: JOBS is a JSON file `[[FOLDER, NAME, CODE], ...]`; every block runs by itself in a
directory where its folder is called NAME, which is what the card calls it. `import regsurgery` fails, but for blocks
that say `import regsurgery`. Prints a JSON list: for each block "" or its traceback, whether a torch module came out
that has register tokens or attention constants, and the shape of `patches`.
"""

import json
import os
import sys
import tempfile
import traceback

import torch

ADDED = ("register_tokens", "reg_token", "attention_constants")

results = []
with open(sys.argv[1]) as file:
    jobs = json.load(file)
path = list(sys.path)
for folder, name, code in sorted(jobs, key=lambda job: "import regsurgery" in job[2]):
    place = tempfile.mkdtemp(dir=os.path.dirname(sys.argv[1]))
    os.symlink(folder, os.path.join(place, name))
    os.chdir(place)
    sys.path[:] = path
    sys.modules.pop("modeling_regsurgery", None)
    sys.path_importer_cache.pop(name, None)  # it remembers which folder that was
    if "import regsurgery" in code:
        sys.modules.pop("regsurgery", None)
    else:
        sys.modules["regsurgery"] = None  # type: ignore[assignment]
    names: dict = {"__name__": "__main__"}
    try:
        exec(compile(code, "README.md", "exec"), names)
        error = ""
    except BaseException:
        error = traceback.format_exc()
    modules = [value for value in names.values() if isinstance(value, torch.nn.Module)]
    added = any(name.split(".")[-1] in ADDED for module in modules for name, _ in module.named_parameters())
    patches = list(names["patches"].shape) if "patches" in names else None
    results.append({"folder": folder, "code": code, "error": error, "added": added, "patches": patches})
print("\n" + json.dumps(results))

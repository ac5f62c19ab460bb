"""Run by tests in another process, where `import regsurgery` fails: load patched folders as a user would, run them.

`python fresh_process.py [MANIFEST]`: MANIFEST is a torch file, a list of jobs `{library, folder, source,
architecture, auto_class, output, inputs}`; the results, one a job, are saved as `MANIFEST.results`:
`{outputs: {batch size: {name: tensor}}, problems: [text]}`. Without one, manifests are read from lines of stdin, and
`done MANIFEST` is printed after each.
Works with transformers 4.57 and 5; must import nothing of the project.
"""

import importlib.util
import sys
import traceback

sys.modules["regsurgery"] = None  # type: ignore[assignment]

import torch  # noqa: E402

BATCHES = (1, 2, 7)


def flat(value, name=""):
    """All tensors in `value` by path, whatever it is made of."""
    if isinstance(value, torch.Tensor):
        return {name or "output": value}
    items = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = {}
    for key, part in items:
        found.update(flat(part, f"{name}.{key}".lstrip(".")))
    return found


def shape_problems(what, patched, stock):
    patched, stock = flat(patched), flat(stock)
    if patched.keys() != stock.keys():
        return [f"{what}: outputs {sorted(patched.keys() ^ stock.keys())} are not in both"]
    return [
        f"{what}: {name} is {tuple(patched[name].shape)}, the original's {tuple(stock[name].shape)}"
        for name in patched
        if patched[name].shape != stock[name].shape
    ]


def run_transformers(job):
    import transformers

    auto = getattr(transformers, job["auto_class"])
    model, info = auto.from_pretrained(job["folder"], trust_remote_code=True, output_loading_info=True)
    model.eval()
    problems = [
        f"{kind}: {info[kind]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    ]
    every = job["collects"]
    entry = model.get_submodule(job["entry"])
    more = {"output_hidden_states": True} if job["entry"] else {}
    outputs = {size: flat(entry(**{k: v[:size] for k, v in job["inputs"].items()}, **more)) for size in BATCHES}
    patched = auto.from_pretrained(job["folder"], trust_remote_code=True).eval()
    stock = getattr(transformers, job["architecture"]).from_pretrained(job["source"]).eval()
    for each in (patched, stock):
        each.set_attn_implementation("eager")
    patched, stock = patched.get_submodule(job["entry"]), stock.get_submodule(job["entry"])
    inputs = {k: v[:2] for k, v in job["inputs"].items()}
    everything = stock(**inputs, **every)
    if every and not any("hidden_states" in name for name in flat(everything)):
        problems.append("hidden states were not compared")
    problems += shape_problems("forward", patched(**inputs, **every), everything)
    problems += shape_problems(
        "tuple", patched(**inputs, **every, return_dict=False), stock(**inputs, **every, return_dict=False)
    )
    return outputs, problems


def own_loader(folder):
    spec = importlib.util.spec_from_file_location("modeling_regsurgery", f"{folder}/modeling_regsurgery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_timm(job):
    import timm

    model = own_loader(job["folder"]).load(job["folder"])
    stock = timm.create_model(f"local-dir:{job['folder']}", pretrained=False).eval()
    (images,) = job["inputs"].values()
    outputs = {size: {job["output"]: model(images[:size])} for size in BATCHES}
    problems = []
    for what, call in {
        "forward_features": lambda m: m.forward_features(images[:2]),
        "forward_intermediates": lambda m: m.forward_intermediates(images[:2]),
        "forward_intermediates NLC": lambda m: m.forward_intermediates(images[:2], output_fmt="NLC", norm=True),
        "forward_intermediates prefix": lambda m: m.forward_intermediates(
            images[:2], [1, 2], return_prefix_tokens=True
        ),
        "forward_intermediates dict": lambda m: m.forward_intermediates(images[:2], output_dict=True),
        "get_intermediate_layers": lambda m: m.get_intermediate_layers(images[:2], n=3, reshape=True),
    }.items():
        if not hasattr(stock, "get_intermediate_layers") and what.endswith(("dict", "layers")):
            continue  # not every class of timm has them
        if what.endswith("prefix") and not getattr(stock, "num_prefix_tokens", 1):
            continue  # stock timm fails there
        problems += shape_problems(what, call(model), call(stock))
    return outputs, problems


def run_open_clip(job):
    import open_clip

    module = own_loader(job["folder"])
    model = module.load(job["folder"])
    assert module.image_transform(model) is not None
    stock = open_clip.create_model(f"local-dir:{job['folder']}", load_weights=False).eval()
    images, *text = job["inputs"].values()
    names = ("image_features", "image_tokens") if job["entry"] else ("image_features", "text_features", "logit_scale")
    entry = model.get_submodule(job["entry"])
    outputs = {
        size: dict(zip(names, entry(images[:size], *(t[:size] for t in text))))  # noqa: B905
        for size in BATCHES
    }
    problems = []
    if job["entry"]:
        problems += shape_problems("visual", model.visual(images[:2]), stock.visual(images[:2]))
    else:
        problems += shape_problems("encode_image", model.encode_image(images[:2]), stock.encode_image(images[:2]))
    for fmt in ("NCHW", "NLC"):
        call = {"output_fmt": fmt, "output_extra_tokens": True, "normalize_intermediates": not job["entry"]}
        problems += shape_problems(
            f"forward_intermediates {fmt}",
            model.visual.forward_intermediates(images[:2], **call),
            stock.visual.forward_intermediates(images[:2], **call),
        )
    return outputs, problems


RUNNERS = {"transformers": run_transformers, "timm": run_timm, "open_clip": run_open_clip}


def run(manifest):
    results = []
    for job in torch.load(manifest):
        try:
            with torch.no_grad():
                outputs, problems = RUNNERS[job["library"]](job)
        except Exception:  # one job's failure must not hide the others' results
            outputs, problems = {}, [traceback.format_exc()]
        results.append({"outputs": outputs, "problems": problems})
    torch.save(results, f"{manifest}.results")


if __name__ == "__main__":
    try:
        import regsurgery  # noqa: F401
    except ImportError:
        pass
    else:
        sys.exit("regsurgery can be imported: this proves nothing")
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        for line in sys.stdin:
            run(line.strip())
            print(f"done {line.strip()}", flush=True)

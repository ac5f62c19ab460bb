"""Run by tests in another process, where `import regsurgery` fails: native folders in the stock libraries.

`python stock_native.py MANIFEST`: MANIFEST is a torch file `{pixels: [N, 3, H, W], models: {name: {library, folder,
block, patches}}}`: `block` is the module path of the last but one block, `patches` the first patch after it. The
results are saved as `MANIFEST.results`: `{name: {output: [N, C], norms: [N, P]}}`. Must import nothing of the project.
"""

import sys

sys.modules["regsurgery"] = None  # type: ignore[assignment]

import torch  # noqa: E402

BATCH = 25


def stock_timm(folder):
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def stock_transformers(folder):
    import transformers

    model, info = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert type(model).__name__ != "Dinov2WithRegistersForImageClassification" or model.config.num_register_tokens > 0
    return lambda pixels: model(pixel_values=pixels).logits, model


def stock_open_clip(folder):
    import open_clip

    model = open_clip.create_model(f"local-dir:{folder}")
    return model.encode_image, model


@torch.no_grad()
def run(job, pixels):
    loaded = {"timm": stock_timm, "transformers": stock_transformers, "open_clip": stock_open_clip}[job["library"]](
        job["folder"]
    )
    forward, model = loaded if isinstance(loaded, tuple) else (loaded, loaded)
    model.eval()
    norms = []

    def keep(module, args, output):
        tokens = output[0] if isinstance(output, tuple) else output
        norms.append(tokens[:, job["patches"] :].norm(dim=-1))

    model.get_submodule(job["block"]).register_forward_hook(keep)
    outputs = [forward(batch) for batch in pixels.split(BATCH)]
    return {"output": torch.cat(outputs), "norms": torch.cat(norms)}


def main():
    path = sys.argv[1]
    manifest = torch.load(path)
    results = {name: run(job, manifest["pixels"]) for name, job in manifest["models"].items()}
    torch.save(results, f"{path}.results")


if __name__ == "__main__":
    main()

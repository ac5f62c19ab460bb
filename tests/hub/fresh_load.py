"""Run by tests in another process, where `import regsurgery` fails: load models from the Hub as its users would.

`python fresh_load.py MANIFEST`: MANIFEST is a torch file `{pixels: [N, 3, H, W], repos: {repo: how}}`; `how` is a key
of `LOADERS`. Every model is loaded by the line that its library documents, where there is one, and by the first Python
block of the repository's model card; its other blocks are run, but for that which imports regsurgery. The results are
saved as `MANIFEST.results`: `{repo: [output, ...]}`.
"""

import re
import sys

sys.modules["regsurgery"] = None  # type: ignore[assignment]

import torch  # noqa: E402


def auto(repo):
    import transformers

    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        repo, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model


def timm_native(repo):
    import timm

    return timm.create_model(f"hf-hub:{repo}", pretrained=True)


def open_clip_native(repo):
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"hf-hub:{repo}")
    assert preprocess is not None
    return model


LOADERS = {"auto": auto, "timm native": timm_native, "open_clip native": open_clip_native, "card alone": None}


def by_card(repo):
    from huggingface_hub import hf_hub_download

    with open(hf_hub_download(repo, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^```python\n(.*?)^```$", file.read(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3 and sum("import regsurgery" in code for code in blocks) == 1
    before, scopes = set(sys.path), []
    for code in blocks:
        if "import regsurgery" not in code:
            scopes.append({})
            exec(code, scopes[-1])
            sys.path[:] = [place for place in sys.path if place in before]
            sys.modules.pop("modeling_regsurgery", None)
    return scopes[0]["model"]


@torch.no_grad()
def output(model, pixels):
    model.eval()
    result = model.encode_image(pixels) if hasattr(model, "encode_image") else model(pixels)
    return getattr(result, "logits", result)


def main():
    torch.set_num_threads(1)
    path = sys.argv[1]
    manifest = torch.load(path)
    results = {}
    for repo, how in manifest["repos"].items():
        loaders = [loader for loader in (LOADERS[how], by_card) if loader is not None]
        results[repo] = [output(loader(repo), manifest["pixels"]) for loader in loaders]
    torch.save(results, f"{path}.results")


if __name__ == "__main__":
    main()

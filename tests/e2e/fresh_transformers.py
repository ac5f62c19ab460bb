"""Run by tests in another process, where `import regsurgery` fails: what users do with a patched transformers folder.

`python fresh_transformers.py FOLDER INPUTS SCRATCH IMAGE`: INPUTS is a torch file `{images, logits}`. Works with
transformers 4.57 and 5. Prints one line a check; an assertion fails the process.
"""

import json
import sys
from pathlib import Path

sys.modules["regsurgery"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModel, AutoModelForImageClassification  # noqa: E402

folder, inputs, scratch, image = sys.argv[1], torch.load(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
images, logits = inputs["images"], inputs["logits"]


def load(path=folder, **kwargs):
    return AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True, **kwargs).eval()


def close(what, found, wanted, tolerance):
    difference = float((found.float() - wanted.float()).abs().max().detach())
    assert difference <= tolerance, f"{what}: {difference} > {tolerance}"
    print(f"{what}: {difference:.1e} <= {tolerance}")


def names(path):
    with safe_open(Path(path) / "model.safetensors", "pt") as file:
        return set(file.keys())


def refuses(auto_class):
    try:
        auto_class.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return "pass the argument `trust_remote_code=True`" in str(error)
    return False


model = load()
with torch.no_grad():
    close("sdpa", load(attn_implementation="sdpa")(images).logits, logits, 2e-5)
    close("eager", load(attn_implementation="eager")(images).logits, logits, 1e-4)
    states = model(images, output_hidden_states=True).hidden_states
    assert len(states) == 13 and {state.shape[1] for state in states} == {197}
    assert float(states[11][:, 1:].norm(dim=-1).max()) < 60, "an outlier is left"
    kept = (
        AutoModel.from_pretrained(folder, trust_remote_code=True, keep_registers=True).eval()(images).last_hidden_state
    )
    plain = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(images).last_hidden_state
    assert kept.shape[1] == 200
    close("keep_registers leaves the rest alone", kept[:, :197], plain, 2e-5)
    half = load(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    found = half(images.bfloat16()).logits
    close("bfloat16", found, logits, 0.5)
    assert refuses(AutoModel) and refuses(AutoModelForImageClassification), "loads without trust_remote_code"

model.save_pretrained(scratch / "saved")
assert names(scratch / "saved") == names(folder), names(scratch / "saved") ^ names(folder)
saved = json.loads((scratch / "saved" / "config.json").read_text())
assert (saved["regsurgery"], saved["model_type"]) == (model.config.regsurgery, "regsurgery_vit")
assert saved["transformers_weights"] == json.loads((Path(folder) / "config.json").read_text())["transformers_weights"]
assert model.config.model_type == "vit"
with torch.no_grad():
    close("save_pretrained and back", load(scratch / "saved")(images).logits, logits, 2e-5)

model.train()
before = model.vit.register_tokens.detach().clone()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
model(pixel_values=images[:2], labels=torch.tensor([1, 2])).loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
optimizer.step()
assert float((model.vit.register_tokens - before).abs().max()) > 0, "the register tokens did not learn"
print("training step: ok")

# Whether it is captured whole is ours; what inductor makes of it is torch's, and looking once, at the shift, is enough.
if transformers.__version__ >= "5":
    torch._inductor.config.compile_threads = 1  # no pool of processes, each of which imports torch
    block = load().vit.layers[7]
    tokens = torch.randn(2, 200, 192, generator=torch.Generator().manual_seed(0))
    tokens[:, 1:9] *= 30  # what fires
    with torch.no_grad():
        wanted = block(tokens)
        close("inductor", torch.compile(block, fullgraph=True)(tokens), wanted, 1e-5 * float(wanted.abs().max()))
compiled = torch.compile(load(), fullgraph=True, backend="aot_eager")
with torch.no_grad():
    close("torch.compile", compiled(images).logits, logits, 1e-4)
    close("torch.compile, another batch", compiled(images[:2]).logits, logits[:2], 1e-4)

answer = transformers.pipeline("image-classification", model=folder, trust_remote_code=True)(image)
assert answer[0]["score"] > 0.5, answer
print(f"pipeline: {answer[0]['label']}")

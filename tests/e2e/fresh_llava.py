"""Run by a test in another process, where `import regsurgery` fails: a patched LLaVA against the stock one.

`python fresh_llava.py STOCK PATCHED`; works with transformers 4.57 and 5. An assertion fails the process.
"""

import sys

sys.modules["regsurgery"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402

stock_folder, patched_folder = sys.argv[1:]
image = Image.effect_mandelbrot((96, 80), (-3, -2.5, 2, 2.5), 100).convert("RGB")
generated, features = [], []
for folder in (stock_folder, patched_folder):
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text="w5 <image> w6 w7", return_tensors="pt")
    assert int((inputs["input_ids"] == 99).sum()) == 64, "image tokens in the prompt"
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    model.eval()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    generated.append(tokens.shape[1] - inputs["input_ids"].shape[1])
    features.append(tower.hidden_states[-2])
assert features[0].shape == features[1].shape == (1, 65, 64)
assert float((features[0] - features[1]).abs().max()) > 1e-3, "the tower is not patched"
print(f"tokens generated: {generated[0]} and {generated[1]}")

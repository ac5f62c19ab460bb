"""Patched models inside diffusers and sentence-transformers: the blocks of `docs/inside.md` that need them.

They run as they stand. The tests need neither library otherwise: `pip install diffusers sentence-transformers`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import regsurgery
from tests.e2e.test_files import RECIPE, moved
from tests.e2e.test_training_libraries import write_clip
from tests.picos import CLIP_TEXT, CLIP_VISION
from tests.unit.test_docs import BLOCKS

pytestmark = pytest.mark.slow
WIDTH = CLIP_TEXT["hidden_size"]
WORDS = "this checkpoint is patched, and a stock class would ignore that; load it with"


def run_block(word: str) -> dict[str, Any]:
    """The names that the block of the page with `word` leaves."""
    (block,) = (each for each in BLOCKS if each.page == "inside.md" and each.language == "python" and word in each.code)
    names: dict[str, Any] = {}
    exec(compile(block.code, str(block), "exec"), names)
    return names


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """What the blocks call `photo.jpg`, in the folder that they run in."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((96, 80), 90).convert("RGB").save("photo.jpg")
    return Image.open("photo.jpg")


def write_pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline with an image encoder, small."""
    import diffusers
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    encoder = moved(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VISION)))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(WIDTH, WIDTH), layers_per_block=1, cross_attention_dim=WIDTH,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    write_clip(folder.with_name("clip"))
    diffusers.StableDiffusionPipeline(
        diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        CLIPTextModel(CLIPTextConfig(**{**CLIP_TEXT, "max_position_embeddings": 77})),
        CLIPTokenizer.from_pretrained(folder.with_name("clip"), model_max_length=77),
        unet, diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), None,
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        image_encoder=encoder, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_ip_adapter(file: Path, num_layers: int) -> None:
    """The weights of an IP-Adapter of four tokens for so many cross-attentions."""
    torch.manual_seed(0)
    shapes = {"proj.weight": (4 * WIDTH, CLIP_VISION["projection_dim"]), "proj.bias": (4 * WIDTH,),
              "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}  # fmt: skip
    state = {f"image_proj.{name}": torch.randn(shape) for name, shape in shapes.items()}
    for index in range(1, 2 * num_layers, 2):
        state |= {f"ip_adapter.{index}.to_{kind}_ip.weight": torch.randn(WIDTH, WIDTH) for kind in "kv"}
    file.parent.mkdir(parents=True)
    save_file(state, file)


def test_the_image_encoder_of_an_ip_adapter(tmp_path: Path, photo: Image.Image) -> None:
    diffusers = pytest.importorskip("diffusers")
    write_pipeline(tmp_path / "pipeline")
    regsurgery.patch(
        "pipeline", "encoder-patched", recipe=RECIPE, num_images=2, subfolder="image_encoder", verification=False
    )
    stock = diffusers.StableDiffusionPipeline.from_pretrained("pipeline")
    num_layers = sum(name.endswith("attn2.processor") for name in stock.unet.attn_processors)
    write_ip_adapter(tmp_path / "ip-adapter" / "models" / "ip-adapter_sd15.safetensors", num_layers)
    patched = run_block("load_ip_adapter")["pipeline"]
    assert type(patched.image_encoder).__module__.endswith("modeling_regsurgery")
    pixels = stock.feature_extractor(photo, return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = regsurgery.load("encoder-patched")(pixels).image_embeds
        embeds = [pipeline.encode_image(photo, "cpu", 1)[0] for pipeline in (stock, patched)]
    assert float((embeds[1] - wanted).abs().max()) < 1e-5
    assert float((embeds[0] - wanted).abs().max()) > 1e-3
    pictures = patched("a", ip_adapter_image=photo, num_inference_steps=1, height=16, width=16, output_type="pt").images
    assert pictures.shape == (1, 3, 16, 16)
    shutil.rmtree("pipeline/image_encoder")
    shutil.copytree("encoder-patched", "pipeline/image_encoder")
    with pytest.raises(ValueError, match=WORDS):
        diffusers.StableDiffusionPipeline.from_pretrained("pipeline")


def test_a_clip_in_sentence_transformers(tmp_path: Path, photo: Image.Image) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    write_clip(tmp_path / "clip")
    regsurgery.patch("clip", "clip-patched", recipe=RECIPE, num_images=2, verification=False)
    stock = sentence_transformers.SentenceTransformer("clip", device="cpu").encode([photo])
    names = run_block("SentenceTransformer")
    patched = names["embeddings"]
    assert stock.shape == patched.shape and abs(stock - patched).max() > 1e-3
    with pytest.raises(ValueError, match="trust_remote_code"):
        sentence_transformers.SentenceTransformer("clip-patched", device="cpu")
    shutil.copytree("clip", "saved/0_CLIPModel")
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    Path("saved/modules.json").write_text(json.dumps([module]))
    saved = sentence_transformers.SentenceTransformer("saved", device="cpu")
    assert abs(saved.encode([photo]) - stock).max() < 1e-5
    saved[0] = names["model"][0]
    assert abs(saved.encode([photo]) - patched).max() < 1e-5

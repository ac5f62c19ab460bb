"""What Lightning, peft, diffusers and sentence-transformers save, by their own save paths.

These packages come with the extra `test`, and are needed by nothing else.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regsurgery
from regsurgery.errors import CheckpointError, UserError
from regsurgery.frontends.load import load
from regsurgery.options import LoadOptions
from tests.e2e.test_files import PIXELS, RECIPE, TIMM, difference, moved, opened, timm_model, vit
from tests.picos import CLIP, CLIP_VISION, VIT

pytestmark = pytest.mark.slow


def lightning_run(folder: Path, model: nn.Module, callbacks: list[Any]) -> Path:
    """A `.ckpt` of Lightning's Trainer after two steps, with a criterion beside the model."""
    import lightning
    from torch.utils.data import DataLoader

    class Classifier(lightning.LightningModule):
        def __init__(self, lr: float = 0.01) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = model
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.criterion(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    data = [(torch.randn(3, PIXELS, PIXELS), number) for number in range(4)]
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, default_root_dir=folder, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(data, batch_size=2))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    model = timm_model()
    path = lightning_run(tmp_path, model, [])
    loaded = opened(path, arch=f"timm:{TIMM}")
    assert difference(loaded, model, PIXELS) == 0.0
    assert "names without the prefix 'net.'" in "; ".join(loaded.source.converted.notes)  # type: ignore[union-attr]
    regsurgery.patch(str(path), tmp_path / "out", recipe=RECIPE, num_images=2, allow_pickle=True, arch=f"timm:{TIMM}")


@pytest.mark.parametrize("ema", [None, False])
def test_averaged_weights_of_lightning_are_those_that_its_loader_takes(tmp_path: Path, ema: bool | None) -> None:
    pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    model = timm_model()
    path = lightning_run(tmp_path, model, [EMAWeightAveraging(decay=0.5)])
    content = torch.load(path, weights_only=False)
    stock = timm_model()
    state = content["state_dict" if ema is None else "current_model_state"]
    stock.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
    assert difference(opened(path, arch=f"timm:{TIMM}", ema=ema), stock, PIXELS) == 0.0


def test_an_adapter_of_peft_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = vit()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=[])
    adapted = peft.get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    stock = stock.merge_and_unload()
    assert difference(load(str(tmp_path / "base")), stock, 64) > 0.01
    loaded = load(str(tmp_path / "adapter"))
    assert difference(loaded, stock, 64) == 0.0
    regsurgery.patch(str(tmp_path / "adapter"), tmp_path / "out", recipe=RECIPE, num_images=2)
    assert "an adapter, merged into base (weights sha256" in (tmp_path / "out" / "README.md").read_text()
    assert regsurgery.reproduce(tmp_path / "out").identical


def test_an_adapter_with_its_own_classifier(tmp_path: Path) -> None:
    """The usual case: a base model without classes, and a classifier that was trained with the adapter."""
    peft = pytest.importorskip("peft")
    from transformers import ViTForImageClassification, ViTModel

    moved(ViTModel(vit().config, add_pooling_layer=False)).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"]
    )
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load(str(tmp_path / "adapter"))
    assert loaded.architecture == "ViTForImageClassification"
    assert difference(loaded, adapted.merge_and_unload(), 64) == 0.0


@pytest.mark.parametrize("classes", [10, 3])
def test_an_adapter_of_a_timm_model(tmp_path: Path, classes: int) -> None:
    """Its name is not recorded by peft, so the message asks for it."""
    peft = pytest.importorskip("peft")
    import timm

    timm.models.save_for_hf(timm_model(), str(tmp_path / "base"), safe_serialization=True)
    config = peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False, modules_to_save=["head"])
    model = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True, num_classes=classes)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        CheckpointError, match=r"put it there as 'base_model_name_or_path': a folder, a Hub id or timm:"
    ):
        load(str(tmp_path / "adapter"))
    name_base(tmp_path / "adapter", str(tmp_path / "base"))
    loaded = load(str(tmp_path / "adapter"))
    assert loaded.config["num_classes"] == classes
    assert difference(loaded, adapted.merge_and_unload(), PIXELS) == 0.0


def name_base(adapter: Path, base: str) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    """Of which peft itself only warns, and gives the model as it was."""
    peft = pytest.importorskip("peft")
    from transformers import ViTConfig, ViTForImageClassification

    larger = ViTForImageClassification(ViTConfig(**{**VIT, "num_hidden_layers": 6}))
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(larger, config).save_pretrained(tmp_path / "adapter")
    vit().save_pretrained(tmp_path / "base")
    name_base(tmp_path / "adapter", str(tmp_path / "base"))
    config_path = tmp_path / "adapter" / "adapter_config.json"
    settings = config_path.read_text()
    config_path.write_text(json.dumps({**json.loads(settings), "target_modules": "("}))
    with pytest.raises(CheckpointError, match=r"peft cannot merge it: missing \), unterminated subpattern"):
        load(str(tmp_path / "adapter"))
    config_path.write_text(json.dumps({**json.loads(settings), "r": 10**7}))  # matrices of 1.3 GB
    with pytest.raises(CheckpointError, match=r"peft cannot merge it: .*size mismatch"):
        load(str(tmp_path / "adapter"))
    config_path.write_text(settings)
    with pytest.raises(CheckpointError, match=r"not an adapter of the model that it names: that has no place for "):
        load(str(tmp_path / "adapter"))


def test_without_peft_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match=r"is an adapter of .*base; install peft .*merge_and_unload"):
        load(str(tmp_path / "adapter"))


def test_the_vision_model_of_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder = moved(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VISION)))
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    pipeline = diffusers.StableDiffusionImageVariationPipeline(
        vae, encoder, unet, diffusers.DDIMScheduler(), None, CLIPImageProcessor(), requires_safety_checker=False
    )
    pipeline.save_pretrained(tmp_path / "pipeline")
    with pytest.raises(CheckpointError, match=r"its vision model is in image_encoder/: add --subfolder image_encoder"):
        load(str(tmp_path / "pipeline"))
    inner = LoadOptions(subfolder="image_encoder")
    assert difference(load(str(tmp_path / "pipeline"), inner), encoder, 64) == 0.0
    regsurgery.patch(
        str(tmp_path / "pipeline"), tmp_path / "out", recipe=RECIPE, num_images=2, subfolder="image_encoder"
    )


def write_clip(folder: Path) -> nn.Module:
    """A CLIP of transformers with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    model = moved(CLIPModel(CLIPConfig(**CLIP)))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 98, "a</w>": 1}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(images, CLIPTokenizer.from_pretrained(folder)).save_pretrained(folder)
    return model


def test_a_folder_of_sentence_transformers(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = tmp_path / "clip"
    model = write_clip(source)
    sentence_transformers.SentenceTransformer(str(source), device="cpu").save(str(tmp_path / "saved"))
    folder = tmp_path / "saved"
    inner = next((path.parent for path in folder.glob("*/config.json")), folder)
    if inner != folder:
        with pytest.raises(CheckpointError, match=f"its vision model is in {inner.name}/: add --subfolder"):
            load(str(folder))
    name = None if inner == folder else inner.name
    assert difference(load(str(folder), LoadOptions(subfolder=name)), model, 64) == 0.0

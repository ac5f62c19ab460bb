"""Small random-weight models of every supported family, and where a person would hook them.

The module paths here are written by hand, from the libraries' sources; they are what the matcher is held to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

EAGER_FAST_PATH = 1e-5  # open_clip's eager attention takes another path than any export
WIDTH, HEADS, BLOCKS, SIZE, PATCH = 64, 4, 4, 64, 8
# 15 patches + CLS = 16 tokens, the head width; 63 + CLS = 64, the model width. Neither is square.
OTHER_SIZES = ((24, 40), (56, 72))


@dataclass(frozen=True)
class Pico:
    """`build(folder)` writes a checkpoint; `insert`, `last` and `down` are module paths, `{}` is the block.

    Attributes:
        published: what names begin with as transformers 5 writes them, and in published checkpoints and version 4.
        prefix: prefix tokens.
        inside: registers stand inside the prefix; `prefixed` are then modules that count the prefix themselves.
        bias: modules that make a bias over pairs of tokens.
        masked: attentions that are given a mask over tokens.
        collector: the module that returns all hidden states, where the model's outputs are made of them.
        hosts: of native mode, where they are not those of the family.
        core: goes through the slower tests too.
    """

    id: str
    build: Callable[[Path], None]
    insert: str
    last: str
    down: str
    hidden: int = 4 * WIDTH
    any_size: bool = True
    tolerance: float = 0.0  # of the eager module against the graph
    published: tuple[str, str] | None = None
    prefix: int = 1
    inside: bool = False
    prefixed: str = ""
    bias: str = ""
    masked: str = ""
    collector: str | None = None
    hosts: tuple[str, ...] | None = None
    core: bool = True

    def publish(self, folder: Path) -> None:
        """Give the tensors of a folder that transformers 5 wrote their published names."""
        if self.published is None:
            return
        new, old = self.published
        state = load_file(folder / "model.safetensors")
        later = {name for name in state if name.startswith(new) and not name.startswith(old)}
        renamed = {old + name.removeprefix(new) if name in later else name: state[name] for name in state}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def _transformers(architecture: str, config_class: str, /, **config: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import transformers

        torch.manual_seed(0)
        settings = getattr(transformers, config_class)(**config)
        getattr(transformers, architecture)(settings).eval().save_pretrained(folder)

    return build


VIT = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "image_size": SIZE,
       "patch_size": PATCH}  # fmt: skip
VIT_CLASSES = {**VIT, "intermediate_size": 4 * WIDTH, "num_labels": 10}
CLIP_VISION = {**VIT, "intermediate_size": 4 * WIDTH, "projection_dim": 32}
BELOW_VISION_MODEL = ("", "vision_model.")
CLIP_TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, 
             "vocab_size": 99, "bos_token_id": 0, "eos_token_id": 98, "projection_dim": 32}  # fmt: skip
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 32}


def _timm(entry: str, num_classes: int = 10, **args: Any) -> Callable[[Path], None]:
    args = {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS, "img_size": SIZE, "patch_size": PATCH,
            "dynamic_img_size": True, **args}  # fmt: skip
    args = {name: value for name, value in args.items() if value is not None}

    def build(folder: Path) -> None:
        import timm

        torch.manual_seed(0)
        model = timm.create_model(entry, num_classes=num_classes, **args)
        timm.models.save_for_hf(model, folder, model_args=args, safe_serialization=True)
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["input_size"] = [3, SIZE, SIZE]
        (folder / "config.json").write_text(json.dumps(config))

    return build


def _open_clip(quick_gelu: bool = False, *, coca: bool = False, **vision: Any) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import open_clip

        torch.manual_seed(0)
        config = {
            "model_cfg": {
                "embed_dim": 32, "quick_gelu": quick_gelu,
                "vision_cfg": {"image_size": SIZE, "layers": BLOCKS, "width": WIDTH, "head_width": WIDTH // HEADS,
                               "patch_size": PATCH, **vision},
                "text_cfg": {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
            },
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }  # fmt: skip
        if coca:
            config["model_cfg"]["custom_text"] = True
            config["model_cfg"]["multimodal_cfg"] = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2,
                                                     "layers": 2, "mlp_ratio": 4}  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        model: Any = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        if coca:
            torch.nn.init.normal_(model.text_decoder.text_projection, std=0.02)  # open_clip leaves what memory held
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")

    return build


CORE = (
    Pico("hf-vit", _transformers("ViTModel", "ViTConfig", **VIT, intermediate_size=4 * WIDTH),
         "layers.0", "layers.3", "layers.{}.mlp.fc2"),
    Pico("hf-vit-classes", _transformers("ViTForImageClassification", "ViTConfig", **VIT_CLASSES),
         "vit.layers.0", "vit.layers.3", "vit.layers.{}.mlp.fc2"),
    Pico("hf-dinov2", _transformers("Dinov2Model", "Dinov2Config", **VIT),
         "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
    Pico("hf-dinov2-swiglu", _transformers("Dinov2Model", "Dinov2Config", **VIT, use_swiglu_ffn=True),
         "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.down_proj", hidden=176),
    Pico("hf-dinov2-classes", _transformers("Dinov2ForImageClassification", "Dinov2Config", **VIT, num_labels=10),
         "dinov2.encoder.layer.0", "dinov2.encoder.layer.3", "dinov2.encoder.layer.{}.mlp.fc2"),
    Pico("hf-clip-vision", _transformers("CLIPVisionModel", "CLIPVisionConfig", **CLIP_VISION),
         "pre_layrnorm", "encoder.layers.3", "encoder.layers.{}.mlp.fc2", published=BELOW_VISION_MODEL),
    Pico("hf-clip-vision-projection", _transformers("CLIPVisionModelWithProjection", "CLIPVisionConfig", **CLIP_VISION),
         "vision_model.pre_layrnorm", "vision_model.encoder.layers.3", "vision_model.encoder.layers.{}.mlp.fc2"),
    Pico("hf-clip", _transformers("CLIPModel", "CLIPConfig", **CLIP),
         "vision_model.pre_layrnorm", "vision_model.encoder.layers.3", "vision_model.encoder.layers.{}.mlp.fc2"),
    Pico("timm-vit", _timm("vit_tiny_patch16_224"), "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-vit-mean", _timm("vit_tiny_patch16_224", global_pool="avg", class_token=False),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2", prefix=0, hosts=("timm",)),
    Pico("timm-dinov2", _timm("vit_small_patch14_dinov2", num_classes=0, init_values=1.0),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-dinov2-swiglu", _timm("vit_giant_patch14_dinov2", num_classes=0, mlp_ratio=8.0, init_values=1.0),
         "blocks.0", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("timm-clip", _timm("vit_base_patch16_clip_224"), "norm_pre", "blocks.3", "blocks.{}.mlp.fc2"),
    Pico("open-clip", _open_clip(), "visual.ln_pre", "visual.transformer.resblocks.3",
         "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False, tolerance=EAGER_FAST_PATH),
    Pico("open-clip-quickgelu", _open_clip(quick_gelu=True), "visual.ln_pre",
         "visual.transformer.resblocks.3", "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False,
         tolerance=EAGER_FAST_PATH),
    Pico("open-clip-no-ln-pre", _open_clip(no_ln_pre=True), "visual.transformer.resblocks.0",
         "visual.transformer.resblocks.3", "visual.transformer.resblocks.{}.mlp.c_proj", any_size=False,
         tolerance=EAGER_FAST_PATH, hosts=("transformers", "timm", "open_clip")),
)  # fmt: skip


SCALED = {"layer_scale_init_value": 1.0}  # at 0.1 planted neurons would write too little
INNER = {"intermediate_size": 4 * WIDTH}
FLAT = ("layers.0", "layers.3", "layers.{}.mlp.fc2")
ENCODER = ("encoder.layers.0", "encoder.layers.3", "encoder.layers.{}.mlp.fc2")
TIMM = ("blocks.0", "blocks.3", "blocks.{}.mlp.fc2")
SIGLIP_TEXT = {**{name: value for name, value in CLIP_TEXT.items() if name != "projection_dim"},
               "hidden_size": WIDTH, "max_position_embeddings": 16, "projection_size": WIDTH}  # fmt: skip
LLAVA = {"vision_config": {**CLIP_VISION, "model_type": "clip_vision_model"},
         "text_config": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                         "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 100},
         "image_token_index": 99, "image_seq_length": (SIZE // PATCH) ** 2}  # fmt: skip


def _below(path: str, *modules: str) -> tuple[str, ...]:
    return tuple(f"{path}.{module}" for module in modules)


def _other(name: str, architecture: str, config_class: str, paths: tuple[str, ...], **options: Any) -> Pico:
    """A transformers model; options: `config`, beyond `VIT`; those of `Pico`."""
    config = {**VIT, **INNER, **options.pop("config", {})}
    build = _transformers(architecture, config_class, **{k: v for k, v in config.items() if v is not None})
    return Pico(f"hf-{name}", build, *paths, any_size=False, core=False, **options)


def _other_timm(name: str, entry: str, **options: Any) -> Pico:
    build = _timm(entry, **options.pop("args", {}))
    down = options.pop("down", TIMM[2])
    return Pico(f"timm-{name}", build, options.pop("insert", TIMM[0]), TIMM[1], down, any_size=False, core=False,
                **options)  # fmt: skip


def _other_open_clip(name: str, paths: tuple[str, ...], hidden: int = 4 * WIDTH, **options: Any) -> Pico:
    tolerance, hosts = options.pop("tolerance", EAGER_FAST_PATH), options.pop("hosts", None)
    return Pico(f"open-clip-{name}", _open_clip(**options), *paths, hidden=hidden, any_size=False, tolerance=tolerance,
                core=False, hosts=hosts)  # fmt: skip


ONE_SIZE = {"dynamic_img_size": None}  # timm models that take no such argument
TOWER = _below("visual", "ln_pre", "transformer.resblocks.3", "transformer.resblocks.{}.mlp.c_proj")

# The families beside those of `CORE`.
OTHERS = (
    _other("metaclip2-vision", "MetaClip2VisionModel", "MetaClip2VisionConfig", ("pre_layrnorm", *ENCODER[1:]),
           config=CLIP_VISION, published=BELOW_VISION_MODEL),
    _other("chinese-clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig",
           ("pre_layrnorm", *ENCODER[1:]), published=BELOW_VISION_MODEL),
    _other("dinov2-backbone", "Dinov2Backbone", "Dinov2Config",
           ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
           config={"intermediate_size": None, "out_features": ["stage2", "stage4"]}, collector="encoder"),
    _other("deit", "DeiTModel", "DeiTConfig", FLAT, prefix=2),
    _other("mae", "ViTMAEModel", "ViTMAEConfig", FLAT, config={"mask_ratio": 0.0}),
    _other("mae-pretraining", "ViTMAEForPreTraining", "ViTMAEConfig", _below("vit", *FLAT),
           published=("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
           config={"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2,
                   "decoder_intermediate_size": 64, "mask_ratio": 0.25}),
    _other("msn", "ViTMSNModel", "ViTMSNConfig", FLAT),
    _other("ijepa", "IJepaModel", "IJepaConfig", FLAT, prefix=0),
    _other("beit", "BeitModel", "BeitConfig", FLAT, config={**SCALED, "use_absolute_position_embeddings": True}),
    _other("beit-relative", "BeitModel", "BeitConfig", FLAT, config={**SCALED, "use_relative_position_bias": True},
           bias="layers.{}.relative_position_bias"),
    _other("beit-shared", "BeitForImageClassification", "BeitConfig", _below("beit", *FLAT),
           config={**SCALED, "use_shared_relative_position_bias": True, "num_labels": 5},
           bias="beit.shared_position_bias"),
    _other("data2vec", "Data2VecVisionModel", "Data2VecVisionConfig",
           ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.output.dense"),
           config={**SCALED, "use_relative_position_bias": True},
           bias="encoder.layer.{}.attention.attention.relative_position_bias"),
    _other("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", ENCODER, prefix=0,
           published=BELOW_VISION_MODEL),
    _other("siglip", "SiglipModel", "SiglipConfig", _below("vision_model", *ENCODER), prefix=0,
           config={**dict.fromkeys([*VIT, *INNER]), "text_config": SIGLIP_TEXT, "vision_config": {**VIT, **INNER}}),
    _other("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", (*ENCODER[:2], "encoder.layers.{}.ffn.down_proj"),
           prefix=0, config={"mlp_bias": True}),
    _other("internvl", "InternVLVisionModel", "InternVLVisionConfig",
           ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
           config={**SCALED, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}),
    _other("blip", "BlipVisionModel", "BlipVisionConfig", ENCODER, config={"initializer_range": 0.02}),
    _other("blip2", "Blip2VisionModel", "Blip2VisionConfig", ENCODER, config={"initializer_range": 0.02}),
    _other("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig",
           _below("vision_model", "pre_layernorm", *ENCODER[1:])),
    _other("idefics3", "Idefics3VisionTransformer", "Idefics3VisionConfig", ENCODER, prefix=0,
           masked="encoder.layers.{}.self_attn"),
    _other("dinov2-registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig",
           ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"), prefix=5, inside=True,
           config={"intermediate_size": None, "num_register_tokens": 4}),
    _other("dinov3", "DINOv3ViTModel", "DINOv3ViTConfig",
           _below("model", "layer.0", "layer.3", "layer.{}.mlp.down_proj"), prefix=5, inside=True,
           config={"num_register_tokens": 4}),
    _other("dinov3-gated", "DINOv3ViTModel", "DINOv3ViTConfig",
           _below("model", "layer.0", "layer.3", "layer.{}.mlp.down_proj"), prefix=5, inside=True,
           config={"num_register_tokens": 4, "use_gated_mlp": True}),
    _other("llava", "LlavaForConditionalGeneration", "LlavaConfig",
           _below("model.vision_tower", "pre_layrnorm", *ENCODER[1:]),
           config={**dict.fromkeys([*VIT, *INNER]), **LLAVA}, published=("vision_tower.", "vision_tower.vision_model."),
           collector="model.vision_tower"),
    _other_timm("deit3", "deit3_small_patch16_224", args={"init_values": 1.0}),
    _other_timm("siglip-so400m", "vit_so400m_patch14_siglip_224", prefix=0, args={"num_classes": 0}, hidden=239),
    _other_timm("reg4", "vit_small_patch14_reg4_dinov2", prefix=5, inside=True,
                args={"num_classes": 0, "init_values": 1.0}),
    _other_timm("eva02", "eva02_tiny_patch14_224", inside=True, prefixed="blocks.{}.attn",
                args={"mlp_ratio": 4.0, "init_values": 1.0}),
    _other_timm("dinov3", "vit_small_patch16_dinov3", inside=True, prefix=5, prefixed="blocks.{}.attn",
                args={"num_classes": 0, "init_values": 1.0}),
    _other_timm("pe-core", "vit_pe_core_tiny_patch16_384", insert="norm_pre", inside=True, prefixed="blocks.{}.attn",
                args={"num_classes": 0}),
    _other_timm("beit", "beit_base_patch16_224", bias="blocks.{}.attn",
                args={**ONE_SIZE, "init_values": 1.0}),
    _other_timm("relpos", "vit_relpos_small_patch16_224", prefix=0, bias="blocks.{}.attn.rel_pos",
                args={**ONE_SIZE, "init_values": 1.0}),
    _other_open_clip("output-tokens", TOWER, tolerance=3 * EAGER_FAST_PATH, hosts=(), output_tokens=True),
    _other_open_clip("coca", TOWER, tolerance=3 * EAGER_FAST_PATH, coca=True, attentional_pool=True,
                     attn_pooler_heads=4, output_tokens=True),
    _other_open_clip("over-timm", _below("visual.trunk", TIMM[0], "blocks.5", TIMM[2]), hidden=192,
                     timm_model_name="test_vit", timm_pool="token", image_size=160,
                     hosts=("transformers", "timm", "open_clip")),
)  # fmt: skip

# --- whole models, whose tower is searched ---------------------------------------------------------------------------

LANGUAGE = {**LLAVA["text_config"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 16}
DECODER = {"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
           "cross_attention_hidden_size": WIDTH, "is_decoder": True, "add_cross_attention": True}  # fmt: skip
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
QUERIES = {**BERT, "encoder_hidden_size": WIDTH, "initializer_range": 0.2}
OPT = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
       "vocab_size": 100, "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
VISION = {**VIT, **INNER}
CLIP_TOWER = {**CLIP_VISION, "model_type": "clip_vision_model"}
SIGLIP_TOWER = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32}
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
STAGES = [f"stage{number}" for number in range(1, BLOCKS + 1)]
DINOV2_STAGES = {**VIT, "model_type": "dinov2", "layerscale_value": 1.0, "out_features": STAGES,
                 "reshape_hidden_states": False, "apply_layernorm": True}  # fmt: skip
DINOV2_TOWER = ("encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2")
NECK = {"reassemble_hidden_size": WIDTH, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "head_hidden_size": 4,
        "patch_size": PATCH}  # fmt: skip
CLIP_PATHS = ("pre_layrnorm", *ENCODER[1:])


def _whole(name: str, architecture: str, paths: tuple[str, ...], config: dict[str, Any], **options: Any) -> Pico:
    """A transformers model with a tower; its config class has its name, without what it is for."""
    config_class = options.pop("config_class", architecture.partition("For")[0] + "Config")
    build = _transformers(architecture, config_class, **config)
    return Pico(f"whole-{name}", build, *paths, any_size=False, core=False, **options)


def _with_language(tower: dict[str, Any], language: str = "llama", **config: Any) -> dict[str, Any]:
    return {"vision_config": tower, "text_config": {**LANGUAGE, "model_type": language}, **config}


IMAGE_INDEX, IMAGE_ID = {"image_token_index": 99}, {"image_token_id": 99}
RAISED = {"initializer_range": 0.02}

WHOLES = (
    _whole("llava-next", "LlavaNextForConditionalGeneration", _below("model.vision_tower", *CLIP_PATHS),
           _with_language(CLIP_TOWER, **IMAGE_INDEX, image_grid_pinpoints=PINPOINTS), collector="model.vision_tower"),
    _whole("llava-onevision", "LlavaOnevisionForConditionalGeneration", _below("model.vision_tower", *ENCODER),
           _with_language(SIGLIP_TOWER, "qwen2", **IMAGE_INDEX, video_token_index=98, image_grid_pinpoints=PINPOINTS),
           prefix=0, collector="model.vision_tower"),
    _whole("vip-llava", "VipLlavaForConditionalGeneration", _below("model.vision_tower", *CLIP_PATHS),
           _with_language(CLIP_TOWER, **IMAGE_INDEX, vision_feature_layers=[-1, -2]), collector="model.vision_tower"),
    _whole("paligemma", "PaliGemmaForConditionalGeneration", _below("model.vision_tower", *ENCODER),
           _with_language(SIGLIP_TOWER, "gemma", **IMAGE_INDEX, projection_dim=32, hidden_size=32), prefix=0),
    _whole("gemma3", "Gemma3ForConditionalGeneration", _below("model.vision_tower", *ENCODER),
           _with_language(SIGLIP_TOWER, "gemma3_text", **IMAGE_INDEX, mm_tokens_per_image=4, boi_token_index=97,
                          eoi_token_index=98), prefix=0),
    _whole("internvl", "InternVLForConditionalGeneration",
           _below("model.vision_tower", "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
           _with_language({**VISION, **SCALED, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH],
                           "model_type": "internvl_vision"}, "qwen2", **IMAGE_ID), collector="model.vision_tower"),
    _whole("blip2", "Blip2ForConditionalGeneration", _below("vision_model", *ENCODER),
           {"vision_config": {**VISION, **RAISED}, "qformer_config": QUERIES, "text_config": OPT,
            "num_query_tokens": 4, **IMAGE_INDEX}),
    _whole("blip2-retrieval", "Blip2ForImageTextRetrieval", _below("vision_model", *ENCODER),
           {"vision_config": {**VISION, **RAISED}, "qformer_config": {**QUERIES, "use_qformer_text_input": True},
            "text_config": OPT, "num_query_tokens": 4}),
    _whole("instructblip", "InstructBlipForConditionalGeneration", _below("vision_model", *ENCODER),
           {"vision_config": {**VISION, **RAISED}, "qformer_config": QUERIES, "text_config": OPT,
            "num_query_tokens": 4, **IMAGE_INDEX}),
    _whole("idefics2", "Idefics2ForConditionalGeneration", _below("model.vision_model", *ENCODER),
           _with_language(VISION, "mistral", **IMAGE_ID, perceiver_config={
               "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
               "resampler_head_dim": 16, "num_key_value_heads": 2}),
           prefix=0, masked="model.vision_model.encoder.layers.{}.self_attn"),
    _whole("smolvlm", "SmolVLMForConditionalGeneration", _below("model.vision_model", *ENCODER),
           _with_language(VISION, **IMAGE_ID, scale_factor=2), prefix=0,
           masked="model.vision_model.encoder.layers.{}.self_attn"),
    _whole("aya-vision", "AyaVisionForConditionalGeneration", _below("model.vision_tower", *ENCODER),
           _with_language(SIGLIP_TOWER, "cohere2", **IMAGE_INDEX), prefix=0, collector="model.vision_tower"),
    _whole("kosmos2", "Kosmos2ForConditionalGeneration", _below("vision_model.model", *CLIP_PATHS),
           {"vision_config": VISION, "latent_query_num": 4,
            "text_config": {"vocab_size": 99, "max_position_embeddings": 64, "embed_dim": 32, "layers": 2,
                            "ffn_dim": 64, "attention_heads": 2}}),
    _whole("git", "GitForCausalLM", _below("git.image_encoder.vision_model", *CLIP_PATHS),
           {"vision_config": VISION, **BERT}, config_class="GitConfig"),
    _whole("colpali", "ColPaliForRetrieval", _below("vlm.vision_tower", *ENCODER),
           {"vlm_config": {**_with_language(SIGLIP_TOWER, "gemma", **IMAGE_INDEX, projection_dim=32, hidden_size=32),
                           "model_type": "paligemma"}, "embedding_dim": 16}, prefix=0),
    _whole("trocr", "VisionEncoderDecoderModel", _below("encoder", *FLAT),
           {"encoder": {**VISION, "model_type": "vit"}, "decoder": {**DECODER, "model_type": "trocr"}},
           config_class="VisionEncoderDecoderConfig"),
    _whole("clipseg", "CLIPSegForImageSegmentation", _below("clip.vision_model", *CLIP_PATHS),
           {"text_config": CLIP_TEXT, "vision_config": VISION, "projection_dim": 32, "reduce_dim": 16,
            "extract_layers": [0, 1, 2], "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}),
    _whole("depth-anything", "DepthAnythingForDepthEstimation", _below("backbone", *DINOV2_TOWER),
           {"backbone_config": DINOV2_STAGES, **NECK}, collector="backbone.encoder"),
    _whole("dpt", "DPTForDepthEstimation", _below("dpt", "encoder.layer.0", "encoder.layer.3",
                                                  "encoder.layer.{}.output.dense"),
           {**VISION, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8,
            "is_hybrid": False, "use_batch_norm_in_fusion_residual": False}, collector="dpt.encoder"),
    _whole("zoedepth", "ZoeDepthForDepthEstimation", _below("backbone.beit", *FLAT),
           {"backbone_config": {**VISION, **SCALED, "model_type": "beit", "out_features": STAGES,
                                "reshape_hidden_states": False, "use_relative_position_bias": True},
            "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "bottleneck_features": 8,
            "backbone_hidden_size": WIDTH, "bin_embedding_dim": 8, "num_relative_features": 4,
            "num_attractors": [2, 1, 1, 1],
            "bin_configurations": [{"n_bins": 4, "min_depth": 0.1, "max_depth": 10.0, "name": "nyu"}]},
           bias="backbone.beit.layers.{}.relative_position_bias", collector="backbone.beit"),
    _whole("upernet", "UperNetForSemanticSegmentation", _below("backbone", *DINOV2_TOWER),
           {"backbone_config": {**DINOV2_STAGES, "reshape_hidden_states": True}, "hidden_size": 8,
            "auxiliary_in_channels": WIDTH, "num_labels": 5, "pool_scales": [1, 2]}, collector="backbone.encoder"),
    _whole("mask2former", "Mask2FormerForUniversalSegmentation",
           _below("model.pixel_level_module.encoder", *DINOV2_TOWER),
           {"backbone_config": {**DINOV2_STAGES, "reshape_hidden_states": True}, "feature_size": 16,
            "mask_feature_size": 16, "hidden_dim": 16, "num_attention_heads": 2, "encoder_layers": 1,
            "decoder_layers": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16, "num_queries": 5},
           config_class="Mask2FormerConfig", collector="model.pixel_level_module.encoder.encoder"),
    _whole("vitpose", "VitPoseForPoseEstimation",
           _below("backbone", "encoder.layer.0", "encoder.layer.3", "encoder.layer.{}.mlp.fc2"),
           {"backbone_config": {**VIT, "model_type": "vitpose_backbone", "image_size": [SIZE, 48],
                                "patch_size": [PATCH, PATCH], "out_features": ["stage4"]},
            "num_labels": 5, "use_simple_decoder": True}, prefix=0, collector="backbone.encoder"),
    _whole("timm-wrapper", "TimmWrapperForImageClassification", _below("timm_model", *TIMM),
           {"architecture": "vit_tiny_patch16_224", "num_labels": 5,
            "model_args": {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS, "img_size": SIZE,
                           "patch_size": PATCH},
            "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "mean": [0.5] * 3, "std": [0.5] * 3}},
           config_class="TimmWrapperConfig"),
    _whole("videomae", "VideoMAEForVideoClassification", _below("videomae", "encoder.layer.0", "encoder.layer.3",
                                                                "encoder.layer.{}.output.dense"),
           {**VISION, "num_frames": 4, "num_labels": 5}, prefix=0),
    _whole("vivit", "VivitForVideoClassification", _below("vivit", "encoder.layer.0", "encoder.layer.3",
                                                          "encoder.layer.{}.output.dense"),
           {**VISION, "num_frames": 4, "tubelet_size": [2, PATCH, PATCH], "num_labels": 5}),
)  # fmt: skip

PICOS = (*CORE, *OTHERS)


def by_id(name: str) -> Pico:
    return next(pico for pico in (*PICOS, *WHOLES) if pico.id == name)

"""What regsurgery knows about model families: data.

The surgery finds its sites in the graph and does not need this matrix; a family that is not listed is tried anyway.
The tests check every cell of the rows here. To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from regsurgery.formats import PROGRAMS
from regsurgery.modes import Mode


@dataclass(frozen=True)
class Family:
    """One row of the support matrix.

    Attributes:
        name: the family, as users call it.
        library: the library whose checkpoints it covers.
        members: transformers architectures, timm entry points, or open_clip `model class/tower class`; patterns.
        native: libraries whose stock model can hold the weights of native mode.
        any_size: whether the model takes other image sizes than the one it was made for.
        placement: where registers go, see `Sites.placement`.
    """

    name: str
    library: str
    members: tuple[str, ...]
    native: tuple[str, ...] = ()
    any_size: bool = True
    placement: str = "end"

    def formats(self, mode: Mode) -> tuple[str, ...]:
        """What `--format` can be in `mode`."""
        return (*(self.native if mode.stock else (self.library,)), *PROGRAMS)


@dataclass(frozen=True)
class Refused:
    """Models that are refused, and why."""

    name: str
    reason: str


TIMM_FIRST, HF_FIRST = ("timm", "transformers"), ("transformers", "timm")

# A checkpoint belongs to the first row that has its architecture.
FAMILIES = (
    Family("ViT, DeiT", "transformers",
           ("ViTModel", "ViTForImageClassification", "DeiTModel"), HF_FIRST),
    Family("ViT-MAE", "transformers", ("ViTMAEModel", "ViTMAEForPreTraining")),
    Family("ViT-MSN, I-JEPA", "transformers", ("ViTMSNModel", "IJepaModel")),
    Family("DINOv2", "transformers", ("Dinov2Model",), HF_FIRST),
    Family("DINOv2 classifier", "transformers", ("Dinov2ForImageClassification",), ("transformers",)),
    Family("DINOv2 backbone", "transformers", ("Dinov2Backbone",)),
    Family("DINOv2 with registers", "transformers", ("Dinov2WithRegistersModel",), placement="prefix"),
    Family("DINOv3", "transformers", ("DINOv3ViTModel",), placement="prefix"),
    Family("CLIP", "transformers", ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"), ("timm",)),
    Family("MetaCLIP 2, OWL-ViT", "transformers", ("MetaClip2VisionModel", "OwlViTVisionModel")),
    Family("Chinese-CLIP vision", "transformers", ("ChineseCLIPVisionModel",)),
    Family("SigLIP", "transformers", ("SiglipVisionModel", "SiglipModel")),
    Family("AIMv2", "transformers", ("Aimv2VisionModel",), any_size=False),
    Family("BEiT, Data2Vec", "transformers", ("BeitModel", "BeitForImageClassification", "Data2VecVisionModel")),
    Family("InternVL vision", "transformers", ("InternVLVisionModel",)),
    Family("BLIP, BLIP-2 vision", "transformers", ("BlipVisionModel", "Blip2VisionModel")),
    Family("Idefics 3 vision", "transformers", ("Idefics3VisionTransformer",)),
    Family("LLaVA, whole", "transformers", ("LlavaForConditionalGeneration",)),
    Family("DINOv2 with registers", "timm", ("vit_*_reg*_dinov2",), TIMM_FIRST, placement="prefix"),
    Family("DINOv2", "timm", ("vit_*_dinov2",), TIMM_FIRST),
    Family("DINOv3, PE core, EVA-02", "timm", ("vit_*_dinov3*", "vit_pe_*", "eva02_*"), placement="prefix"),
    Family("CLIP", "timm", ("vit_*_clip_*",), ("timm",)),
    Family("SigLIP", "timm", ("vit_*_siglip*",), ("timm",)),
    Family("ViT with relative positions", "timm", ("vit_relpos_*",), any_size=False),
    Family("DeiT-III", "timm", ("deit3_*",), TIMM_FIRST),
    Family("ViT", "timm", ("vit_*_patch*",), TIMM_FIRST),
    Family("BEiT", "timm", ("beit_*",), any_size=False),
    Family("CLIP", "open_clip", ("CLIP/VisionTransformer", "CustomTextCLIP/VisionTransformer"), ("open_clip", "timm")),
    Family("CoCa", "open_clip", ("CoCa/VisionTransformer",)),
    Family("over a timm tower", "open_clip", ("*/TimmModel",), ("open_clip", "timm"), any_size=False),
)  # fmt: skip

REFUSED = (
    Refused("Swin, Hiera, SAM", "hierarchical or windowed: there is no single stream of tokens to add a register to"),
    Refused("ConvNeXt, ResNet", "convolutional: no residual stream of tokens"),
    Refused(
        "Pixtral, Qwen2.5-VL vision, SigLIP 2 with any aspect", "images of a batch are packed or resized one by one"
    ),
    Refused("text models", "no images go in"),
    Refused("8-bit and 4-bit checkpoints", "patch the checkpoint that was quantised, then quantise again"),
)


def family_of(library: str, architecture: str) -> Family | None:
    """The row that has an architecture, or None: the model is tried anyway."""
    for family in FAMILIES:
        if family.library == library and any(fnmatch(architecture, member) for member in family.members):
            return family
    return None


# transformers: a model whose config has this key has a text tower and needs example inputs other than pixel_values.
TEXT_CONFIG_KEY = "text_config"

# transformers, of whole models: the config keys of the hidden state of their tower that a language model reads.
FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")

# transformers, by model type: an input with one number per patch that decides which patches are hidden; it is random
# unless given.
NOISE_INPUTS = {"vit_mae": "noise"}

# transformers: inputs of models that cannot be traced to a graph over a batch of images, and why.
PACKED_INPUTS = {
    "image_grid_thw": "it packs the patches of all images into one sequence and cuts windows out of their grids",
    "spatial_shapes": "it takes patches of images of any aspect and resizes its position embedding for each image",
}

# Where libraries say how many register tokens a model was trained with.
REGISTER_KEYS = ("num_register_tokens", "num_reg_tokens", "reg_tokens", "reg_token")

# Outputs from which verification takes the figure "output" (first match wins), and those that are logits over classes.
LOGIT_OUTPUTS = ("logits",)
MAIN_OUTPUTS = ("logits", "image_embeds", "image_features", "pooler_output", "output", "last_hidden_state")

"""What regsurgery knows about model families: data, no code.

The surgery itself finds its sites in the graph and needs none of this; a family that is not listed is tried all the
same. Listed families are the ones that the tests hold to the parity gate. Adding one: CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One row of the support matrix.

    Attributes:
        name: the family, as users call it.
        library: the library whose checkpoints it covers.
        members: transformers architectures, timm entry points or open_clip tower classes.
        any_size: whether the model takes other image sizes than the one it was made for.
    """

    name: str
    library: str
    members: tuple[str, ...]
    any_size: bool


FAMILIES = (
    Family("ViT", "transformers", ("ViTModel", "ViTForImageClassification"), True),
    Family("DINOv2", "transformers", ("Dinov2Model", "Dinov2ForImageClassification"), True),
    Family("CLIP", "transformers", ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"), True),
    Family("ViT", "timm", ("vit_*_patch*",), True),
    Family("DINOv2", "timm", ("vit_*_patch14_dinov2", "vit_giant_patch14_dinov2"), True),
    Family("CLIP", "timm", ("vit_*_patch*_clip_*",), True),
    Family("CLIP", "open_clip", ("VisionTransformer",), False),
)

# transformers: the example inputs a model needs beside pixel_values, by the config key that says it has a text tower.
TEXT_CONFIG_KEY = "text_config"

# transformers: where the vision tower of a model lies that torch.export cannot trace whole, and the config key of the
# hidden state that its language model reads.
ENTRIES = {"LlavaForConditionalGeneration": ("model.vision_tower", "vision_feature_layer")}

# transformers, by model type: an input that is drawn at random unless it is given, one number a patch; it says which
# patches are hidden.
NOISE_INPUTS = {"vit_mae": "noise"}

# transformers: inputs of models that no graph with a batch of images can be made of, and why.
PACKED_INPUTS = {
    "image_grid_thw": "it packs the patches of all images into one sequence and cuts windows out of their grids",
    "spatial_shapes": "it takes patches of images of any aspect and resizes its position embedding image by image",
}

# Where libraries say how many register tokens a model was trained with.
REGISTER_KEYS = ("num_register_tokens", "num_reg_tokens", "reg_tokens", "reg_token")

# Outputs from which verification takes the figure "output" (first match wins), and those that are logits over classes.
LOGIT_OUTPUTS = ("logits",)
MAIN_OUTPUTS = ("logits", "image_embeds", "image_features", "pooler_output", "output", "last_hidden_state")

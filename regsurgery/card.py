"""The model card of a patched folder."""

from __future__ import annotations

from regsurgery.surgery import Surgery
from regsurgery.verify import Verdict

TEMPLATE = """\
---
library_name: {{ library }}
tags: [regsurgery, test-time-registers, vision-transformer]
---
# {{ source.id }}, patched by regsurgery

A few patch tokens of this Vision Transformer had enormous norms (outlier tokens), caused by {{ num_neurons }} MLP unit(s)
(register neurons). This checkpoint gives the model {{ num_registers }} register token(s) and moves the activation of
those neurons onto {{ "it" if num_registers == 1 else "them" }}, at test time, without training
([Jiang et al., 2025](https://arxiv.org/abs/2506.08010)). All original tensors are unchanged.

```python
{{ snippet -}}
```
{% if format == "transformers" %}
Without `trust_remote_code=True` the original, unpatched model is loaded.
{% endif %}
| after block {{ verdict.block }}, {{ verdict.images }} | original | patched |
|---|---|---|
| outlier tokens per image | {{ "%.2f"|format(verdict.outliers_per_image.original) }} | {{ "%.2f"|format(verdict.outliers_per_image.patched) }} |
| largest patch norm, mean over images | {{ "%.1f"|format(verdict.max_patch_norm.original) }} | {{ "%.1f"|format(verdict.max_patch_norm.patched) }} |
| median patch norm | {{ "%.1f"|format(verdict.median_patch_norm.original) }} | {{ "%.1f"|format(verdict.median_patch_norm.patched) }} |

What it cost: cosine {{ "%.4f"|format(verdict.cosine_output) }} of `{{ verdict.output }}` to the original, \
{{ "%.4f"|format(verdict.cosine_patches) }} of the patches that were no outliers\
{% if verdict.kl is not none %}; KL divergence {{ "%.4f"|format(verdict.kl) }}, same first class on \
{{ "%.1f"|format(100 * verdict.same_argmax) }} % of the images{% endif %}. An outlier is a patch above 5 times the median \
norm of its image.

| block | register neurons |
|---|---|
{% for block, neurons in recipe.register_neurons.items() -%}
| {{ block }} | {{ neurons | join(", ") }} |
{% endfor %}
Outputs have the shapes of the original: registers are stripped at every exit. Attention maps are stripped too, so that
their rows sum to less than 1.

Source: `{{ source.id }}`{% if source.revision %}, revision `{{ source.revision }}`{% endif %}, weights sha256 \
`{{ source.sha256 }}`. To repeat the surgery: `regsurgery patch {{ source.id }} --recipe recipe.yaml{{ format_flag }}` \
(regsurgery {{ version }}).
"""


def model_card(surgery: Surgery, fmt: str, verdict: Verdict, snippet: str) -> str:
    """Markdown with what was done, to what, with which measured figures, and how to load and repeat it."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(
        library={"pt2": "pytorch"}.get(fmt, fmt),
        source=surgery.loaded.source,
        num_neurons=surgery.recipe.num_neurons,
        num_registers=surgery.recipe.num_registers,
        recipe=surgery.recipe,
        snippet=snippet,
        format=fmt,
        format_flag="" if fmt == surgery.loaded.library else f" --format {fmt}",
        verdict=verdict,
        version=surgery.config_block["version"],
    )

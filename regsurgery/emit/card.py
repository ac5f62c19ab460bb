"""The model card of a patched folder: metadata that the Hub reads, and what people need to know before they use it.

Names, licences, provenance and whatever else is not ours goes through `regsurgery.plain`, so that none of it acts as
Markdown or HTML: the template's texts are escaped unless they are marked as code or program.

Everything in it comes from the surgery, the verdict and the source's own card; the same input gives the same text.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regsurgery.backends.formats import backend
from regsurgery.compiler.surgery import Surgery
from regsurgery.emit.source_card import SourceCard, read_source_card
from regsurgery.formats import LIBRARIES
from regsurgery.plain import code, line, markdown, plural
from regsurgery.verification.size_drift import SizeDrifts
from regsurgery.verification.verdict import MIN_IMAGES_FOR_PERCENT, Verdict
from regsurgery.verification.verdict_text import counted, ends, remarks, rows, sentence, share_text, title

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

MAX_NAME = 60  # characters of a source's name in the path of the snippets
LIBRARY_NAMES = {"pt2": "pytorch", "dinov2": "pytorch"}  # the Hub's names that differ from ours
TAGS = ("regsurgery", "test-time-registers", "register-tokens", "vision-transformer")
# Of the Hub's relations (adapter, merge, quantized, finetune), only this one is true: the folder holds a whole model,
# so it is not an adapter; from one source, so not a merge; in the source's dtype, so not quantised. In native mode
# weights were fitted; in the others there are new parameters, which can be fine-tuned.
RELATION = "finetune"
LOADER = """\
import regsurgery

model = regsurgery.load("{folder}")
"""


@dataclass(frozen=True)
class Neuron:
    """A row of the neuron table: what the recipe's provenance records about it, as text; "" if nothing."""

    block: int
    index: int
    contribution: str
    activation: str


def model_card(
    surgery: Surgery,
    fmt: str,
    verdict: Verdict | None,
    run: dict[str, Any],
    picture: str | None = None,
    sizes: SizeDrifts | None = None,
) -> str:
    """The text of `README.md`: what was done, to which model, with which figures, and how to load and repeat it.

    Args:
        run: the run record's `run`.
        picture: name of the picture next to the card, if there is one.
        sizes: the drift at several image sizes, if it was measured.
    """
    from huggingface_hub import ModelCard

    loaded, plan = surgery.loaded, surgery.plan
    source_card = read_source_card(loaded.folder)
    data = _metadata(surgery, fmt, verdict, run, source_card)
    here = path_in_card(loaded.source.name)
    snippets = (
        *backend(fmt, surgery.recipe.kind).snippets(surgery, here),
        ("regsurgery, whatever the format", LOADER.format(folder=here)),
    )
    num_tokens, neurons = surgery.sites.num_tokens, _neurons(surgery)
    body = _template().render(
        name=loaded.source.name,
        source=loaded.source,
        source_card=source_card,
        mode=surgery.recipe.mode,
        format=fmt,
        num_neurons=surgery.recipe.num_neurons,
        num_registers=plan.num_registers,
        num_constants=len(plan.constant_blocks),
        num_tokens=num_tokens,
        token_share=plan.num_registers / num_tokens,
        num_added=_num_added(surgery),
        num_parameters=sum(value.numel() for value in loaded.model.parameters()),
        image_size=surgery.traced.image_size,
        fit=surgery.config_block.get("fit"),
        here=here,
        snippets=snippets,
        neurons=neurons,
        has_contributions=any(neuron.contribution for neuron in neurons),
        has_activations=any(neuron.activation for neuron in neurons),
        found_by=_text(surgery.recipe.provenance.get("found_by")),
        positional=_positional(surgery, verdict),
        verdict=verdict,
        figures=None if verdict is None else _figures(verdict),
        changes=surgery.recipe.changes_since_found(),
        settings=_settings(surgery),
        judged_on=_text(surgery.recipe.provenance.get("judged_on")),
        sizes=sizes,
        grows=surgery.config_block.get("num_patches") is not None and fmt in LIBRARIES,
        generated=run["images"] is None,
        picture=picture,
        version=surgery.config_block["version"],
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}", ignore_metadata_errors=False))


def path_in_card(name: str) -> str:
    """What stands in a card for the path of the folder: the card's bytes do not depend on the folder's own name.

    Args:
        name: the source's, which may hold anything; what is left can stand in a string of Python and on a command line.
    """
    kept = re.sub(r"[^A-Za-z0-9._]+", "-", name.rpartition("/")[2]).strip("-.")[:MAX_NAME].rstrip("-.")
    return f"{kept or 'model'}-patched"


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(  # nosec B701 # Markdown, escaped by `finalize`
        loader=jinja2.PackageLoader("regsurgery"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_escaped,
    )
    environment.filters |= {"code": lambda text: _Markdown(code(text)), "program": _Markdown, "plural": plural}
    return environment.get_template("card.md.j2")


class _Markdown(str):
    """Text that is Markdown already."""


def _escaped(value: Any) -> Any:
    """What an expression of the template becomes."""
    return markdown(value) if isinstance(value, str) and not isinstance(value, _Markdown) else value


def _figures(verdict: Verdict) -> dict[str, Any]:
    """The verdict as text."""
    kl_ends = ends(verdict, "kl", 3) if verdict.kl is not None else ""
    return {
        "title": title(verdict),
        "rows": rows(verdict),
        "sentence": sentence(verdict),
        "remarks": remarks(verdict),
        "counted": counted(verdict),
        "cosine_output": ends(verdict, "cosine_output", 4),
        "cosine_patches": ends(verdict, "cosine_patches", 4),
        "kl": kl_ends,
        "same": None if verdict.num_same is None else share_text(verdict.num_same, verdict.num_images),
    }


def _metadata(
    surgery: Surgery, fmt: str, verdict: Verdict | None, run: dict[str, Any], source_card: SourceCard
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    repo = surgery.loaded.source.repo
    tags = dict.fromkeys([*TAGS, *source_card.lists.get("tags", [])])
    own = {} if surgery.traced.classes is None else {"pipeline_tag": "image-classification"}
    texts: dict[str, Any] = {**own, **source_card.texts}
    derived: dict[str, Any] = {} if repo is None else {"base_model": repo, "base_model_relation": RELATION}
    return ModelCardData(
        library_name=LIBRARY_NAMES.get(fmt, fmt),
        language=source_card.lists.get("language"),
        datasets=source_card.lists.get("datasets"),
        tags=list(tags),
        model_name=line(f"{surgery.loaded.source.name}, {surgery.recipe.kind.title}"),
        eval_results=None if verdict is None or not verdict.is_judged else _results(verdict),
        **derived,
        **texts,
    )


def _results(verdict: Verdict) -> list[EvalResult]:
    """The verdict as the Hub's `model-index`: the remaining outliers, and how close the output is to the original's.

    A share of fewer than `MIN_IMAGES_FOR_PERCENT` images is left out: the Hub would show it without the count.
    """
    from huggingface_hub import EvalResult

    seen = f", {counted(verdict)}"
    many = verdict.num_images >= MIN_IMAGES_FOR_PERCENT
    metrics = {
        "outlier_tokens_per_image": ("outlier tokens per image, patched", verdict.outliers_per_image.patched),
        "outlier_tokens_per_image_original": (
            "outlier tokens per image, original",
            verdict.outliers_per_image.original,
        ),
        "cosine_to_original": (f"cosine of {verdict.output} to the original's", verdict.cosine_output),
        "kl_to_original": ("KL divergence to the original, nats", verdict.kl),
        "same_first_class": (
            "share of images with the original's first class",
            verdict.same_argmax if many else None,
        ),
    }
    return [
        EvalResult(
            task_type="image-feature-extraction" if verdict.kl is None else "image-classification",
            dataset_type="generated" if verdict.evidence == "generated" else "imagefolder",
            dataset_name=line(verdict.images),
            metric_type=kind,
            metric_name=line(name + seen),
            metric_value=float(f"{value:.6g}"),
        )
        for kind, (name, value) in metrics.items()
        if value is not None
    ]


def _num_added(surgery: Surgery) -> int:
    """Parameters that the patched model has beyond the original's."""
    if surgery.plan.num_added == 0:
        return 0
    return surgery.graph_module.get_parameter(surgery.added_name).numel()


def _positional(surgery: Surgery, verdict: Verdict | None) -> bool | None:
    """Whether the outliers sit at the same places in every image: measured here, or when the neurons were found."""
    if verdict is not None and verdict.positional is not None:
        return verdict.positional
    found = surgery.recipe.provenance.get("positional")
    return found if isinstance(found, bool) else None


def _neurons(surgery: Surgery) -> list[Neuron]:
    """The neuron table; a recipe's provenance may hold anything, so what is not a candidate is skipped."""
    candidates = surgery.recipe.provenance.get("candidates")
    known: dict[tuple[Any, Any], dict[str, Any]] = {
        (entry.get("block"), entry.get("index")): entry
        for entry in (candidates if isinstance(candidates, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("block"), int) and isinstance(entry.get("index"), int)
    }
    rows = []
    for block, indices in surgery.recipe.register_neurons.items():
        for index in indices:
            entry = known.get((block, index), {})
            rows.append(Neuron(block, index, _number(entry.get("contribution")), _number(entry.get("mean_activation"))))
    return rows


def _settings(surgery: Surgery) -> list[dict[str, Any]]:
    """The paper's setting and the chosen one, from the table that `find` chose from."""
    rows = []
    for row in surgery.recipe.table():
        if row["paper"] or row["chosen"]:
            whose = "the paper's (smallest set, one register)" if row["paper"] else "chosen"
            both = row["paper"] and row["chosen"]
            words = "the paper's, which was chosen" if both else whose
            rows.append({**row, "words": words, "kl": row.get("kl")})
    return sorted(rows, key=lambda row: row["chosen"])


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def _text(value: Any) -> str:
    return " ".join(value.split())[:300] if isinstance(value, str) else ""

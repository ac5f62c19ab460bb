"""What each difference between regsurgery and the authors' code does, on a timm ViT and photos, by plain hooks.

    python -m benchmarks.differences MODEL --search calibration --photos labelled

MODEL is a folder that timm saved. Neurons are found on the first photos, everything else is measured on the second.
Nothing of regsurgery's surgery or search is used: the network runs as timm has it, with hooks that do what each row
says. `benchmarks/differences.json` has what it printed last; docs/differences.md has the table.

Outliers: patches above 5 times the median norm of their image, after the last block but one. KL divergence from the
original's classes to the row's, mean over the photos; same: share of photos whose first class stays.

Shape suffixes: B images, T tokens, N patches, H hidden units, C classes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from regsurgery.frontends.load import load
from regsurgery.images.image_set import ImageSet, image_set
from regsurgery.recipe import by_blocks

BATCH = 8
TOP_KS = (1, 2, 10, 50)
Neurons = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Way:
    """How neurons are shifted onto one register at the end.

    Attributes:
        shared: one extreme for all neurons of a block; else one each.
        clears_cls: the class token is cleared as well, as in the paper's Algorithm 2.
        only_first: only the first image of a batch is changed; the others get a register that nothing writes to.
    """

    shared: bool = False
    clears_cls: bool = False
    only_first: bool = False


def signed(values: Tensor, dim: int) -> Tensor:
    """The value of the largest magnitude, with its sign; the dimension stays."""
    return values.gather(dim, values.abs().argmax(dim=dim, keepdim=True))


class Network:
    """A timm ViT with one class token."""

    def __init__(self, folder: str) -> None:
        self.model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        self.depth = len(self.model.blocks)
        self.preprocess = load(folder).preprocess

    def batches(self, images: ImageSet, size: int = BATCH) -> list[Tensor]:
        return list(images.batches(size, self.preprocess))

    @torch.no_grad()
    def seen(self, pixels: Tensor, top: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, patch norms after the last block but one `[B, N]`, and the hidden activations `[B, T, H]` up to block
        `top`.
        """
        norms: list[Tensor] = []
        hidden: list[Tensor] = []

        def keep_norms(module: nn.Module, args: Any, output: Tensor) -> None:
            norms.append(output[:, 1 : 1 + self.model.patch_embed.num_patches].norm(dim=-1))

        def keep(module: nn.Module, args: Any) -> None:
            hidden.append(args[0])

        with ExitStack() as hooks:
            hooks.enter_context(self.model.blocks[-2].register_forward_hook(keep_norms))
            for block in self.model.blocks[: top + 1]:
                hooks.enter_context(block.mlp.fc2.register_forward_pre_hook(keep))
            logits = self.model(pixels)
        return logits, norms[0], hidden

    def shifted(self, pixels: Tensor, neurons: Mapping[int, Sequence[int]], way: Way) -> tuple[Tensor, Tensor]:
        """Logits and patch norms with `neurons` shifted."""

        def append(module: nn.Module, args: Any) -> Any:
            return torch.cat([args[0], torch.zeros_like(args[0][:, :1])], dim=1), *args[1:]

        def strip(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output[:, :-1]

        with ExitStack() as hooks:
            hooks.enter_context(self.model.blocks[0].register_forward_pre_hook(append))
            hooks.enter_context(self.model.blocks[-1].register_forward_hook(strip))
            for block, listed in neurons.items():

                def shift(module: nn.Module, args: Any, listed: Sequence[int] = listed) -> Any:
                    hidden_BTH = args[0].clone()
                    values_BTK = hidden_BTH[..., listed]
                    peak_B1K = signed(values_BTK, 1)
                    if way.shared:
                        peak_B1K = signed(peak_B1K, 2).expand_as(peak_B1K)
                    moved_BTK = torch.zeros_like(values_BTK)
                    moved_BTK[:, -1:] = peak_B1K
                    if not way.clears_cls:
                        moved_BTK[:, :1] = values_BTK[:, :1]
                    changed = slice(0, 1) if way.only_first else slice(None)
                    hidden_BTH[changed, :, listed] = moved_BTK[changed]
                    return hidden_BTH, *args[1:]

                hooks.enter_context(self.model.blocks[block].mlp.fc2.register_forward_pre_hook(shift))
            logits, norms_BN, _ = self.seen(pixels, -1)
        return logits, norms_BN


def misplaced(network: Network, batches: Sequence[Tensor], neurons: Neurons) -> float:
    """Mean cosine of what their code returns as a patch to that patch: the register stands at the end, and patches are
    sliced as if it came after CLS, so that the first is lost, each is one place off, and the register is the last.
    """
    kept: list[Tensor] = []
    cosines = []
    for pixels in batches:
        hook = network.model.blocks[-1].register_forward_hook(lambda module, args, output: kept.append(output))
        network.shifted(pixels, by_blocks(neurons), Way(shared=True))  # its own hook, which strips, comes second
        hook.remove()
        features_BTD = network.model.norm(kept.pop()).detach()
        cosines.append(torch.cosine_similarity(features_BTD[:, 1:-1], features_BTD[:, 2:], dim=-1).mean(dim=1))
    return round(float(torch.cat(cosines).mean()), 4)


@dataclass(frozen=True)
class Found:
    """Outliers per image by each threshold, and the neurons ranked by each score, best first."""

    outliers: Mapping[str, float]
    ranked: Mapping[str, Neurons]


def find(network: Network, batches: Sequence[Tensor], top: int) -> Found:
    """By the paper's threshold and score (mean |activation| at outliers), and by ours."""
    norms_BN = torch.cat([network.seen(pixels, -1)[1] for pixels in batches])
    paper = norms_BN > norms_BN.mean() + 3 * norms_BN.std()
    median_B1 = norms_BN.median(dim=1, keepdim=True).values
    spread_B1 = 1.4826 * (norms_BN - median_B1).abs().median(dim=1, keepdim=True).values
    ours = norms_BN > torch.maximum(median_B1 + 10 * spread_B1, 3 * median_B1)
    there: dict[str, list[Any]] = {"paper": [0.0] * (top + 1), "ours": [0.0] * (top + 1)}
    columns = [network.model.blocks[block].mlp.fc2.weight.detach().norm(dim=0) for block in range(top + 1)]
    seen, elsewhere = 0, [torch.zeros(())] * (top + 1)
    for pixels in batches:
        hidden = network.seen(pixels, top)[2]
        for block, hidden_BTH in enumerate(hidden):
            activation_BNH = hidden_BTH[:, 1:].abs()
            part = slice(seen, seen + len(pixels))
            for image_NH, is_outlier_N in zip(activation_BNH, paper[part], strict=True):
                if is_outlier_N.any():  # one image after another, as in their code
                    there["paper"][block] = there["paper"][block] + image_NH[is_outlier_N].mean(dim=0)
            there["ours"][block] = there["ours"][block] + activation_BNH[ours[part]].sum(dim=0)
            elsewhere[block] = elsewhere[block] + activation_BNH[~ours[part]].sum(dim=0)
        seen += len(pixels)
    ranked = {
        "paper": [total / int(paper.any(dim=1).sum()) for total in there["paper"]],
        "ours": [
            (total / int(ours.sum()) - other / int((~ours).sum())) * column
            for total, other, column in zip(there["ours"], elsewhere, columns, strict=True)
        ],
    }
    return Found(
        {name: float(mask.sum(dim=1).double().mean()) for name, mask in (("paper", paper), ("ours", ours))},
        {name: _best(scores) for name, scores in ranked.items()},
    )


def _best(scores: Sequence[Any], most: int = max(TOP_KS)) -> Neurons:
    listed = [
        (float(value), block, int(neuron))
        for block, of_block in enumerate(scores)
        for value, neuron in zip(*of_block.topk(most), strict=True)
    ]
    return [(block, neuron) for _, block, neuron in sorted(listed, reverse=True)[:most]]


@dataclass(frozen=True)
class Row:
    """What is measured: neurons, and how they are shifted."""

    name: str
    neurons: Neurons
    way: Way

    def measured(self, network: Network, batches: Sequence[Tensor], originals: Sequence[Tensor]) -> dict[str, float]:
        """Outliers per image, KL divergence to the original's log probabilities `[B, C]`, share of equal classes."""
        figures: dict[str, list[Tensor]] = {"outliers": [], "kl": [], "same": []}
        for pixels, original_BC in zip(batches, originals, strict=True):
            logits, norms_BN = network.shifted(pixels, by_blocks(self.neurons), self.way)
            patched_BC = logits.double().log_softmax(dim=-1)
            figures["outliers"].append((norms_BN > 5 * norms_BN.median(dim=1, keepdim=True).values).sum(dim=1))
            figures["kl"].append((original_BC.exp() * (original_BC - patched_BC)).sum(dim=-1))
            figures["same"].append(original_BC.argmax(dim=-1) == patched_BC.argmax(dim=-1))
        return {name: round(float(torch.cat(values).double().mean()), 5) for name, values in figures.items()}


def rows_of(found: Found) -> list[Row]:
    """The rows of the table: the paper's ranking with each difference, then ours."""
    rows = []
    for count in TOP_KS:
        theirs = found.ranked["paper"][:count]
        rows += [
            Row(f"top_k {count}: one shared extreme (their code)", theirs, Way(shared=True)),
            Row(f"top_k {count}: one extreme each", theirs, Way()),
            Row(f"top_k {count}: one extreme each, CLS cleared", theirs, Way(clears_cls=True)),
        ]
    first = Way(shared=True, only_first=True)
    rows.append(Row(f"top_k 2: their code in batches of {BATCH}", found.ranked["paper"][:2], first))
    return rows + [
        Row(f"the {count} best by contribution: one extreme each", found.ranked["ours"][:count], Way())
        for count in TOP_KS[1:]
    ]


def differences(network: Network, search: ImageSet, photos: ImageSet, top: int) -> dict[str, Any]:
    """All figures."""
    found = find(network, network.batches(search), top)
    batches = network.batches(photos)
    originals = [network.seen(pixels, -1)[0].double().log_softmax(dim=-1) for pixels in batches]
    rows = {}
    for row in rows_of(found):
        rows[row.name] = row.measured(network, batches, originals)
        print(f"{row.name}: {rows[row.name]}", flush=True)
    first = {name: [f"{block}:{neuron}" for block, neuron in neurons[:5]] for name, neurons in found.ranked.items()}
    common = {count: len({*found.ranked["paper"][:count]} & {*found.ranked["ours"][:count]}) for count in TOP_KS}
    return {
        "outliers_per_image": found.outliers,
        "first_neurons": first,
        "in_both_rankings": common,
        "top_layer": top,
        "cosine_of_misplaced_patches": misplaced(network, batches, found.ranked["paper"][:2]),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--search", required=True, help="photos to find neurons on")
    parser.add_argument("--photos", required=True, help="others, to measure on")
    parser.add_argument("--num-images", type=int, help="at most so many of each")
    parser.add_argument(
        "--top-layer", type=int, default=7, help="the block where outliers emerge (default: 7, a ViT-Ti's)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("differences.json"))
    args = parser.parse_args()
    search, photos = (image_set(where, args.num_images) for where in (args.search, args.photos))
    found = differences(Network(args.model), search, photos, args.top_layer)
    images = {"search": search.note, "photos": photos.note}
    print({name: value for name, value in found.items() if name != "rows"})
    args.output.write_text(json.dumps({**images, **found}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()

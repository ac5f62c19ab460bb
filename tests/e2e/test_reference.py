"""`--compat reference` against the published algorithms, written again with plain hooks, one image at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regsurgery.compiler.located import Located
from regsurgery.compiler.surgery import perform
from regsurgery.compiler.trace import tensor_inputs
from regsurgery.errors import UserError
from regsurgery.frontends.load import load
from regsurgery.images.image_set import ImageSet, image_set
from regsurgery.models import locate
from regsurgery.options import SearchOptions
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe, by_blocks, read_recipe
from regsurgery.search.drift import DriftTrials, Setting
from regsurgery.search.reference import rank, sweep
from tests.commands import Done
from tests.conftest import Planted, shared
from tests.picos import Pico, by_id

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Published:
    """The authors' method on a network of theirs or anybody's: module paths, `{}` is the block; CLS comes first.

    Shared with the code that is tested: nothing.
    """

    model: nn.Module
    block: str
    down: str
    depth: int

    def at(self, path: str, block: int) -> nn.Module:
        return self.model.get_submodule(path.format(block))

    @torch.no_grad()
    def logits(self, image: Tensor) -> Tensor:
        output = self.model(image[None])
        return getattr(output, "logits", output)[0]

    @contextmanager
    def seen(self) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
        """What every block puts out, and what every down projection takes: `[tokens, width]` of the image that runs."""
        streams: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        hooks = []
        for number in range(self.depth):

            def keep(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                streams[number] = (output[0] if isinstance(output, tuple) else output)[0]

            def keep_hidden(module: nn.Module, args: Any, number: int = number) -> None:
                hidden[number] = args[0][0]

            hooks.append(self.at(self.block, number).register_forward_hook(keep))
            hooks.append(self.at(self.down, number).register_forward_pre_hook(keep_hidden))
        yield streams, hidden
        for hook in hooks:
            hook.remove()

    def scores(self, images: Sequence[Tensor], detect: int, top: int) -> tuple[float, list[tuple[float, int, int]]]:
        """Algorithm 1: the threshold, mean + 3 std; and (score, block, neuron), best first."""
        with self.seen() as (streams, hidden):
            norms = []
            for image in images:
                self.logits(image)
                norms.append(streams[detect][1:].norm(dim=1))
            threshold = float(torch.cat(norms).mean() + 3 * torch.cat(norms).std())
            totals: dict[int, Any] = dict.fromkeys(range(top + 1), 0)
            counted = 0
            for image in images:
                self.logits(image)
                places = [
                    token for token in range(1, len(streams[detect])) if streams[detect][token].norm() > threshold
                ]
                for block in totals if places else ():
                    totals[block] = totals[block] + hidden[block][places].abs().mean(dim=0)
                counted += bool(places)
        listed = [
            (score / counted, block, neuron)
            for block, total in totals.items()
            for neuron, score in enumerate(total.tolist())
        ]
        return threshold, sorted(listed, reverse=True)

    @torch.no_grad()
    def shifted(self, image: Tensor, neurons: Mapping[int, Sequence[int]]) -> Tensor:
        """The logits with a register at the end: for each block, the extreme of all its neurons together goes there."""

        def append(module: nn.Module, args: Any) -> Any:
            return torch.cat([args[0], torch.zeros_like(args[0][:, :1])], dim=1), *args[1:]

        def strip(module: nn.Module, args: Any, output: Any) -> Any:
            return (output[0][:, :-1], *output[1:]) if isinstance(output, tuple) else output[:, :-1]

        hooks = [
            self.at(self.block, 0).register_forward_pre_hook(append),
            self.at(self.block, self.depth - 1).register_forward_hook(strip),
        ]
        for block, listed in neurons.items():

            def shift(module: nn.Module, args: Any, listed: Sequence[int] = listed) -> Any:
                hidden = args[0].clone()
                values = [value for neuron in listed for value in hidden[0, :, neuron].tolist()]
                for neuron in listed:
                    hidden[0, 1:-1, neuron] = 0
                    hidden[0, -1, neuron] = max(values, key=abs)
                return hidden, *args[1:]

            hooks.append(self.at(self.down, block).register_forward_pre_hook(shift))
        logits = self.logits(image)
        for hook in hooks:
            hook.remove()
        return logits


@dataclass(frozen=True)
class Case:
    located: Located
    images: ImageSet
    published: Published
    emergence: int
    top_k: int


@pytest.fixture(scope="module", params=["planted", pytest.param("real", marks=pytest.mark.real)])
def case(request: pytest.FixtureRequest, planted_picos: Callable[[Pico], Planted]) -> Case:
    if request.param == "real":
        located = locate(load(str(shared("models", "vit-tiny-timm"))), Progress())
        images = image_set(shared("images", "calibration"), 6)
        model = load(str(shared("models", "vit-tiny-timm"))).model
        return Case(located, images, Published(model, "blocks.{}", "blocks.{}.mlp.fc2", 12), 7, 12)
    pico = by_id("hf-vit-classes")
    planted = planted_picos(pico)
    model = load(str(planted.folder)).model
    blocks = re.sub(r"\d+$", "{}", pico.last)
    return Case(planted.located, image_set(None, 6), Published(model, blocks, pico.down, 4), 1, 6)


def pixels(case: Case) -> Tensor:
    return next(case.images.batches(6, case.located.loaded.preprocess))


def test_the_ranking_is_that_of_the_published_algorithm(case: Case) -> None:
    ranking = rank(case.located, case.images, case.emergence, SearchOptions(compat="reference"))
    threshold, listed = case.published.scores(list(pixels(case)), len(case.located.sites.blocks) - 2, case.emergence)
    assert ranking.threshold == pytest.approx(threshold, rel=TOLERANCE)
    assert ranking.top_layer == case.emergence and 0 < ranking.num_images <= 6 <= ranking.num_outliers
    assert [(block, neuron) for block, neuron, _ in ranking.scored[: case.top_k]] == [
        (block, neuron) for _, block, neuron in listed[: case.top_k]
    ]
    assert [score for *_, score in ranking.scored[:100]] == pytest.approx(
        [score for score, *_ in listed[:100]], rel=TOLERANCE
    )


def test_the_shift_is_that_of_the_published_algorithm(case: Case) -> None:
    """In a batch of six, as a graph and as `find` tries it, against one image at a time."""
    ranking = rank(case.located, case.images, case.emergence, SearchOptions(compat="reference"))
    setting = Setting(ranking.best(case.top_k), compat="reference")
    neurons = by_blocks(setting.neurons)
    assert max(map(len, neurons.values())) > 1, "otherwise there is nothing to share"
    expected = torch.stack([case.published.shifted(image, neurons) for image in pixels(case)])
    surgery = perform(case.located, setting.recipe())
    with torch.no_grad():
        found = surgery.graph_module(*tensor_inputs(case.located.loaded, pixels(case)))["logits"]
        own = perform(case.located, Recipe(neurons)).graph_module(*tensor_inputs(case.located.loaded, pixels(case)))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max()))
    assert not torch.allclose(own["logits"], expected, rtol=1e-3), "one extreme for each neuron is another cure"
    original = torch.stack([case.published.logits(image) for image in pixels(case)]).double()
    kl = F.kl_div(expected.double().log_softmax(-1), original.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )
    tried = DriftTrials(case.located, [pixels(case)])(setting)
    assert tried.kl is not None
    torch.testing.assert_close(tried.kl, kl, rtol=1e-3, atol=TOLERANCE)


def test_a_threshold_that_nothing_reaches_is_refused(case: Case) -> None:
    for options, said in (
        ({"norm_threshold": 1e6}, r"no patch has a norm above 1e\+06 after block"),
        ({"top_layer": 99}, "--top-layer 99: must be from 0 to"),
        ({"detect_block": -1}, "--detect-block -1: must be from 0 to"),
    ):
        with pytest.raises(UserError, match=said):
            rank(case.located, case.images, case.emergence, SearchOptions(compat="reference", **options))


@pytest.mark.parametrize(("least", "found"), [(1, 1), (9, 9), (10, 10), (11, 12), (60, 62), (300, 312), (9999, None)])
def test_numbers_of_neurons_are_swept(least: int, found: int | None) -> None:
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert sweep(holds, 512) == found, tried
    assert tried == sorted(set(tried)) and len(tried) < 40 and max(tried) <= 512


def find_demo(run: Callable[..., Done], output: Path, *more: object) -> Done:
    return run("find", "demo", "-o", output, "--num-images", 8, "--compat", "reference", "--top-layer", 2, *more)


@pytest.mark.slow
def test_find_sets_the_authors_method_beside_ours(run: Callable[..., Done], tmp_path: Path) -> None:
    done = find_demo(run, tmp_path / "r.yaml", "--top-k", 3, "--json")
    told, recipe = json.loads(done.out), read_recipe(tmp_path / "r.yaml")
    rows = {row["name"]: row for row in told["sweep"]}
    (ours,) = (row for name, row in rows.items() if name.endswith(" (ours)"))
    theirs = rows["reference, top_k 3"]
    assert theirs["chosen"] and theirs["compat"] == "reference" and not ours["chosen"] and "compat" not in ours
    assert ours["outliers_per_image"] == 0, "what ours does is still tried"
    assert recipe.compat == "reference" and recipe.num_registers == 1 and recipe.num_neurons == theirs["top_k"] == 3
    assert recipe.provenance["reference"]["top_layer"] == 2
    assert done.code == (0 if told["suppressed"] else 1) and told["suppressed"] == (theirs["outliers_per_image"] < 0.05)


@pytest.mark.slow
def test_where_no_number_of_neurons_suppresses_that_is_said(run: Callable[..., Done], tmp_path: Path) -> None:
    """The demo's neurons do not fire more than others; they write more, which the authors' score does not see."""
    done = find_demo(run, tmp_path / "r.yaml")
    assert done.code == 2 and "no number of the best suppresses the outliers; give --top-k" in done.err
    assert not (tmp_path / "r.yaml").exists()


def test_patch_gives_a_recipe_the_authors_extremes(run: Callable[..., Done], tmp_path: Path) -> None:
    words = ("--recipe", "demo", "--compat", "reference", "--no-verify", "--json")
    assert run("patch", "demo", "-o", tmp_path / "out", *words).code == 0
    assert read_recipe(tmp_path / "out" / "recipe.yaml").compat == "reference"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["regsurgery"]["compat"] == "reference"


def test_patch_searches_as_the_authors_did_although_there_is_a_bundled_recipe(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def searched(task: Any, journal: Path) -> None:
        raise UserError(f"searched with {task.options.compat}, top_k {task.options.top_k}")

    monkeypatch.setattr("regsurgery.commands.find.search_for", searched)
    done = run("patch", "demo", "-o", tmp_path / "out", "--compat", "reference", "--top-k", 3, "-q")
    assert done.err == "error: searched with reference, top_k 3\n"


@pytest.mark.parametrize(
    "words, said",
    [
        (("--compat", "referenc"), "did you mean 'reference'?"),
        (("--top-k", 3), "--top-k 3: goes with --compat reference"),
        (("--compat", "reference", "--norm-threshold", "nan"), "--norm-threshold nan: must be a positive number"),
    ],
)
def test_a_wrong_hyperparameter_is_refused_before_the_model_is_read(
    run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], said: str
) -> None:
    monkeypatch.setattr("regsurgery.models.load", lambda *args, **how: pytest.fail("the model was read"))
    done = run("find", "demo", *words)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_parts_are_not_merged_with_it(run: Callable[..., Done], tmp_path: Path) -> None:
    done = run("find", "demo", tmp_path / "a.stats", "--merge", "--compat", "reference", "-o", tmp_path / "r.yaml")
    assert done.code == 2 and "--compat reference: looks at the images itself" in done.err

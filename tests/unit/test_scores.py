"""The scoring pass: stops where it should, and sums what a person with hooks would sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regsurgery.compiler.located import Located
from regsurgery.compiler.outliers import robust_outliers, token_norms
from regsurgery.compiler.taps import tap
from regsurgery.images.image_set import image_set
from regsurgery.recipe import by_blocks
from regsurgery.search import entering
from regsurgery.search.drift import DriftTrials, Setting
from regsurgery.search.entering import shift_only
from regsurgery.search.scores import Scorer, column_norms
from regsurgery.search.trials import Glance, Neurons, Trials
from tests.conftest import Planted
from tests.picos import CORE, Pico

LAST = 2


@pytest.mark.parametrize("pico", CORE, ids=lambda pico: pico.id)
def test_nothing_is_computed_behind_the_early_exit(pico: Pico, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(pico)
    scorer = Scorer(planted.located, LAST)
    tapped = tap(planted.traced.graph_module, {"stream": planted.sites.blocks[LAST].output}, early_exit=True)
    for graph_module in (scorer.graph_module, tapped):
        names = {node.name for node in graph_module.graph.nodes}
        assert [block.index for block in planted.sites.blocks if block.hidden in names] == list(range(LAST + 1))


@pytest.mark.parametrize("index", [0, 3, 5, 13], ids=lambda index: CORE[index].id)
def test_the_sums_are_those_of_a_person_with_hooks(index: int, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(CORE[index])
    sites, loaded = planted.sites, planted.loaded
    scorer = Scorer(Located(loaded, planted.traced, sites), LAST)
    sums = scorer.new_sums()
    seen: dict[int, list[torch.Tensor]] = {block: [] for block in range(LAST + 1)}
    handles = [
        loaded.model.get_submodule(planted.pico.down.format(block)).register_forward_pre_hook(
            lambda module, args, block=block: seen[block].append(args[0].detach().clone())
        )
        for block in seen
    ]
    stream = tap(planted.traced.graph_module, {"stream": sites.blocks[LAST].output})
    streams = []
    for batch in image_set(None, 12).batches(5, loaded.preprocess):
        scorer.add(sums, batch)
        with torch.no_grad():
            loaded.call(loaded.model, batch)
            streams.append(stream(*_inputs(planted, batch))[1]["stream"])
    for handle in handles:
        handle.remove()
    norms_BN = token_norms(torch.cat(streams))[:, sites.num_prefix :]
    outliers_BN = robust_outliers(norms_BN)
    assert sums.num_images == 12 and sums.num_outliers == int(outliers_BN.sum()) > 0
    for block, activations in seen.items():
        patches_BNH = torch.cat(activations)[:, sites.num_prefix :].abs().double()
        expected_H = patches_BNH[outliers_BN].mean(dim=0)
        torch.testing.assert_close(sums.mean_at_outliers(block), expected_H, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            sums.mean_elsewhere(block), patches_BNH[~outliers_BN].mean(dim=0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("index", [0, 3], ids=lambda index: CORE[index].id)
def test_a_trial_starts_at_its_first_block(index: int, planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(CORE[index])
    batches = list(image_set(None, 3).batches(2, planted.loaded.preprocess))
    trials, drifts = Trials(planted.located, batches), DriftTrials(planted.located, batches)
    assert drifts.originals  # run before anything is counted

    def whole(neurons: Neurons) -> Glance:
        tapped = trials.entering.tapped
        shift_only(tapped, by_blocks(neurons))
        return trials._glance(trials._run(tapped))

    def drift(neurons: Neurons) -> dict[str, float | None]:
        return drifts(Setting(tuple(neurons))).means()

    flops: dict[str, list[int]] = {"glance": [], "drift": []}
    for neurons in ([(2, 5)], [(1, 3), (2, 7)], [(2, 6)], [(0, 1)]):  # the third one has a start that is known
        expected = whole(neurons)
        with FlopCounterMode(display=False) as glancing:
            assert trials.glance(neurons) == expected
        alone = DriftTrials(planted.located, batches)(Setting(tuple(neurons))).means()
        with FlopCounterMode(display=False) as drifting:
            assert drift(neurons) == alone
        flops["glance"].append(glancing.get_total_flops())
        flops["drift"].append(drifting.get_total_flops())
    assert flops["glance"][2] < 0.5 * flops["glance"][1] and flops["drift"][2] < 0.7 * flops["drift"][1], flops


def test_what_enters_more_blocks_is_kept_while_it_is_small(
    planted_picos: Callable[[Pico], Planted], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = planted_picos(CORE[0])
    trials = Trials(planted.located, list(image_set(None, 1).batches(1, planted.loaded.preprocess)))
    monkeypatch.setattr(entering, "KEPT", 1)
    for space, kept in ((0, [2]), (1 << 20, [0, 1, 2])):
        monkeypatch.setattr(entering, "SPACE", space)
        trials.entering._kept.clear()
        for block in range(LAST + 1):
            trials.entering.starts({block: (5,)})
        assert list(trials.entering._kept) == kept


def _inputs(planted: Planted, batch: torch.Tensor) -> list[torch.Tensor]:
    from regsurgery.compiler.trace import tensor_inputs

    return tensor_inputs(planted.loaded, batch)


def test_what_a_neuron_writes_includes_the_layer_scale(planted_picos: Callable[[Pico], Planted]) -> None:
    planted = planted_picos(CORE[2])  # DINOv2 has one
    block = planted.sites.blocks[1]
    model = planted.loaded.model
    weight = model.get_submodule(planted.pico.down.format(1)).weight
    gamma = model.get_parameter("encoder.layer.1.layer_scale2.lambda1")
    with torch.no_grad():
        original = gamma.clone()
        gamma.mul_(torch.linspace(0.1, 3, len(gamma)))
        norms_H = column_norms(planted.traced, block)
        torch.testing.assert_close(norms_H, (weight.double() * gamma.double()[:, None]).norm(dim=0))
        gamma.copy_(original)

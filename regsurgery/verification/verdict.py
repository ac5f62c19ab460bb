"""The result of a verification: the figures, their evidence, and the limits beyond which they become warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

MIN_IMAGES_TO_JUDGE = 4  # fewer say nothing about other images
MIN_IMAGES_FOR_PERCENT = 30  # below that, a percentage claims too much, so counts are shown
# Share of images that keep their first class. Generated pictures belong to no class, and their first classes are near
# ties: three unused registers change 8 of 32 on the real ViT-Ti (2 of 175 photos). For them it is a share of the
# pictures whose class unused registers keep.
MIN_SAME = 0.9
# Drift divided by that of as many unused registers, on the same images. Measured on the ViT-Ti (photos; generated):
# neuron 7:417 alone, 1 register: 41; 142. 2 registers: 16; 26. 4 registers: 5; 6.
# 6:189 as well, 1 register: 9; 40. 2 registers: 2.2; 4.9. 3 registers: 1.1; 1.6.
# The first two change one first class in ten on photos; the last two, which lose no accuracy, one in 30 and in 90.
MAX_TIMES = 12.0
MIN_DRIFT = 1e-3  # nats, or 1 - cosine; used instead if an unused register's drift is smaller


@dataclass(frozen=True)
class BeforeAfter:
    """One figure of the original and of the patched model."""

    original: float
    patched: float


@dataclass(frozen=True, eq=False)
class NormMaps:
    """Patch norms of the first images, before and after, `[E, rows, columns]` each, float32 on the CPU."""

    original_ERC: Tensor
    patched_ERC: Tensor


@dataclass(frozen=True)
class UnusedRegister:
    """The effect of appending as many register tokens without shifting a neuron: the least that can be expected.

    Attributes:
        num_images: how many of the verdict's images it was measured on.
        kl, num_same, cosine_output: as in `Verdict`, for the original with unused registers.
        times: drift of the patched model divided by this one's, on the same images; drift is the KL divergence, or 1 -
            cosine of the output in models without logits. None if this one's is zero.
        times_interval: its 95 % interval; None if there are fewer than two images.
    """

    num_images: int
    kl: float | None
    num_same: int | None
    cosine_output: float
    times: float | None
    times_interval: tuple[float, float] | None

    @property
    def drift(self) -> float:
        return 1 - self.cosine_output if self.kl is None else self.kl


@dataclass(frozen=True)
class Verdict:
    """The figures of the contract. Norms are L2 norms of tokens after block `block`; means are over the images.

    Attributes:
        evidence: the kind of images that the figures rest on; `images` says which they are.
        outliers_per_image: patches above 5 times the median patch norm of their image.
        max_patch_norm: mean of each image's largest patch norm; `worst_patch_norm` is the largest of all.
        register_norm: mean norm of the register tokens in the patched model; None without registers.
        register_norm_std: its standard deviation over the images.
        positional: whether the original's outliers sit at the same places in every image; None if there are none, or
            fewer than `measure.MIN_IMAGES_POSITIONAL` images.
        margin: native mode: how well its detectors separate registers, see `closed_form.separation`; the smallest.
        cosine_patches: mean cosine, original to patched, of the patches that were not outliers, after the last block.
        cosine_output: mean cosine of `output`, over its tokens if it has any.
        kl: mean KL divergence from the original's class distribution in nats; None for models without logits.
        same_argmax: share of images that keep their first class; None for models without logits. `num_same`: how many.
        intervals: figure -> the ends of its 95 % interval, for the available ones among `kl`, `same_argmax`,
            `cosine_output` and `cosine_patches`; None instead of the ends if there are fewer than two images.
        unused_register: None without registers.
        parity_max_abs: largest absolute difference between the graph and the written artefact over all outputs.
        parity_allowed: the largest that passes: rounding, by the outputs' dtype and size, times the format's factor.
        failures: why `passed` is false.
        warnings: sentences about what is worth a review.
        fitted_images: how many of the images took part in the search for the neurons or in the fit of the weights; None
            where that is not recorded.
        norm_maps: of the first `measure.NUM_EXAMPLES` images, for a picture and no part of `as_dict`; None if
            the patches make no grid.
    """

    passed: bool
    num_images: int
    images: str
    evidence: Literal["photos", "generated"]
    block: int
    output: str
    outliers_per_image: BeforeAfter
    max_patch_norm: BeforeAfter
    worst_patch_norm: BeforeAfter
    median_patch_norm: BeforeAfter
    register_norm: float | None
    register_norm_std: float | None
    positional: bool | None
    margin: float | None
    cosine_patches: float
    cosine_output: float
    kl: float | None
    same_argmax: float | None
    num_same: int | None
    intervals: Mapping[str, tuple[float, float] | None]
    unused_register: UnusedRegister | None
    parity_max_abs: float
    parity_allowed: float
    failures: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())
    fitted_images: int | None = None
    norm_maps: NormMaps | None = field(default=None, repr=False, compare=False)

    @property
    def is_judged(self) -> bool:
        """Whether there were enough images for a verdict."""
        return self.num_images >= MIN_IMAGES_TO_JUDGE

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `judged` is `is_judged`."""
        facts = asdict(replace(self, norm_maps=None))
        del facts["norm_maps"]
        return _plain({**facts, "judged": self.is_judged})

    def strictly(self) -> Verdict:
        """The verdict with warnings, and too few images, counted as failures."""
        failures = (*self.failures, *self.warnings)
        if not self.is_judged:
            failures = (*failures, f"too few images to judge: {self.num_images}, at least {MIN_IMAGES_TO_JUDGE}")
        return replace(self, passed=not failures, failures=failures, warnings=())


def _plain(value: Any) -> Any:
    """`value` with lists instead of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def warnings_of(verdict: Verdict) -> tuple[str, ...]:
    """Figures that are worth a review: a first class that changes too often, a drift that is too large.

    A figure beyond its limit is always a warning. If its interval reaches back to the limit, so that other images may
    well be on the right side of it, the sentence says so.
    """
    found = (_changes_classes(verdict), _drifts(verdict))
    return tuple(warning for warning in found if warning)


def _changes_classes(verdict: Verdict) -> str:
    if verdict.same_argmax is None:
        return ""
    unused, limit, beside = verdict.unused_register, MIN_SAME, ""
    if verdict.evidence == "generated" and unused is not None and unused.num_same is not None:
        limit *= unused.num_same / unused.num_images
        beside = f"; an unused register keeps it in {unused.num_same} of {unused.num_images}"
    if verdict.same_argmax >= limit:
        return ""
    ends = verdict.intervals["same_argmax"]
    kind = "generated pictures" if verdict.evidence == "generated" else "images"
    return (
        f"the first class stays the same in {verdict.num_same} of {verdict.num_images} {kind}; a share of {limit:.2g} "
        f"or more is expected{beside}{_reservation(ends is not None and ends[1] < limit, verdict.num_images)}"
    )


def _drifts(verdict: Verdict) -> str:
    unused = verdict.unused_register
    if unused is None or unused.times is None or unused.times <= MAX_TIMES:
        return ""
    if unused.times * unused.drift <= MAX_TIMES * MIN_DRIFT:
        return ""
    what = f"1 - cosine of '{verdict.output}'" if unused.kl is None else "the KL divergence to the original"
    ends = unused.times_interval
    return (
        f"{what} is {_times(unused.times)} times that of appending an unused register; up to {MAX_TIMES:g} "
        f"times is expected{_reservation(ends is not None and ends[0] > MAX_TIMES, unused.num_images)}"
    )


def _times(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _reservation(sure: bool, num_images: int) -> str:
    return "" if sure else f" (not certain on {num_images} images: the 95 % interval reaches the limit)"

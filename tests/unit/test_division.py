"""Which of the user's images are held out."""

from __future__ import annotations

import pytest

from regsurgery.images.image_set import ImageSet, image_set
from regsurgery.search.division import Division


@pytest.mark.parametrize(("total", "unseen"), [(8, 4), (60, 20), (90, 30), (125, 30), (300, 60)])
def test_a_fifth_is_held_out_at_least_30_at_most_a_third(
    total: int, unseen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageSet, "evidence", "photos")
    fit, rest = Division.without_search(image_set(None, total)).for_fit(seed=0)
    assert (rest.num_images, fit.num_images) == (unseen, total - unseen)
    assert not set(fit.chosen) & set(rest.chosen)

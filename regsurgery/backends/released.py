"""The loader files that released versions wrote, as `modeling.loader_digest` of each.

They run without being asked for, as those of this version do. A version whose loaders equal an earlier one's lists them
again; `tests/unit/test_loaders.py` holds this table to CHANGELOG.md. Nothing has been released yet.
"""

from __future__ import annotations

from collections.abc import Mapping

RELEASED: Mapping[str, tuple[str, ...]] = {}  # version -> digests: transformers, timm, open_clip

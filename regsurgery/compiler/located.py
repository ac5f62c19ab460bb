"""A model whose sites are known: the input of every stage after the matcher."""

from __future__ import annotations

from dataclasses import dataclass, replace

from regsurgery.compiler.sites import Sites
from regsurgery.compiler.trace import Traced
from regsurgery.frontends.loaded import Loaded


@dataclass(frozen=True)
class Located:
    """A loaded model, its traced graph, and the sites in it."""

    loaded: Loaded
    traced: Traced
    sites: Sites

    @property
    def own(self) -> Loaded:
        """The checkpoint at the size it was made for, whatever image size was traced."""
        return self.loaded.own or self.loaded

    def as_written(self) -> Located:
        """The same graph and sites with the checkpoint as on disk, for writing."""
        return replace(self, loaded=self.own)


class OfLocated:
    """What has a `located`, and its parts under their own names."""

    located: Located

    @property
    def loaded(self) -> Loaded:
        return self.located.loaded

    @property
    def traced(self) -> Traced:
        return self.located.traced

    @property
    def sites(self) -> Sites:
        return self.located.sites

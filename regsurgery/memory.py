"""Too little memory, which every library says in its own way."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

# torch on the CPU and on CUDA, the linker, mmap, C++, thread stacks, and workers that the system kills.
SAYINGS = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|cannot allocate memory|CUDA out of memory|not enough memory|bad_alloc"
    r"|failed to map segment|can't start new thread|Unable to allocate"
    r"|DataLoader worker \(pid\D*\d+\) is killed by signal: (Killed|Bus error)",
    re.I,
)
ASKED = re.compile(r"(?:allocate|map|mmap)\D{0,20}?(\d[\d.]*) ?((?:bytes|[KMGT]i?B)\b)", re.I)
REMEDY = (
    "end other programs or raise the limit (ulimit -v, the container's), or take fewer or smaller images; --max-memory "
    "leaves weights on disk"
)


def shortage(error: BaseException) -> str | None:
    """What to tell the user if `error`, or what it comes from, is a lack of memory; None if it is not."""
    for link in _chain(error):
        text = str(link)
        lacking = isinstance(link, MemoryError) or getattr(link, "errno", None) == errno.ENOMEM
        if lacking or SAYINGS.search(text):
            asked = ASKED.search(text)
            wanted = f" ({asked[1]} {asked[2]} were asked for)" if asked else ""
            return f"memory is short{wanted}: {REMEDY}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__

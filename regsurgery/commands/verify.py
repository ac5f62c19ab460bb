"""`verify`: a patched folder against its original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.options import VerifyOptions, takes
from regsurgery.verification.patched import at_home, open_patched

if TYPE_CHECKING:
    from regsurgery.verification.verdict import Verdict


@takes(VerifyOptions)
def verify(folder: str | Path, options: VerifyOptions) -> Verdict:
    """Compare a patched folder, or one on the Hub (USER/NAME, see `load`), against its original.

    The folder's files are checked against its SHA256SUMS, then its own loader file is run; one that no regsurgery
    writes needs `trust_remote_code`. A patched checkpoint holds the original's tensors unchanged and is compared with
    them; a program (`.pt2`, `.onnx`) or a native-mode checkpoint is compared with the recorded source; `original`
    names another MODEL. Images have `image_size` pixels a side, by default the size of the model or program.

    Args:
        options: see `options.VerifyOptions`; its fields are the keyword arguments.

    Raises:
        CheckpointError: the folder is incomplete, code in it is not trusted, or `original` is not what was patched.
    """
    from regsurgery.emit.run_record import fitted_of, judged
    from regsurgery.verification.folder import verify_pair
    from regsurgery.verification.pair import reopened

    root = at_home(folder, options.revision)
    if not Path(folder).is_dir():
        options = replace(options, revision=None)  # it is that of `folder`, not of the original
    images = options.image_set()
    options.progress.stage("checksums")
    opened = open_patched(root, trusted=options.trust_remote_code)
    with reopened(opened, str(folder), options.original, options, options.image_size) as pair:
        verdict = verify_pair(opened, pair, images, options.progress)
    return judged(verdict, images, fitted_of(root), strict=options.strict)

"""`doctor`: is there anything to fix?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.errors import UnsupportedModelError
from regsurgery.models import open_model
from regsurgery.options import DoctorOptions, takes

if TYPE_CHECKING:
    from regsurgery.search.diagnosis import Diagnosis


@takes(DoctorOptions)
def doctor(model: str | Path, options: DoctorOptions) -> Diagnosis:
    """Whether `model` has outlier tokens, where they start and what causes them. A model that cannot be matched gets
    the diagnosis `unsupported`, with the reason.

    Args:
        options: see `options.DoctorOptions`; its fields are the keyword arguments.

    Raises:
        UserError: the model cannot be found or loaded, or the images cannot be read.
    """
    from regsurgery.search.diagnosis import Diagnosis, diagnose

    images, progress = options.image_set(), options.progress
    try:
        located = open_model(model, options, options.image_size)
    except UnsupportedModelError as error:
        return Diagnosis("unsupported", str(error), images.note, images.num_images)
    progress.say(f"preprocessing: {located.loaded.preprocess_note}; images: {images.note}")
    progress.stage("norms", images.num_images)
    with located.loaded.files.unchanged():
        return diagnose(located, images, progress=progress.advance)

"""Which files the frozen parts come from in training and preprocessing, where not every weight flag is needed."""

import logging
from collections.abc import Mapping
from pathlib import Path

from library.errors import UserError
from library.weight_paths import EMBEDDED

log = logging.getLogger(__name__)

_EMBEDDED_FILES = {
    "pretrained_model_name_or_path": "flux1-tiny.safetensors",
    "clip_l": "clip_l.safetensors",
    "t5xxl": "t5xxl_fp16.safetensors",
    "ae": "ae.safetensors",
}


def frozen_paths(given: Mapping[str, Path | None], *, embedded: Path = EMBEDDED) -> dict[str, Path]:
    """Return an existing path for each flag of `given`: all as given, or, if none is, all of the embedded model.

    Raises:
        UserError: some are given and some not, or a path isn't there.
    """
    chosen = {name: path for name, path in given.items() if path is not None}
    if not chosen:
        log.info("No weight flags: using the embedded model in %s", embedded)
        chosen = {name: embedded / _EMBEDDED_FILES[name] for name in given}
    missing = [f"--{name}" for name in given if name not in chosen]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: must be given too, since --{next(iter(chosen))} is; "
            "with no weight flag at all the embedded model is used"
        )
    for name, path in chosen.items():
        if not path.exists():
            raise UserError(
                f"--{name} {path}: no such file or folder; scripts/download_models.sh fetches the released weights"
            )
    return chosen

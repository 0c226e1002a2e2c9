"""Which weight files a command uses: those its flags name, or the embedded model when no weight flag is given at
all."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.args import ModelArgs
from library.errors import UserError

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).resolve().parents[1] / "assets" / "tiny"
ADDONS = "jointdit_addons_path"
ADDONS_NAMES = ("jointdit_addons.safetensors", "jointdit.safetensors")  # the scripts' name and the hub's
_EMBEDDED_FILES = {
    "pretrained_model_name_or_path": "flux1-tiny.safetensors",
    "clip_l": "clip_l.safetensors",
    "t5xxl": "t5xxl_fp16.safetensors",
    "ae": "ae.safetensors",
    "jointdit_addons_path": "jointdit_addons.safetensors",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPaths:
    """Files or folders of everything that inference loads; the names are those of the flags."""

    pretrained_model_name_or_path: Path
    clip_l: Path
    t5xxl: Path
    ae: Path
    jointdit_addons_path: Path
    clip_tokenizer: Path | None = None
    t5_tokenizer: Path | None = None
    t5xxl_max_token_length: int | None = None
    clip_activation: str = "gelu"


def weight_paths(args: ModelArgs) -> WeightPaths:
    """Return the paths of all weights, each existing.

    Raises `UserError` for a set of weight flags with holes and for paths that aren't there.
    """
    given = args.weight_paths()
    for name in ("clip_tokenizer", "t5_tokenizer"):
        if getattr(args, name) is not None and not any(given[each] for each in FROZEN):
            raise UserError(f"--{name} {getattr(args, name)}: goes with weights of its own; give the weight flags too")
    return WeightPaths(
        **resolve_paths(given),
        clip_tokenizer=args.clip_tokenizer,
        t5_tokenizer=args.t5_tokenizer,
        t5xxl_max_token_length=args.t5xxl_max_token_length,
        clip_activation=args.clip_activation,
    )


def resolve_paths(given: Mapping[str, Path | None], *, needed: Sequence[str] | None = None) -> dict[str, Path]:
    """Return an existing path for each weight flag that is needed: all as given, or the embedded model's if none is.

    Add-ons alone go with the embedded model: they are what training without weight flags makes.

    `given` holds the weight flags a command has; `needed`, if not all of them, those it uses now. Raises `UserError`
    naming the missing flags or file.
    """
    needed = tuple(given) if needed is None else tuple(needed)
    chosen = {name: path for name, path in given.items() if path is not None}
    if chosen.keys() <= {ADDONS}:
        logger.info("No %sweight flags: using the embedded model in %s", "other " if chosen else "", _shown(EMBEDDED))
        return embedded_files(needed) | {name: find_weights(name, path) for name, path in chosen.items()}
    missing = [f"--{name}" for name in needed if name not in chosen]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: must be given too, since --{next(iter(chosen))} is; "
            "with no weight flag at all the embedded model is used"
        )
    return {name: find_weights(name, chosen[name]) for name in needed}


FROZEN = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae")


def frozen_paths(args: object, *needed: str) -> dict[str, Path]:
    """Return the paths of those frozen parts that training or preprocessing needs now; see `resolve_paths`."""
    return resolve_paths({name: getattr(args, name) for name in FROZEN if hasattr(args, name)}, needed=needed)


def embedded_files(
    names: Sequence[str] = tuple(_EMBEDDED_FILES), *, folder: Path | None = None, flag: str = "model_folder"
) -> dict[str, Path]:
    """Return the embedded model's files by flag name, or those under the same names in a folder that `flag` gave."""
    paths = {name: (folder or EMBEDDED) / _EMBEDDED_FILES[name] for name in names}
    absent = ", ".join(path.name for path in paths.values() if not path.exists())
    if absent and folder in (None, EMBEDDED):
        raise UserError(f"the embedded model {_shown(EMBEDDED)}: {absent} missing; get a complete copy of this project")
    if absent:
        raise UserError(f"--{flag} {folder}: {absent} missing; it must hold a model under the embedded one's names")
    return paths


def find_weights(name: str, path: Path) -> Path:
    """Return the path of one weight flag if it is there; add-ons are looked for under both of their published names."""
    if name == ADDONS:
        return find_addons(path)
    if not path.exists():
        raise UserError(
            f"--{name} {path}: no such file or folder; scripts/download_models.sh fetches the released weights"
        )
    return path


def find_addons(path: Path, *, flag: str = ADDONS) -> Path:
    """Return the add-ons file for a file or folder that `flag` gave, under either of its two published names."""
    folder = path if path.is_dir() else path.parent
    names = ADDONS_NAMES if path.is_dir() else (path.name, *ADDONS_NAMES) if path.name in ADDONS_NAMES else (path.name,)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--{flag} {path}: no such file (looked for {' and '.join(dict.fromkeys(names))})")


def _shown(path: Path) -> str:
    """Return a path as one would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)

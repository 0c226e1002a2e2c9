"""Add-ons files: what JointDiT adds to a backbone, in the released names, with a JSON file beside.

The tensors are named as the model names them (`X.lora_A.weight`, `double_blocks.i.joint1.weight`, ...); our own facts
about them go into the header under the key `jointdit`, the released ones into `<stem>.json`.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import UserError
from library.files import save_tensors, write_json
from library.flux.checkpoint import Checkpoint, Source, assign, open_checkpoint, read_json
from library.flux.variants import FluxConfig
from library.flux.weights import FLUX_FLAG, open_flux, read_flux_config
from library.jointdit.attention import WEIGHTINGS
from library.jointdit.model import JointDiT, LoraRanks
from library.modality import DEPTH_TRANSFORMS

logger = logging.getLogger(__name__)

FLAG = "--jointdit_addons_path"
LICENCE_NOTE = "use is also bound by the licence of the backbone these add-ons were trained on"
_RANK_TENSORS = {
    "blocks": "single_blocks.0.linear1.lora_A.weight",
    "vector_in": "vector_in.in_layer.lora_A.weight",
    "vector_out": "vector_in.out_layer.lora_A.weight",
    "text_in": "txt_in.lora_A.weight",
}
_BASE_TENSORS = ("img_in.weight", "final_layer.linear.weight")  # small, and different in every backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class AddonSettings:
    """How add-ons were trained, and so must be used.

    The first three are the released side-car's; the weighting and the base's fingerprint are in the header of files
    saved here.
    """

    is_txt_ids_training: bool = False
    is_attnmask_training: bool = False
    depth_transform: str = "none"
    weighting: str = "released"
    base: str | None = None

    def __post_init__(self) -> None:
        for name in ("is_txt_ids_training", "is_attnmask_training"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither true nor false")
        if self.depth_transform not in DEPTH_TRANSFORMS:
            raise ValueError(f"depth_transform {self.depth_transform!r} is none of {', '.join(DEPTH_TRANSFORMS)}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting {self.weighting!r} is none of {', '.join(WEIGHTINGS)}")


SIDECAR_FIELDS = ("is_txt_ids_training", "is_attnmask_training", "depth_transform")


def trainable_parameters(model: JointDiT) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that JointDiT adds, in the model's order."""
    parameters = dict(model.named_parameters())
    return [(name, parameters[name]) for name in model.trainable_names()]


def load_jointdit(
    *,
    flux: str | Path,
    addons: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> JointDiT:
    """Load a backbone and its add-ons, in eval mode; only the add-ons require gradients.

    Args:
        flux: the backbone, in any format `load_flux` reads.
        addons: `jointdit_addons.safetensors`; ranks are read off its tensors.
        dtype: of all weights.
        device: of all weights.

    Raises:
        UserError: naming the flag, the file and the first names, if one isn't what it should be, or if the add-ons were
            made for another backbone.
    """
    checkpoint, sources = open_flux(flux)
    config = read_flux_config(checkpoint, sources)
    extra = open_checkpoint(addons, flag=FLAG, model_types=())
    settings = read_settings(addons)
    _require_base(extra, settings, checkpoint, sources, config)
    ranks = LoraRanks(**{field: extra.shape(name)[0] for field, name in _RANK_TENSORS.items()})
    with torch.device("meta"):
        model = JointDiT(config, ranks=ranks, weighting=settings.weighting)
    _fill_base(model, checkpoint, sources, dtype=dtype, device=device)
    added = set(model.trainable_names())
    for what, wrong in (("lacks", added - extra.shapes.keys()), ("has the unknown", extra.shapes.keys() - added)):
        if wrong:
            raise extra.fail(
                f"{what} {', '.join(sorted(wrong)[:3])} ({len(wrong)} tensors); made for another backbone?"
            )
    assign(model, extra, {name: name for name in added}, dtype=dtype, device=device, partly=True)
    return freeze_backbone(model)


def new_jointdit(
    *,
    flux: str | Path,
    ranks: LoraRanks,
    weighting: str = "released",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator,
) -> JointDiT:
    """Load a backbone and give it fresh add-ons, which change nothing yet: where training starts.

    `generator` draws the A matrices on the CPU; the other arguments are as in `load_jointdit`. The add-ons are float32.
    """
    checkpoint, sources = open_flux(flux)
    config = read_flux_config(checkpoint, sources)
    with torch.device("meta"):
        model = JointDiT(config, ranks=ranks, weighting=weighting)
    _fill_base(model, checkpoint, sources, dtype=dtype, device=device)
    fresh = {name: torch.empty(parameter.shape) for name, parameter in trainable_parameters(model)}
    model.load_state_dict(fresh, assign=True, strict=False)
    model.reset_addons(generator)
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.to(device)
    return freeze_backbone(model)


def freeze_backbone(model: JointDiT) -> JointDiT:
    """Let only what JointDiT adds require gradients; eval mode."""
    model.requires_grad_(False)
    for _, parameter in trainable_parameters(model):
        parameter.requires_grad_(True)
    return model.eval()


def _fill_base(
    model: JointDiT,
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Load the backbone strictly, leaving what JointDiT adds on the meta device."""
    missing = model.state_dict().keys() - set(model.trainable_names()) - sources.keys()
    if missing:
        raise checkpoint.fail(f"lacks {', '.join(sorted(missing)[:3])} ({len(missing)} tensors)")
    assign(model, checkpoint, sources, dtype=dtype, device=device, partly=True)


def save_addons(
    path: str | Path,
    model: JointDiT,
    *,
    settings: AddonSettings,
    dtype: torch.dtype = torch.bfloat16,
    extra: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write add-ons in the released names, and the JSON file beside them; both are on the disk afterwards.

    Args:
        path: `.../jointdit_addons.safetensors`.
        model: whose add-ons are written.
        settings: how they were trained.
        dtype: of the file; the released one is bfloat16.
        extra: further facts for the header, such as the recipe's switches; nothing of time, place or names.
        tensors: the add-ons by name, where the model's own are in parts on several devices.
    """
    path = Path(path)
    facts = asdict(settings) | {"ranks": asdict(model.ranks), "licence": LICENCE_NOTE} | dict(extra or {})
    if tensors is None:
        tensors = dict(trainable_parameters(model))
    held = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    save_tensors(path, held, metadata=facts, durable=True)
    write_json(path.with_suffix(".json"), {name: getattr(settings, name) for name in SIDECAR_FIELDS}, durable=True)


def read_settings(path: str | Path) -> AddonSettings:
    """Read how add-ons were trained: the header of files saved here, else the JSON file beside; a warning without both.

    Raises:
        UserError: the file isn't readable, or the JSON file contradicts the header or holds something else.
    """
    path = Path(path)
    header = open_checkpoint(path, flag=FLAG, model_types=()).header
    sidecar_path = path.with_suffix(".json")
    sidecar: dict[str, Any] = {}
    if sidecar_path.is_file():
        sidecar = read_json(sidecar_path, flag=FLAG)
        if not isinstance(sidecar, dict):
            raise UserError(f"{FLAG} {sidecar_path}: holds a {type(sidecar).__name__}, not named settings")
    elif not header:
        logger.warning(
            "%s %s: no %s beside it; taking the released settings (no text ids, no mask, disparity as it is)",
            FLAG, path, sidecar_path.name,
        )  # fmt: skip
    for name in SIDECAR_FIELDS:
        if name in header and name in sidecar and header[name] != sidecar[name]:
            raise UserError(f"{FLAG} {sidecar_path}: {name} is {sidecar[name]}, the file's header says {header[name]}")
    told = {name: value for name, value in {**sidecar, **header}.items() if name in AddonSettings.__dataclass_fields__}
    try:
        return replace(AddonSettings(), **told)
    except ValueError as error:
        raise UserError(f"{FLAG} {sidecar_path}: {error}") from error


def base_fingerprint(flux: str | Path) -> str:
    """Tell backbones of the same sizes apart: a hash of small tensors' values in bfloat16, whatever the format."""
    return _fingerprint(*open_flux(flux))


def _fingerprint(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> str:
    digest = hashlib.sha256()
    with checkpoint.reader() as read:
        for name in _BASE_TENSORS:
            source = sources.get(name)
            if not isinstance(source, str):
                raise checkpoint.fail(f"no tensor {name}")
            digest.update(read(source).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _require_base(
    addons: Checkpoint,
    settings: AddonSettings,
    base: Checkpoint,
    sources: Mapping[str, Source],
    config: FluxConfig,
) -> None:
    """Refuse add-ons that were made for another backbone."""
    width = addons.shape("single_blocks.0.joint2.bias")[0] // 2
    if width != config.hidden_size:
        raise addons.fail(f"made for a backbone of width {width}; {FLUX_FLAG} {base.path} has {config.hidden_size}")
    if settings.base is not None and settings.base != _fingerprint(base, sources):
        raise addons.fail(f"made for another backbone than {FLUX_FLAG} {base.path}: its fingerprint differs")

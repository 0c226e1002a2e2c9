"""What `train.py` reads: training pairs, prompts and held-out pairs, from caches or through the encoders."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dataset.cache import TEXT_KEYS, UNKNOWN
from dataset.jointdit_dataset import CachedPairs, PicturePairs
from dataset.prompt_features import encode_prompts, load_prompt_encoder, read_prompt_features, read_prompts
from library.batches import Batch, PromptFeatures, number_text
from library.encoding import LatentEncoder, PairEncoder, PromptEncoder
from library.errors import UserError
from library.fingerprint import fingerprint
from library.flags import given
from library.flux.weights import load_autoencoder
from library.loading import Pairs
from library.training_args import TrainingArgs
from library.weight_paths import frozen_paths

log = logging.getLogger(__name__)

# Of what made a cache: what must be the same in two that are used together. Posterior, seed and precision may differ.
_LATENT_KEYS = ("ae", "text")
_SAMPLE_KEYS = ("posterior", "seed", "precision")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Training pairs, held-out pairs (if a folder of them is given) and prompts.

    `encode` makes batches of what the pairs give where pixels, or captions, are still to be encoded; `networks` are
    those it does so by, on whatever device. `text_precision` is that of text encoders which ran, be it once for the
    prompts; None where all text was cached. `encoders` are the fingerprints, by flag, of what makes the batches or made
    the cache, as far as they are known, and the cache's own stamp.
    """

    pairs: Pairs
    held_out: Pairs | None
    prompts: PromptFeatures
    encode: Callable[[Any], Batch] | None
    networks: tuple[nn.Module, ...] = ()
    text_precision: torch.dtype | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)


def open_training_data(args: TrainingArgs, *, device: torch.device, dtype: torch.dtype) -> TrainingData:
    """Open everything the flags name; encoders that are needed only once are freed again.

    Raises:
        UserError: a folder, cache or model file is missing, damaged or doesn't fit the others.
    """
    return _open_cached(args, device, dtype) if args.is_latent_training else _open_pictures(args, device, dtype)


def _open_cached(args: TrainingArgs, device: torch.device, dtype: torch.dtype) -> TrainingData:
    def open_folder(folder: Path, flag: str) -> CachedPairs:
        return CachedPairs(folder, depth_transform=args.depth_transform, with_ids=args.is_txt_ids_training, flag=flag)

    pairs = open_folder(args.image_folder, "--image_folder")
    check_models(args, pairs.meta)
    held_out = None
    if args.validation_folder is not None:
        held_out = open_folder(args.validation_folder, "--validation_folder")
        _check_same(pairs.meta, held_out.meta, folder=args.validation_folder)
    prompts = _cached_prompts(args, pairs.meta) if pairs.has_text else None
    if prompts is not None:
        _warn_of_idle(args, "text_encoder_device", "clip_tokenizer", "t5_tokenizer", why="all text is cached")
        if _has_other_prompts(args, prompts.prompts):
            log.warning(
                "--evaluation_prompts has no effect: the prompts that preprocess_step3.py left in --prompt_folder %s "
                "are previewed, and %s has others; run it again",
                args.prompt_folder, args.evaluation_prompts,
            )  # fmt: skip
        return TrainingData(
            pairs=pairs, held_out=held_out, prompts=prompts, encode=None, encoders=_made_by(pairs, "clip_l", "t5xxl")
        )
    if not pairs.has_text:
        _warn_of_idle(args, "prompt_folder", why="this cache has no text: prompts are encoded with the captions")
    try:
        encoder = _prompt_encoder(args, device, dtype)
    except UserError as error:
        if not pairs.has_text:
            raise
        raise UserError(
            f"--prompt_folder {args.prompt_folder}: has no prompts of this cache's text encoders; run "
            f"preprocess_step3.py with them, or name them here to encode prompts now ({error})"
        ) from None
    return TrainingData(
        pairs=pairs,
        held_out=held_out,
        prompts=encode_prompts(encoder, read_prompts(args.evaluation_prompts)),
        encode=None if pairs.has_text else encoder.complete,
        networks=() if pairs.has_text else encoder.networks,
        text_precision=encoder.precision,
        encoders=_made_by(pairs) | _fingerprints(frozen_paths(args, "clip_l", "t5xxl")),
    )


def _made_by(pairs: CachedPairs, *text: str) -> dict[str, str]:
    known = {name: pairs.meta[name] for name in ("ae", *text) if pairs.meta[name] != UNKNOWN}
    told = [f"{key} {pairs.meta[key]}" for key in _SAMPLE_KEYS if key in pairs.meta]
    return known | {"image_folder's cache": ", ".join([pairs.stamp, *told])}


def _fingerprints(paths: Mapping[str, Path]) -> dict[str, str]:
    return {name: fingerprint(path) for name, path in paths.items()}


def _warn_of_idle(args: TrainingArgs, *names: str, why: str) -> None:
    for name in given(args, names):
        log.warning("--%s has no effect: %s", name, why)


def _has_other_prompts(args: TrainingArgs, cached: Sequence[str]) -> bool:
    """Whether the list of prompts isn't the cached one: that named, or the usual one, changed since step 3."""
    usual = not given(args, ("evaluation_prompts",))
    if usual and (given(args, ("prompt_folder",)) or not args.evaluation_prompts.is_file()):
        return False
    return read_prompts(args.evaluation_prompts) != tuple(cached)


def _cached_prompts(args: TrainingArgs, meta: dict[str, Any]) -> PromptFeatures | None:
    """The prompts that step 3 has encoded for this cache, if it has."""
    prompts = read_prompt_features(args.prompt_folder, made_by={key: meta[key] for key in TEXT_KEYS})
    if prompts is None:
        log.info("No prompts cached in %s by preprocess_step3.py; encoding them now", args.prompt_folder)
    elif args.is_txt_ids_training:
        evaluation = number_text(prompts.evaluation) if prompts.evaluation is not None else None
        prompts = PromptFeatures(empty=number_text(prompts.empty), prompts=prompts.prompts, evaluation=evaluation)
    return prompts


def _open_pictures(args: TrainingArgs, device: torch.device, dtype: torch.dtype) -> TrainingData:
    pairs = PicturePairs(
        args.image_folder,
        depth_transform=args.depth_transform,
        mirror=args.flip_aug,
        max_bad_samples=args.max_bad_samples,
    )
    held_out = None
    if args.validation_folder is not None:
        held_out = PicturePairs(
            args.validation_folder,
            depth_transform=args.depth_transform,
            max_bad_samples=args.max_bad_samples,
            flag="--validation_folder",
        )
    paths = frozen_paths(args, "clip_l", "t5xxl", "ae")
    prompt_encoder = _prompt_encoder(args, device, dtype)
    autoencoder = load_autoencoder(paths["ae"], dtype=torch.float32, device=device)
    latents = LatentEncoder(autoencoder=autoencoder, posterior=args.posterior, seed=args.seed)
    return TrainingData(
        pairs=pairs,
        held_out=held_out,
        prompts=encode_prompts(prompt_encoder, read_prompts(args.evaluation_prompts)),
        encode=PairEncoder(latents=latents, prompts=prompt_encoder).encode,
        networks=(autoencoder, *prompt_encoder.networks),
        text_precision=prompt_encoder.precision,
        encoders=_fingerprints(paths),
    )


def _prompt_encoder(args: TrainingArgs, device: torch.device, dtype: torch.dtype) -> PromptEncoder:
    """Load the text encoders to where training computes, or where `--text_encoder_device` says."""
    device, dtype = args.text_encoder_place(device=device, dtype=dtype)
    return load_prompt_encoder(
        args,
        frozen_paths(args, "clip_l", "t5xxl"),
        device=device,
        dtype=dtype,
        with_mask=args.is_attnmask_training,
        with_ids=args.is_txt_ids_training,
    )


class CacheFlags(Protocol):
    """The flags that decide which cache is accepted; each as train.py has it."""

    @property
    def image_folder(self) -> Path:
        """Prepared folder."""

    @property
    def clip_l(self) -> Path | None:
        """CLIP's weights."""

    @property
    def t5xxl(self) -> Path | None:
        """T5's weights."""

    @property
    def ae(self) -> Path | None:
        """The autoencoder's weights."""

    @property
    def is_attnmask_training(self) -> bool:
        """Whether T5's padding is masked."""

    @property
    def clip_activation(self) -> str:
        """CLIP's activation."""

    @property
    def t5xxl_max_token_length(self) -> int | None:
        """T5 tokens, if said."""

    @property
    def trust_cache(self) -> bool:
        """Whether a cache of unknown origin will do."""


def check_models(args: CacheFlags, meta: dict[str, Any]) -> None:
    """Compare a cache with the encoders that the flags name, and with the text mask.

    Raises:
        UserError: it was made by others; or what made it isn't known, and `--trust_cache` isn't given.
    """
    names = ("clip_l", "t5xxl", "ae") if meta.get("text", True) else ("ae",)
    unknown = [name for name in names if meta[name] == UNKNOWN]
    if unknown and not args.trust_cache:
        raise UserError(
            f"--image_folder {args.image_folder}: nobody knows which {', '.join(unknown)} made its imported cache; "
            "import it with these flags, or say --trust_cache"
        )
    for name in names:
        path = getattr(args, name)
        if path is not None and not path.exists():
            log.warning("--%s %s: no such file or folder; whether it made this cache isn't known", name, path)
        elif path is not None and meta[name] not in (UNKNOWN, fingerprint(path)):
            raise UserError(
                f"--{name} {path}: isn't the model that made the cache of {args.image_folder}; give that one, or make "
                "the cache anew with preprocess_step2.py"
            )
    if meta.get("text", True):
        _check_text_settings(args, meta)


def _check_text_settings(args: CacheFlags, meta: dict[str, Any]) -> None:
    if args.is_attnmask_training != meta["text_mask"]:
        made = "with" if meta["text_mask"] else "without"
        raise UserError(
            f"--is_attnmask_training: the cache of {args.image_folder} was made {made} it; do the same here, or make "
            "the cache anew"
        )
    told = {"clip_activation": args.clip_activation, "t5xxl_max_token_length": args.t5xxl_max_token_length}
    made_with = {"clip_activation": meta["clip_activation"], "t5xxl_max_token_length": meta["t5_length"]}
    for name, value in told.items():
        if value not in (None, made_with[name]):
            raise UserError(
                f"--{name} {value}: the cache of {args.image_folder} was made with {made_with[name]}; say the same "
                "here, or make the cache anew"
            )


def _check_same(training: dict[str, Any], held_out: dict[str, Any], *, folder: Path) -> None:
    for key in (*_LATENT_KEYS, *TEXT_KEYS):
        if training.get(key) != held_out.get(key):
            raise UserError(
                f"--validation_folder {folder}: its cache was made with another {key} ({held_out.get(key)}) than that "
                f"of --image_folder ({training.get(key)}); make it anew"
            )

"""Features of the empty prompt and of the evaluation prompts, as `preprocess_step3.py` leaves them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dataset.cache import FORMAT, read_meta, read_text_features, write_text_features
from dataset.layout import PromptLayout
from library.args import TextEncoderArgs
from library.batches import PromptFeatures, concatenate_text, text_rows
from library.encoding import PromptEncoder
from library.errors import UserError
from library.files import left_overs, read_lines, write_json
from library.flux.text import EMPTY_PROMPT, load_text_encoders

log = logging.getLogger(__name__)


def read_prompts(path: Path, *, flag: str = "--evaluation_prompts") -> tuple[str, ...]:
    """Read prompts, one a line; empty lines don't count.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        return read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: can't be read ({error}); give a UTF-8 text file, one prompt a line") from None


def load_prompt_encoder(
    args: TextEncoderArgs,
    paths: Mapping[str, Path],
    *,
    device: torch.device,
    dtype: torch.dtype,
    with_mask: bool,
    with_ids: bool = False,
) -> PromptEncoder:
    """Load text encoders from `paths`, named as their flags, as the other flags say."""
    encoders = load_text_encoders(
        paths["clip_l"],
        paths["t5xxl"],
        clip_tokenizer=args.clip_tokenizer,
        t5_tokenizer=args.t5_tokenizer,
        t5_length=args.t5xxl_max_token_length,
        clip_activation=args.clip_activation,
        dtype=dtype,
        device=device,
    )
    return PromptEncoder(encoders=encoders, with_mask=with_mask, with_ids=with_ids)


def encode_prompts(encoder: PromptEncoder, prompts: Sequence[str]) -> PromptFeatures:
    """Encode the empty and the evaluation prompts."""
    evaluation = encoder.encode(prompts) if prompts else None
    return PromptFeatures(empty=encoder.encode([EMPTY_PROMPT]), prompts=tuple(prompts), evaluation=evaluation)


def write_prompt_features(
    folder: Path, features: PromptFeatures, *, made_by: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write both sets below `folder`, replacing earlier ones.

    The JSON files are taken away first and written last: features of two runs never pass for one set.
    """
    layout = PromptLayout(folder)
    for path in (layout.empty_meta, layout.evaluation_meta):
        path.unlink(missing_ok=True)
        for begun in left_overs(path.parent):
            begun.unlink(missing_ok=True)
    write_text_features(layout.empty, features.empty, dtype=dtype)
    for number in range(len(features.prompts)):
        assert features.evaluation is not None
        one = text_rows(features.evaluation, slice(number, number + 1))
        write_text_features(layout.evaluation(number + 1), one, dtype=dtype)
    meta = {"format": FORMAT, **made_by}
    write_json(layout.evaluation_meta, meta | {"prompts": list(features.prompts)})
    write_json(layout.empty_meta, meta)


def read_prompt_features(folder: Path, *, made_by: dict[str, Any]) -> PromptFeatures | None:
    """Read both sets; None where there are none, or where other text encoders made them (said in the log)."""
    layout = PromptLayout(folder)
    meta = read_meta(layout.empty_meta, flag="--prompt_folder")
    if meta is None:
        return None
    if any(meta.get(key) != value for key, value in made_by.items()):
        log.warning("--prompt_folder %s: made by other text encoders than the cache; its prompts are not used", folder)
        return None
    evaluation = read_meta(layout.evaluation_meta, flag="--prompt_folder") or {}
    prompts = tuple(evaluation.get("prompts", ()))
    paths = [layout.empty, *(layout.evaluation(number + 1) for number in range(len(prompts)))]
    empty, *rows = (read_text_features(path, flag="--prompt_folder") for path in paths)
    return PromptFeatures(empty=empty, prompts=prompts, evaluation=concatenate_text(rows) if rows else None)

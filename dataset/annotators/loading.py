"""Loading of networks by name through transformers: whole, from safetensors, and without code of strangers."""

from typing import Any

from library.errors import UserError, first_line


def load_whole(kind: Any, name: str, *, flag: str, **options: Any) -> Any:
    """Call `kind.from_pretrained(name)` of a configuration, processor or model class of transformers.

    A model's weights must be safetensors and all there: transformers itself would fill gaps with random numbers.
    Code that comes with weights is never run. Raises `UserError` beginning with `flag`.
    """
    is_model = "dtype" in options
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True}
    try:
        loaded = kind.from_pretrained(name, trust_remote_code=False, **options)
    except ImportError as error:
        raise UserError(
            f"{flag}: needs a package that isn't installed ({first_line(error)}); most need no more than "
            "pip install -e '.[vision]'"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{flag}: can't be loaded ({first_line(error)}); give a hub name or a local folder of transformers"
        ) from None
    if not is_model:
        return loaded
    model, info = loaded
    bad = sorted({*info["missing_keys"], *(each[0] for each in info["mismatched_keys"])})
    if bad:
        raise UserError(f"{flag}: {len(bad)} of its tensors are missing or don't fit, the first {bad[0]}")
    return model

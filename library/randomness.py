"""Random streams that are a pure function of what they are for: no global state, no rank, no history.

Every random number of training comes from a generator seeded by (seed, purpose, step or name, index). Hence two
processes draw what one process with accumulation 2 draws, and a resumed run needs no saved random state.
"""

from hashlib import blake2b

import torch


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` into a seed of 63 bits; the same parts give the same seed on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator for `parts`, on the CPU unless told otherwise: noise drawn there is the same on every device."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))

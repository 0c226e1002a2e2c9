"""Patterns of floors and walls: how much of the second colour shows at a point, and how much brighter or darker it is.

All take plane coordinates u, v in units of the pattern's own scale and return `share` and `tone`, each (B, N). Built
from correctly rounded operations only (the hash has no sine), see geometry.py.
"""

from collections.abc import Callable

from torch import Tensor


def _fraction(x: Tensor) -> Tensor:
    return x - x.floor()


def hashed(x: Tensor, y: Tensor) -> Tensor:
    """A repeatable value in [0, 1) for each pair of whole numbers."""
    a, b = _fraction(x * 0.1031), _fraction(y * 0.1137)
    mixed = a * (b + 33.33) + b * (a + 19.19)
    a, b = _fraction(a + mixed), _fraction(b + mixed * 1.37)
    return _fraction((a + b) * (a + 1.7) * 43.7)


def _noise(u: Tensor, v: Tensor) -> Tensor:
    """Smooth value noise in [0, 1]."""
    x, y = u.floor(), v.floor()
    s, t = u - x, v - y
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    low = hashed(x, y) * (1 - s) + hashed(x + 1, y) * s
    high = hashed(x, y + 1) * (1 - s) + hashed(x + 1, y + 1) * s
    return low * (1 - t) + high * t


def _line(u: Tensor, half_width: float) -> Tensor:
    """1 on lines at whole numbers, else 0."""
    f = _fraction(u)
    return ((f < half_width) | (f > 1 - half_width)).float()


def _planks(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    row = u.floor()
    along = v / 5.5 + hashed(row, row * 0 + 7)
    grain = _noise(u * 7.0, v * 0.7) - 0.5
    joint = _line(u, 0.02).maximum(_line(along, 0.005))
    return (hashed(row, along.floor()) * 0.8 + grain * 0.25).clamp(0, 1), (1 + grain * 0.10) * (1 - 0.45 * joint)


def _checker(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    odd = _fraction((u.floor() + v.floor()) * 0.5) * 2
    return odd, 1 + (hashed(u.floor(), v.floor()) - 0.5) * 0.06


def _tiles(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    grout = _line(u, 0.025).maximum(_line(v, 0.025))
    return grout, 1 + (hashed(u.floor(), v.floor()) - 0.5) * 0.14 * (1 - grout)


def _stripes(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _fraction(u.floor() * 0.5) * 2, v * 0 + 1


def _speckle(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return (_noise(u * 1.7, v * 1.7) - 0.2).clamp(0, 1), 0.93 + 0.14 * _noise(u * 0.5, v * 0.5)


def _plain(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return u * 0, u * 0 + 1


def _grass(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _noise(u * 1.9, v * 1.9) * 0.6 + _noise(u * 0.37, v * 0.37) * 0.4, 0.9 + 0.2 * _noise(u * 6.1, v * 6.1)


def _sand(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    bend = v + (_noise(u * 0.4, v * 0.4) - 0.5) * 2.4
    ripple = (_fraction(bend) - 0.5).abs() * 2
    return ripple * ripple * (3 - 2 * ripple), u * 0 + 1


def _paving(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    row = v.floor()
    u = u * 0.6 + _fraction(row * 0.5)
    grout = _line(u, 0.018).maximum(_line(v, 0.03))
    return grout, 1 + (hashed(u.floor(), row) - 0.5) * 0.3 * (1 - grout)


TEXTURES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "planks": _planks,
    "checker": _checker,
    "tiles": _tiles,
    "stripes": _stripes,
    "speckle": _speckle,
    "plain": _plain,
    "grass": _grass,
    "sand": _sand,
    "paving": _paving,
}

"""The measures of the embedded model as rows of one table: names, what each is shown beside, what it must be.

The protocols are described where they are computed (`library/evaluation/embedded.py`); all rates are fractions, PSNR
is the mean of dB.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MISSED = "MISSED"  # the verdict on a measure that doesn't keep a bound
_COMPARE: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """What a measure must be: at most or at least a value, or that share of another measure when `of` names one."""

    sign: str
    value: float
    of: str | None = None

    def met(self, key: str, values: Mapping[str, float]) -> bool:
        """Tell whether the measure `key` keeps the bound; NaN never does. What `of` names must have been measured."""
        limit = self.value if self.of is None else self.value * values[self.of]
        return _COMPARE[self.sign](values[key], limit)

    def describe(self) -> str:
        """Return the bound as it is printed, such as `<= 0.08`."""
        return f"{self.sign} {self.value:g}" + (f" x {self.of}" if self.of else "")


def at_most(value: float, *, of: str | None = None) -> Bound:
    """Return the bound of a measure that must be small."""
    return Bound(sign="<=", value=value, of=of)


def at_least(value: float) -> Bound:
    """Return the bound of a measure that must be large."""
    return Bound(sign=">=", value=value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One row: the key in the JSON, words for a person, the keys printed beside it, and its bounds."""

    key: str
    label: str
    beside: tuple[str, ...] = ()
    must: tuple[Bound, ...] = ()
    digits: int = 3


MEASURES: tuple[Measure, ...] = (
    Measure(key="depth_absrel_constant", label="the set: AbsRel of a constant map", must=(at_least(0.28),)),
    Measure(
        key="depth_absrel_mean_map", label="the set: AbsRel of the training scenes' mean map", must=(at_least(0.14),)
    ),
    Measure(key="depth_absrel_luminance", label="the set: AbsRel of luminance as disparity", must=(at_least(0.25),)),
    Measure(
        key="median_objects",
        label="the set: median number of objects of 50 pixels or more",
        must=(at_least(3),),
        digits=1,
    ),
    Measure(key="colors", label="the set: object colours", must=(at_least(12),), digits=0),
    Measure(
        key="ae_psnr_rgb", label="autoencoder, picture, dB", beside=("pca_psnr_rgb",), must=(at_least(36),), digits=1
    ),
    Measure(
        key="ae_psnr_depth", label="autoencoder, depth, dB", beside=("pca_psnr_depth",), must=(at_least(47),), digits=1
    ),
    Measure(
        key="ae_psnr_rgb_noise", label="the same with 10 % latent noise, picture, dB", must=(at_least(34),), digits=1
    ),
    Measure(
        key="ae_psnr_depth_noise", label="the same with 10 % latent noise, depth, dB", must=(at_least(42),), digits=1
    ),
    Measure(key="ae_hue_kept", label="objects whose colour the autoencoder keeps", must=(at_least(0.98),)),
    Measure(
        key="depth_absrel",
        label="depth estimation, AbsRel",
        beside=(
            "depth_absrel_constant",
            "depth_absrel_mean_map",
            "depth_absrel_luminance",
            "depth_absrel_autoencoder",
        ),
        must=(at_most(0.08), at_most(0.35, of="depth_absrel_mean_map")),
    ),
    Measure(
        key="depth_delta1",
        label="depth estimation, delta1",
        beside=("depth_delta1_constant", "depth_delta1_mean_map", "depth_delta1_autoencoder"),
        must=(at_least(0.95),),
    ),
    Measure(
        key="d2i_ratio",
        label="depth to image, consistency over chance",
        beside=("d2i_absrel", "d2i_absrel_shuffled"),
        must=(at_most(0.4),),
    ),
    Measure(
        key="d2i_color_words",
        label="depth to image, prompt colours found in the picture",
        beside=("d2i_color_words_shuffled",),
    ),
    Measure(
        key="d2i_shape_words",
        label="depth to image, prompt's coloured solids found",
        beside=("d2i_shape_words_shuffled",),
    ),
    Measure(
        key="joint_absrel",
        label="joint generation, depth against picture, AbsRel",
        must=(at_most(0.08),),
        beside=("joint_absrel_true_pairs",),
    ),
    Measure(
        key="joint_ratio",
        label="the same over chance",
        beside=("joint_absrel_shuffled",),
        must=(at_most(0.5),),
    ),
    Measure(
        key="color_words",
        label="prompt colours found in the picture",
        beside=("color_words_shuffled", "color_words_ceiling"),
        must=(at_least(0.85),),
    ),
    Measure(
        key="color_words_shuffled",
        label="the same with another prompt (chance)",
        beside=("color_words_overlap",),
        must=(at_most(0.4),),
    ),
    Measure(
        key="shape_words",
        label="prompt's coloured solids found in the picture",
        beside=("shape_words_shuffled", "shape_words_ceiling"),
        must=(at_least(0.7),),
    ),
    Measure(
        key="shape_words_shuffled",
        label="the same with another prompt (chance)",
        beside=("shape_words_overlap",),
        must=(at_most(0.15),),
    ),
    Measure(
        key="shape_classifier_accuracy",
        label="the same test on true pictures (the classifier's own accuracy)",
        beside=("shape_classifier_precision",),
    ),
    Measure(
        key="feature_distance_ratio",
        label="generated to true pictures, distance of features over that of two true halves",
        beside=("feature_distance_generated", "feature_distance_real", "feature_distance_ratio_ceiling"),
        digits=2,
    ),
    Measure(
        key="seconds_20_joint_steps",
        label="20 joint steps of one pair, seconds",
        beside=("threads",),
        must=(at_most(3),),
        digits=2,
    ),
)


def rows(values: Mapping[str, float]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield (key, value, beside, must, verdict) as text for each measure that was made."""
    for measure in MEASURES:
        if measure.key not in values:
            continue
        beside = ", ".join(
            f"{_short(key, measure.key)} {_number(values[key], measure.digits)}"
            for key in measure.beside
            if key in values
        )
        must = " and ".join(bound.describe() for bound in judged(measure, values))
        verdict = "" if not must else "ok" if keeps_bounds(measure, values) else MISSED
        yield measure.key, _number(values[measure.key], measure.digits), beside, must, verdict


def keeps_bounds(measure: Measure, values: Mapping[str, float]) -> bool:
    """Tell whether a measure that was made keeps all its bounds that can be judged."""
    return all(bound.met(measure.key, values) for bound in judged(measure, values))


def judged(measure: Measure, values: Mapping[str, float]) -> list[Bound]:
    """Return a measure's bounds but for shares of measures that weren't made."""
    return [bound for bound in measure.must if bound.of is None or bound.of in values]


def missed(values: Mapping[str, float]) -> list[str]:
    """Return the keys of the measures that were made and miss a bound."""
    return [measure.key for measure in MEASURES if measure.key in values and not keeps_bounds(measure, values)]


def text_table(values: Mapping[str, float]) -> str:
    """Return the measures as aligned text for a terminal."""
    table = [("measure", "value", "beside", "must", ""), *rows(values)]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown_table(values: Mapping[str, float]) -> str:
    """Return the measures as a Markdown table in words, for the documentation."""
    labels = {measure.key: measure.label for measure in MEASURES}
    lines = ["| measure | value | beside | must |", "|---|---|---|---|"]
    for key, value, beside, must, verdict in rows(values):
        lines.append(f"| {labels[key]} (`{key}`) | {value} | {beside} | {must}{', missed' * (verdict == MISSED)} |")
    return "\n".join(lines)


def figures_of(result: object) -> dict[str, float]:
    """Return the measures of what a JSON file held, numbers only; nothing if it holds no result."""
    found = {row.key: result.get(row.key) for row in MEASURES} if isinstance(result, Mapping) else {}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def compared(values: Mapping[str, float], earlier: Mapping[str, float]) -> str:
    """Return each measure that both results have, as `key: earlier -> now`."""
    keys: Sequence[Measure] = [row for row in MEASURES if row.key in values and row.key in earlier]
    return "\n".join(
        f"{row.key}: {_number(earlier[row.key], row.digits)} -> {_number(values[row.key], row.digits)}" for row in keys
    )


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _short(key: str, base: str) -> str:
    """Drop from a baseline's key the words that it shares with the measure beside which it is printed."""
    return key.removeprefix(base + "_").removeprefix(base.rsplit("_", 1)[0] + "_")

"""The paper's ablation on a small model: its arms, what is claimed of them, and what the figures say.

Every arm differs from the full method in one thing or two; all share base model, data, steps and seeds. `verdict`
decides by the spread over seeds alone: the held-out scenes are the same for all arms, so the spread doesn't hold what
other scenes would add.

Nothing here trains or measures: that is `scripts/ablation.py`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train: which scheduling weights (`library.jointdit.attention.WEIGHTINGS`), which sampling."""

    label: str
    weighting: str
    unbalanced: bool = True


# The first four are the paper's Tables 3 and 4; the others are controls with unbalanced sampling.
ARMS: dict[str, Arm] = {
    "neither": Arm(label="neither technique", weighting="none", unbalanced=False),
    "sampling": Arm(label="unbalanced sampling only", weighting="none"),
    "weights": Arm(label="scheduling weights only", weighting="released", unbalanced=False),
    "both": Arm(label="both: the full method", weighting="released"),
    "half": Arm(label="control: constant weight 0.5", weighting="constant_0.5"),
    "constant": Arm(label="control: constant weight 0.82", weighting="constant_0.82"),
    "paper": Arm(label="control: the paper's formula", weighting="paper"),
    "reversed": Arm(label="control: reversed direction", weighting="reversed"),
    "unconnected": Arm(label="control: no joint connection", weighting="unconnected"),
}

# JointDiT, Tables 3 and 4: AbsRel x 100 of depth on NYUv2 and ScanNet, FID on COCO.
PAPER_COLUMNS = ("NYUv2 AbsRel x 100", "ScanNet AbsRel x 100", "COCO FID")
PAPER: dict[str, tuple[float, float, float]] = {
    "neither": (8.8, 10.4, 15.17),
    "sampling": (7.8, 8.7, 13.76),
    "weights": (6.4, 7.2, 11.13),
    "both": (5.7, 6.6, 11.27),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One measure of the table, by its key in `evaluate_tiny.py`'s JSON."""

    key: str
    label: str
    lower_is_better: bool = True


COLUMNS = (
    Column(key="depth_absrel", label="depth AbsRel"),
    Column(key="depth_delta1", label="depth delta1", lower_is_better=False),
    Column(key="d2i_absrel", label="AbsRel of depth to image"),
    Column(key="d2i_ratio", label="AbsRel of depth to image over chance"),
    Column(key="joint_absrel", label="AbsRel of joint generation"),
    Column(key="joint_ratio", label="AbsRel of joint generation over chance"),
    Column(key="color_words", label="colours found", lower_is_better=False),
    Column(key="shape_words", label="coloured solids found", lower_is_better=False),
    Column(key="feature_distance_ratio", label="feature distance over real's"),
)
# What the claims are tested on: depth, and of what is generated only what a collapsed model can't do well.
JUDGED = ("depth_absrel", "d2i_ratio", "joint_ratio", "feature_distance_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`better` is said to do better than `worse`: by the paper, or by us for a control that is to mean something."""

    text: str
    better: str
    worse: str
    of_paper: bool = False


CLAIMS = (
    Claim(text="Both techniques do better than neither", better="both", worse="neither", of_paper=True),
    Claim(text="Unbalanced sampling alone does better than neither", better="sampling", worse="neither", of_paper=True),
    Claim(text="Scheduling weights alone do better than neither", better="weights", worse="neither", of_paper=True),
    Claim(text="Scheduling weights help on top of unbalanced sampling", better="both", worse="sampling", of_paper=True),
    Claim(text="Unbalanced sampling helps on top of scheduling weights", better="both", worse="weights", of_paper=True),
    Claim(text="Scheduling does better than a constant weight of 0.5", better="both", worse="half"),
    Claim(text="Scheduling does better than a constant weight of 0.82", better="both", worse="constant"),
    Claim(text="The released formula does better than the paper's", better="both", worse="paper"),
    Claim(text="The direction matters: better than reversed weights", better="both", worse="reversed"),
    Claim(text="The joint connection is needed: better than without", better="both", worse="unconnected"),
)

# Two-sided 95 % quantiles of Student's t by degrees of freedom; from 30 on the normal distribution's is near enough.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10,
        2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05)  # fmt: skip
_T95_MANY = 1.96
RULE = (
    "Rule: a difference of means counts when it exceeds its 95 % margin, Student's t times the pooled standard "
    "deviation over seeds times sqrt(1/n + 1/m). With one seed there is no spread and nothing is decided. Of many "
    "comparisons one in twenty passes by chance. That runs of one seed share their noise and order isn't used."
)

# Figures of one trained model by measure; of an arm by seed; of everything by arm.
Figures = Mapping[str, float]
Results = Mapping[str, Mapping[int, Figures]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the figures say of one claim on one measure: `outcome` is "holds", "contradicted" or "not decided".

    `leaning` is "better", "worse" or "equal", by the means alone.
    """

    outcome: str
    leaning: str
    better: float
    worse: float
    margin: float

    @property
    def difference(self) -> float:
        """Mean of the arm said to be better minus that of the other one."""
        return self.better - self.worse

    @property
    def words(self) -> str:
        """The outcome; of one that isn't decided, which way the means lean."""
        return self.outcome if self.outcome != "not decided" else f"not decided, {self.leaning} in the mean"


def verdict(better: Sequence[float], worse: Sequence[float], *, lower_is_better: bool = True) -> Verdict:
    """Compare two arms' figures by `RULE`."""
    margin = _margin(better, worse)
    means = statistics.fmean(better), statistics.fmean(worse)
    gain = means[1] - means[0] if lower_is_better else means[0] - means[1]
    outcome = "holds" if gain > margin else "contradicted" if gain < -margin else "not decided"
    leaning = "better" if gain > 0 else "worse" if gain < 0 else "equal"
    return Verdict(outcome=outcome, leaning=leaning, better=means[0], worse=means[1], margin=margin)


def _margin(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the 95 % margin of a difference of means, infinite where either has one value alone."""
    n, m = len(first), len(second)
    if n < 2 or m < 2:
        return math.inf
    freedom = n + m - 2
    pooled = math.sqrt(((n - 1) * statistics.variance(first) + (m - 1) * statistics.variance(second)) / freedom)
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else _T95_MANY
    return quantile * pooled * math.sqrt(1 / n + 1 / m)


def verdicts(results: Results) -> list[tuple[Claim, Column, Verdict]]:
    """Return the verdict of every claim whose two arms have results, on every judged measure."""
    judged = [column for column in COLUMNS if column.key in JUDGED]
    return [
        (claim, column, verdict(*pair, lower_is_better=column.lower_is_better))
        for claim in CLAIMS
        for column in judged
        if all(pair := (_values(results, claim.better, column.key), _values(results, claim.worse, column.key)))
    ]


def summary(results: Results) -> dict[str, Any]:
    """Return figures, means, spreads and verdicts in a form that JSON can hold."""
    return {
        "arms": {
            name: {
                "label": ARMS[name].label,
                "weighting": ARMS[name].weighting,
                "unbalanced_sampling": ARMS[name].unbalanced,
                "seeds": {str(seed): dict(figures) for seed, figures in seeds.items()},
                "mean": {c.key: statistics.fmean(_values(results, name, c.key)) for c in COLUMNS},
                "standard_deviation": {c.key: _spread(_values(results, name, c.key)) for c in COLUMNS},
            }
            for name, seeds in results.items()
        },
        "paper": {name: dict(zip(PAPER_COLUMNS, values, strict=True)) for name, values in PAPER.items()},
        "rule": RULE,
        "claims": [
            {
                "claim": claim.text,
                "better": claim.better,
                "worse": claim.worse,
                "measure": column.key,
                "of_paper": claim.of_paper,
                "outcome": found.outcome,
                "in_the_mean": found.leaning,
                "difference": found.difference,
                "margin": found.margin if math.isfinite(found.margin) else None,
            }
            for claim, column, found in verdicts(results)
        ],
    }


def report(results: Results, *, facts: str) -> str:
    """Return the tables and the verdicts as Markdown; `facts` says what was trained and measured."""
    parts = [
        "# Ablation",
        facts,
        "## Beside the paper (its Tables 3 and 4)",
        "In brackets the change against neither technique.",
        _beside_paper(results),
        "## All arms",
        _table(results),
        "## What holds here",
        RULE,
    ]
    found = verdicts(results)
    if not found:
        return "\n\n".join([*parts, "No two arms of any claim have results yet."]) + "\n"
    for heading, of_paper in (("Claims of the paper:", True), ("Controls:", False)):
        bullets = [text for claim in CLAIMS if claim.of_paper == of_paper and (text := _in_words(claim, found))]
        parts += [heading, "\n".join(bullets)] if bullets else []
    return "\n\n".join([*parts, "In figures:", _verdict_table(found)]) + "\n"


def _table(results: Results) -> str:
    """Return mean and standard deviation of each arm's figures."""
    rows = [
        [ARMS[name].label, str(len(seeds)), *(_mean_and_spread(_values(results, name, c.key)) for c in COLUMNS)]
        for name, seeds in results.items()
    ]
    return _markdown(["arm", "seeds", *(f"{c.label} (`{c.key}`)" for c in COLUMNS)], rows)


def _beside_paper(results: Results) -> str:
    """Return the paper's four arms: depth and look of pictures here, and what the paper has for both."""

    def here(name: str, key: str, *, scale: float = 1.0) -> str:
        values, without = _values(results, name, key), _values(results, "neither", key)
        change = _change(statistics.fmean(values), statistics.fmean(without)) if values and without else ""
        return _mean_and_spread(values, scale=scale) + change

    rows = []
    for name, paper in PAPER.items():
        told = [f"{value}{_change(value, without)}" for value, without in zip(paper, PAPER["neither"], strict=True)]
        depth, look = here(name, "depth_absrel", scale=100), here(name, "feature_distance_ratio")
        rows.append([ARMS[name].label, depth, *told[:2], look, told[2]])
    depth_heads = ["here: depth AbsRel x 100", *(f"paper: {head}" for head in PAPER_COLUMNS[:2])]
    return _markdown(["arm", *depth_heads, "here: feature distance over real's", f"paper: {PAPER_COLUMNS[2]}"], rows)


def _in_words(claim: Claim, found: Sequence[tuple[Claim, Column, Verdict]]) -> str:
    """Return what became of a claim, the measures with the same outcome together; nothing where it has no results."""
    by_words: dict[str, list[str]] = {}
    for told, column, each in found:
        if told is claim:
            by_words.setdefault(each.words, []).append(column.label)
    outcomes = "; ".join(f"**{words}** ({', '.join(labels)})" for words, labels in by_words.items())
    return f"- {claim.text}: {outcomes}." if outcomes else ""


def _verdict_table(found: Sequence[tuple[Claim, Column, Verdict]]) -> str:
    rows = [
        [
            f"`{claim.better}` against `{claim.worse}`",
            f"`{column.key}`",
            *(f"{value:.4f}" for value in (each.better, each.worse)),
            f"{each.difference:+.4f}",
            f"{each.margin:.4f}" if math.isfinite(each.margin) else "one seed",
            each.outcome,
        ]
        for claim, column, each in found
    ]
    return _markdown(["arms", "measure", "first", "second", "difference", "margin", "outcome"], rows)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def _values(results: Results, arm: str, key: str) -> list[float]:
    return [figures[key] for figures in results.get(arm, {}).values()]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean_and_spread(values: Sequence[float], *, scale: float = 1.0) -> str:
    """Return the mean and, of several values, the standard deviation; a dash for none."""
    if not values:
        return "-"
    digits, spread = 4 if scale == 1 else 2, _spread(values)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean + (f" ± {scale * spread:.{digits}f}" if spread is not None else "")


def _change(value: float, without: float) -> str:
    """Return the change against the arm with neither technique in brackets; nothing where there is none."""
    return f" ({100 * (value / without - 1):+.0f} %)" if value != without else ""

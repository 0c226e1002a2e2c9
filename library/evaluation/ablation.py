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
    Column(key="d2i_absrel", label="depth to image AbsRel"),
    Column(key="d2i_ratio", label="the same over chance"),
    Column(key="joint_absrel", label="joint AbsRel"),
    Column(key="joint_ratio", label="the same over chance"),
    Column(key="color_words", label="colours found", lower_is_better=False),
    Column(key="shape_words", label="coloured solids found", lower_is_better=False),
    Column(key="feature_distance_ratio", label="feature distance over real's"),
)
# What the claims are tested on: depth, and of what is generated only what a collapsed model can't do well.
JUDGED = ("depth_absrel", "d2i_ratio", "joint_ratio", "feature_distance_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """`better` is said to do better than `worse`."""

    text: str
    better: str
    worse: str


CLAIMS = (
    Claim(text="Both techniques do better than neither", better="both", worse="neither"),
    Claim(text="Unbalanced sampling alone does better than neither", better="sampling", worse="neither"),
    Claim(text="Scheduling weights alone do better than neither", better="weights", worse="neither"),
    Claim(text="Scheduling weights help on top of unbalanced sampling", better="both", worse="sampling"),
    Claim(text="Unbalanced sampling helps on top of scheduling weights", better="both", worse="weights"),
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
    "comparisons one in twenty passes by chance."
)

# Figures of one trained model by measure; of an arm by seed; of everything by arm.
Figures = Mapping[str, float]
Results = Mapping[str, Mapping[int, Figures]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the figures say of one claim on one measure: `outcome` is "holds", "contradicted" or "not decided"."""

    outcome: str
    better: float
    worse: float
    margin: float

    @property
    def difference(self) -> float:
        """Mean of the arm said to be better minus that of the other one."""
        return self.better - self.worse


def verdict(better: Sequence[float], worse: Sequence[float], *, lower_is_better: bool = True) -> Verdict:
    """Compare two arms' figures by `RULE`."""
    margin = _margin(better, worse)
    means = statistics.fmean(better), statistics.fmean(worse)
    gain = means[1] - means[0] if lower_is_better else means[0] - means[1]
    outcome = "holds" if gain > margin else "contradicted" if gain < -margin else "not decided"
    return Verdict(outcome=outcome, better=means[0], worse=means[1], margin=margin)


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
                "outcome": found.outcome,
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
        _table(results),
        "In the paper (Tables 3 and 4):",
        _paper_table(),
        "## What holds here",
    ]
    parts += [RULE, *_sentences(results)]
    return "\n\n".join(parts) + "\n"


def _table(results: Results) -> str:
    """Return mean and standard deviation of each arm's figures."""
    lines = [
        "| arm | seeds | " + " | ".join(f"{c.label} (`{c.key}`)" for c in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, seeds in results.items():
        cells = [_mean_and_spread(_values(results, name, column.key)) for column in COLUMNS]
        lines.append(f"| {ARMS[name].label} | {len(seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _paper_table() -> str:
    lines = ["| arm | " + " | ".join(PAPER_COLUMNS) + " |", "|---" * (len(PAPER_COLUMNS) + 1) + "|"]
    return "\n".join(
        lines + [f"| {ARMS[name].label} | " + " | ".join(map(str, row)) + " |" for name, row in PAPER.items()]
    )


def _sentences(results: Results) -> list[str]:
    """Return a sentence for each verdict, those of one claim together."""
    found = verdicts(results)
    if not found:
        return ["No two arms of any claim have results yet."]
    paragraphs = []
    for claim in CLAIMS:
        lines = [_sentence(column, each) for told, column, each in found if told is claim]
        if lines:
            paragraphs.append("\n".join([f"**{claim.text}** (`{claim.better}` against `{claim.worse}`):", *lines]))
    return paragraphs


def _sentence(column: Column, found: Verdict) -> str:
    margin = f"margin {found.margin:.4f}" if math.isfinite(found.margin) else "one seed, so no margin"
    return (
        f"- {column.key}: {found.outcome}; {found.better:.4f} against {found.worse:.4f}, "
        f"difference {found.difference:+.4f}, {margin}"
    )


def _values(results: Results, arm: str, key: str) -> list[float]:
    return [figures[key] for figures in results.get(arm, {}).values()]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = _spread(values)
    return f"{statistics.fmean(values):.4f}" + (f" ± {spread:.4f}" if spread is not None else "")

import json
import math

import pytest

from library.evaluation.ablation import ARMS, CLAIMS, COLUMNS, JUDGED, PAPER, RULE, report, summary, verdict, verdicts
from library.jointdit.attention import WEIGHTINGS


def figures(depth):
    return dict.fromkeys((column.key for column in COLUMNS), 0.5) | {"depth_absrel": depth}


def results(**depths):
    return {name: {seed: figures(depth) for seed, depth in enumerate(row, 1)} for name, row in depths.items()}


def test_every_arm_trains_with_weights_that_exist_and_no_two_are_the_same():
    assert {arm.weighting for arm in ARMS.values()} <= set(WEIGHTINGS)
    assert len({(arm.weighting, arm.unbalanced) for arm in ARMS.values()}) == len(ARMS)
    assert set(PAPER) == {"neither", "sampling", "weights", "both"}


def test_claims_name_arms_and_judged_measures_exist():
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} == set(ARMS)
    assert set(JUDGED) <= {column.key for column in COLUMNS}


def test_a_difference_counts_only_beyond_the_spread():
    clear = verdict([0.10, 0.11, 0.12], [0.20, 0.21, 0.22])
    # Pooled standard deviation 0.01, 4 degrees of freedom: 2.78 x 0.01 x sqrt(2 / 3).
    assert clear.outcome == "holds" and clear.margin == pytest.approx(2.78 * 0.01 * math.sqrt(2 / 3))
    assert clear.difference == pytest.approx(-0.1)
    assert verdict([0.10, 0.20, 0.30], [0.12, 0.22, 0.32]).outcome == "not decided"


def test_swapping_the_arms_or_the_direction_turns_the_verdict():
    low, high = [0.10, 0.11, 0.12], [0.20, 0.21, 0.22]
    assert verdict(high, low).outcome == "contradicted"
    assert verdict(high, low, lower_is_better=False).outcome == "holds"


def test_one_seed_decides_nothing():
    assert verdict([0.1], [0.9]).outcome == "not decided"
    assert verdict([0.1], [0.9, 0.91]).margin == math.inf


def test_claims_without_results_are_left_out():
    told = {claim.text for claim, _, _ in verdicts(results(both=[0.1, 0.1], neither=[0.2, 0.2], paper=[0.1]))}
    assert told == {"Both techniques do better than neither", "The released formula does better than the paper's"}
    assert verdicts(results(both=[0.1])) == []


def test_the_summary_is_json_with_means_spreads_and_outcomes():
    told = json.loads(json.dumps(summary(results(both=[0.1, 0.12], neither=[0.5])), allow_nan=False))
    assert told["arms"]["both"]["mean"]["depth_absrel"] == pytest.approx(0.11)
    assert told["arms"]["both"]["standard_deviation"]["depth_absrel"] == pytest.approx(0.02 / math.sqrt(2))
    assert told["arms"]["neither"]["standard_deviation"]["depth_absrel"] is None
    assert told["paper"]["both"]["COCO FID"] == 11.27
    assert [(each["outcome"], each["margin"]) for each in told["claims"]] == [("not decided", None)] * len(JUDGED)


def test_the_report_stands_beside_the_paper():
    text = report(results(both=[0.10, 0.11, 0.12], neither=[0.20, 0.21, 0.22]), facts="What was run.")
    assert "What was run." in text and RULE in text
    assert "| both: the full method | 11.00 ± 1.00 (-48 %) | 5.7 (-35 %) | 6.6 (-37 %) | 0.5000 ± 0.0000 |" in text
    assert "| neither technique | 21.00 ± 1.00 | 8.8 | 10.4 | 0.5000 ± 0.0000 | 15.17 |" in text
    assert "| unbalanced sampling only | - | 7.8 (-11 %) | 8.7 (-16 %) | - | 13.76 (-9 %) |" in text
    assert "| both: the full method | 3 | 0.1100 ± 0.0100 |" in text


def test_the_report_says_in_words_what_holds():
    text = report(results(both=[0.10, 0.11, 0.12], neither=[0.20, 0.21, 0.22], half=[0.09, 0.11, 0.1]), facts="")
    told = text.split("Claims of the paper:")[1]
    assert (
        "- Both techniques do better than neither: **holds** (depth AbsRel); **not decided, equal in the mean**" in told
    )
    controls = told.split("Controls:")[1]
    assert "constant weight of 0.5: **not decided, worse in the mean** (depth AbsRel)" in controls
    assert "| `both` against `neither` | `depth_absrel` | 0.1100 | 0.2100 | -0.1000 | 0.0227 | holds |" in controls
    assert "reversed" not in controls  # an arm without results


def test_one_seed_or_one_arm_is_told():
    assert "| one seed | not decided |" in report(results(both=[0.1], neither=[0.2]), facts="")
    assert "No two arms" in report(results(both=[0.1]), facts="")

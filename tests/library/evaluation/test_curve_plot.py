import numpy as np
import pytest

from library.evaluation.curve_plot import BOTTOM, COLORS, HEIGHT, WIDTH, Plot, draw, nice_ticks


def plot(**changes):
    values = {"title": "Depth", "x_label": "steps", "curves": {"absrel": [(1, 0.3), (8, 0.1), (50, 0.09)]}}
    return Plot(**(values | changes))


def columns_of(picture, color):
    """Return the columns in which a colour can be seen."""
    near = np.abs(np.asarray(picture).astype(int) - np.array(color)).max(-1) < 30
    return near.any(0).nonzero()[0]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.09, 0.3], [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]), ([0.0], [0, 1e-6]), ([-1, 1], [-1, -0.5, 0, 0.5, 1])],
)
def test_ticks_are_round_and_enclose_the_values(values, ticks):
    found = nice_ticks(values)
    assert found[0] <= min(values) and found[-1] >= max(values) and len(found) >= 2
    if len(ticks) > 2:
        assert found == pytest.approx(ticks)


def test_a_curve_goes_from_the_left_to_the_right_end_of_its_axes():
    picture = draw([plot()])
    assert picture.size == (WIDTH, HEIGHT)
    columns = columns_of(picture, COLORS[0])
    assert columns.max() - columns.min() > 0.75 * WIDTH
    assert len(columns_of(picture, COLORS[1])) == 0


def test_two_plots_stand_side_by_side_and_a_third_below():
    assert draw([plot(), plot()]).size == (2 * WIDTH, HEIGHT)
    assert draw([plot(), plot(), plot(log=False)]).size == (2 * WIDTH, 2 * HEIGHT)


def test_a_single_point_can_be_drawn_and_none_is_refused():
    assert len(columns_of(draw([plot(curves={"absrel": [(4, 0.2)]})]), COLORS[0])) > 0
    with pytest.raises(ValueError, match="'Depth' has no points"):
        plot(curves={"absrel": []})


def test_labels_of_the_horizontal_axis_neither_meet_nor_leave_the_picture():
    def rows_of_labels(*xs):
        picture = np.asarray(draw([plot(curves={"absrel": [(x, 0.5) for x in xs]}, log=False)]).convert("L"))
        return picture[HEIGHT - BOTTOM + 4 : HEIGHT - BOTTOM + 20] < 128

    far_apart = rows_of_labels(512, 110_400)
    assert np.array_equal(rows_of_labels(512, 640, 110_400), far_apart)  # 640 would stand on 512
    assert far_apart[:, WIDTH // 2 :].any() and not far_apart[:, -1].any()

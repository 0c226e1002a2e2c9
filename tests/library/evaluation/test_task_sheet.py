import numpy as np
import torch
from PIL import ImageFont

from library.evaluation.task_sheet import CELL, GROUPS, MARGIN, SPACE, SheetScene, draw_sheet, wrap

NAMES = [name for columns in GROUPS.values() for name in columns]


def scene(caption):
    """Return a scene whose pictures are plain: colours by their place, depth all far."""
    pictures = {
        name: torch.full((3, CELL, CELL), 0.3) if name.endswith("rgb") else torch.zeros(CELL, CELL) for name in NAMES
    }
    return SheetScene(caption=caption, pictures=pictures)


def test_lines_are_no_wider_than_asked_and_lose_no_word():
    font = ImageFont.load_default(14)
    text = "a large red ball left of a blue box with an extraordinarilylongword behind them"
    lines = wrap(text, font=font, width=120)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 120 or " " not in line for line in lines)
    assert wrap("short", font=font, width=120) == ["short"]


def test_all_pictures_stand_in_rows_of_equal_distance():
    sheet = np.asarray(draw_sheet([scene("a ball"), scene("a cone")], note="seed 1"))
    grey = (sheet == round(0.3 * 255)).all(-1)
    far = (sheet == (13, 8, 52)).all(-1)
    rows, columns = (grey | far).all(1), (grey | far)
    picture_rows = np.flatnonzero(columns.sum(1) >= len(NAMES) * CELL)
    assert len(picture_rows) == 2 * CELL and not rows.any()
    first, second = picture_rows[0], picture_rows[CELL]
    starts = np.flatnonzero(np.diff(columns[first].astype(int)) == 1)
    assert len(starts) == len(NAMES) and starts[0] == MARGIN - 1
    assert second - first - CELL > SPACE  # a caption and the space between scenes
    one_more = draw_sheet([scene("a ball"), scene("a cone"), scene("a box")], note="seed 1")
    assert one_more.height - len(sheet) == second - first


def test_a_long_caption_makes_room_for_itself():
    short, long = (draw_sheet([scene(text)], note="") for text in ("a ball", "a ball left of a cone " * 12))
    assert long.height > short.height and long.width == short.width

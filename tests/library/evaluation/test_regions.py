import torch

from library.evaluation.regions import connected_regions, describe_regions, opened


def test_regions_are_connected_pixels_of_one_label_in_one_picture():
    labels = torch.tensor([[[0, 0, 1], [1, 0, 1], [1, 0, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 0]]])
    ids = connected_regions(labels)
    assert len(ids[0].unique()) == 3  # the two parts of label 1 don't touch
    assert ids[0, 0, 0] == ids[0, 2, 2] != ids[1, 0, 0]
    assert ids[0, 1, 0] == ids[0, 2, 0] != ids[0, 0, 2]
    assert len(ids[1].unique()) == 1


def test_a_long_winding_region_is_one():
    labels = torch.zeros(1, 21, 21, dtype=torch.long)
    labels[0, 1::4, :-1] = 1
    labels[0, 3::4, 1:] = 1
    assert len(connected_regions(labels)[labels == 0].unique()) == 1


def test_measures_of_a_square():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 2:5, 3:7] = 4
    regions = describe_regions(labels)
    square = int((regions.label_R == 4).nonzero())
    assert regions.area_R[square] == regions.box_R[square] == 12
    assert regions.border_R[square] == 0
    assert regions.border_R[1 - square] == 28


def test_opening_removes_what_is_thin():
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    mask[0, 1:5, 1:5] = True
    mask[0, 7] = True
    cleaned = opened(mask, radius=1)
    assert cleaned[0, 1:5, 1:5].all() and not cleaned[0, 7].any()

"""Islands of labels vanish or join what they lie in."""

import numpy as np
from lungssl_tasks.tidying import tidy


def test_islands_go_and_pieces_within_a_lung_join_the_nearest_lobe() -> None:
    labels = np.zeros((7, 9, 11), np.uint8)
    labels[1:6, 2:7, 1:6] = 1
    labels[1:6, 2:7, 6:10] = 2
    clean = labels.copy()
    assert (tidy(labels) == clean).all()
    labels[3, 4, 3] = 2  # in the middle of 1
    labels[2:4, 3:5, 8] = 1  # a piece in 2
    labels[0, 0, 0] = 1  # far off
    labels[6, 8, 10] = 3  # a label whose only part is off: it stays, it is its largest
    assert (tidy(labels)[labels != 3] == clean[labels != 3]).all()
    assert tidy(labels)[6, 8, 10] == 3 and tidy(labels)[0, 0, 0] == 0


def test_nothing_and_one_voxel_stay_what_they_are() -> None:
    empty = np.zeros((3, 4, 5), np.uint8)
    assert not tidy(empty).any()
    empty[1, 2, 3] = 4
    assert (tidy(empty) == empty).all()


def test_a_part_that_touches_by_a_corner_joins() -> None:
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[:3, :3, :3] = 1
    labels[3, 3, 3] = 1  # by a corner: another part by six neighbours, the same foreground
    assert (tidy(labels) == labels).all()
    labels[3, 3, 3] = 2
    assert tidy(labels)[3, 3, 3] == 2  # the only part of its label

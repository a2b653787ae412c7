import numpy as np

from rayseg.vision.region_merging import borders, merged_regions, summed


def test_borders_count_the_pixels_on_which_segments_meet_and_leave_no_data_out():
    segments_HW = np.array([[1, 1, 2], [1, 3, 2], [0, 3, 2]])
    assert borders(segments_HW).tolist() == [[1, 2, 1], [1, 3, 2], [2, 3, 2]]
    assert borders(np.ones((3, 3), int)).shape == (0, 3)


def test_borders_of_several_tiles_add_up_in_any_order():
    rows = np.array([[4, 2, 3], [2, 4, 5], [9, 2, 1], [4, 4, 7]])  # a segment has no border with itself
    assert summed(rows).tolist() == summed(rows[::-1]).tolist() == [[2, 4, 8], [2, 9, 1]]


def _row(means, areas):
    """Segments in a row, each with a border of 10 px to the next."""
    count = len(means)
    edges = np.array([[at, at + 1, 10] for at in range(count - 1)])
    return np.array(means, float)[:, None], np.array(areas, float), edges


def test_a_weak_border_goes_and_a_strong_one_stays_however_small_its_segment_is():
    # Two halves of a field, and a roof of 64 px on it whose colour differs by 40.
    means, areas, edges = _row([50, 52, 92], [5000, 5000, 64])
    assert merged_regions(means, areas, edges, contrast=1200).tolist() == [0, 0, 1]
    # 4 * 2500 / 10 = 1000 for the field, 1640 * 63 / 10 = 10,400 for the roof
    assert merged_regions(means, areas, edges, contrast=999).tolist() == [0, 1, 2]
    assert merged_regions(means, areas, edges, contrast=20_000).tolist() == [0, 0, 0]
    assert merged_regions(means, areas, edges, contrast=0).tolist() == [0, 1, 2]


def test_no_chain_of_small_steps_joins_two_fields():
    means, areas, edges = _row(np.linspace(0, 90, 10), [500] * 10)
    regions = merged_regions(means, areas, edges, contrast=20_000)
    assert regions[0] != regions[-1]
    assert len(set(regions)) < 10


def test_the_cheapest_pair_merges_first():
    # The middle segment is nearer to the right one; together they are too far from the left one.
    means, areas, edges = _row([0, 12, 20], [1000, 1000, 1000])
    assert merged_regions(means, areas, edges, contrast=8000).tolist() == [0, 1, 1]


def test_equal_segments_merge_into_one_region_in_few_rounds():
    count = 5000
    regions = merged_regions(*_row([7] * count, [10] * count), contrast=1)
    assert set(regions) == {0}

import numpy as np

from rayseg.vision.segments import agreeing, alike, groups, united

NONE = np.zeros((0, 2), int)


def test_segments_that_both_tiles_found_alike_are_paired_where_their_border_cuts_them():
    one = np.array([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 3, 3], [0, 0, 5, 5]])
    other = np.array([[7, 7, 7, 7], [7, 7, 7, 7], [4, 4, 4, 9], [0, 0, 5, 5]])
    pairs = agreeing(one, other, np.s_[:, 1:3])
    assert pairs.tolist() == [[3, 4], [5, 5]]  # half of 7 is not more than half of it; 0 is no segment
    assert agreeing(one, other, np.s_[:, 0:2]).tolist() == [[3, 4]]  # the other pair is not at this border


def test_what_is_united_has_one_number_over_all_tiles_and_numbers_have_no_gaps():
    tables = united([3, 2, 2], {(0, 1): np.array([[3, 1]]), (1, 2): np.array([[1, 2]])})
    assert [table[0] for table in tables] == [0, 0, 0]
    assert tables[0][3] == tables[1][1] == tables[2][2]
    assert sorted(set(np.concatenate([table[1:] for table in tables]).tolist())) == [1, 2, 3, 4, 5]


def test_tiles_without_neighbours_or_segments_keep_their_own_numbers():
    assert [table.tolist() for table in united([2, 0, 1], {})] == [[0, 1, 2], [0], [0, 3]]
    assert united([], {}) == []


def test_instances_are_the_same_when_more_than_half_of_both_is():
    one, other = np.zeros((2, 10, 20), np.int32)
    one[:, 0:5], one[:, 10:16] = 1, 2
    other[:, 0:4], other[:, 4:13], other[:, 13:16] = 7, 8, 9
    assert alike(one, other, least=0.5).tolist() == [[1, 7]]
    assert alike(one, np.zeros_like(one), least=0.5).tolist() == []


def test_groups_follow_chains():
    assert groups(5, np.array([(0, 3), (3, 4)])).tolist() == [0, 1, 2, 0, 0]
    assert groups(3, NONE).tolist() == [0, 1, 2]
    assert groups(0, NONE).tolist() == []

import time

import numpy as np
import pytest

from hf_pathology.report.heatmap import attention_picture, draw_heatmap, percentile_ranks, round_length


GREY = np.full((40, 60, 3), 200, np.uint8)
EXTENT = (16.0, 16.0)  # level-0 pixels of an overview pixel


def paint(xy, scores, **options):
    options = {"scaling": "raw", "alpha": 1.0, "colormap": "gray"} | options
    return draw_heatmap(GREY, EXTENT, np.array(xy), (128.0, 128.0), np.array(scores), **options)


def test_tiles_are_painted_and_nothing_else_is():
    picture = paint([[0, 0], [320, 160]], [0.0, 1.0])
    expected = GREY.copy()
    expected[0:8, 0:8] = 0
    expected[10:18, 20:28] = 255
    np.testing.assert_array_equal(picture, expected)


def test_overlapping_tiles_are_averaged():
    picture = paint([[0, 0], [64, 0]], [0.0, 0.8])
    np.testing.assert_array_equal(picture[0, :12, 0], [0] * 4 + [102] * 4 + [204] * 4)


def test_tiles_at_the_edge_are_cut_off_and_tiny_ones_still_seen():
    edge = paint([[880, 560]], [0.0])
    assert (edge[35:, 55:] == 0).all() and np.count_nonzero(edge == 0) == 5 * 5 * 3
    tiny = draw_heatmap(GREY, EXTENT, np.array([[100, 100]]), (4.0, 4.0), np.array([0.0]), scaling="raw", alpha=1.0)
    assert (tiny != GREY).any(axis=-1).sum() == 1


def test_neighbouring_tiles_leave_no_gap_when_corners_are_rounded():
    xy = np.rint(np.arange(40)[:, None] * [100.4, 0]).astype(int)
    overview = np.full((4, 400, 3), 255, np.uint8)
    for extent in (9.99, 10.04, 10.5, 13.37):
        picture = draw_heatmap(overview, (extent, extent), xy, (100.4, 100.4), np.zeros(40), scaling="raw", alpha=1.0)
        painted = (picture[0] != 255).any(axis=-1)
        assert painted[: np.flatnonzero(painted)[-1]].all()


def test_a_heat_map_is_transparent_and_its_slide_grey():
    pink = np.full((40, 60, 3), (220, 120, 180), np.uint8)
    picture = draw_heatmap(pink, EXTENT, np.array([[0, 0]]), (128.0, 128.0), np.array([1.0]), scaling="raw", alpha=0.0)
    assert len(set(picture[0, 0].tolist())) == 1
    np.testing.assert_array_equal(picture[20, 30], pink[20, 30])


def test_percentile_ranks_know_order_only():
    scores = np.array([5.0, -1.0, 1e6, 0.0])
    np.testing.assert_allclose(percentile_ranks(scores), [0.625, 0.125, 0.875, 0.375])
    np.testing.assert_allclose(percentile_ranks(np.array([2.0, 2.0])), [0.5, 0.5])
    np.testing.assert_array_equal(paint([[0, 0]], [7.0], scaling="rank"), paint([[0, 0]], [0.5]))


def test_scores_that_are_missing_or_no_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores are not finite"):
        percentile_ranks(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="1 scores for 2 tiles"):
        paint([[0, 0], [128, 0]], [1.0])


def test_a_hundred_thousand_tiles_take_less_than_a_second():
    columns, rows = np.meshgrid(np.arange(400), np.arange(250))
    xy = np.stack([columns.ravel(), rows.ravel()], axis=1) * 224
    overview = np.full((640, 1024, 3), 255, np.uint8)
    began = time.process_time()
    picture = draw_heatmap(overview, (87.5, 87.5), xy, (224.0, 224.0), np.arange(len(xy)))
    assert time.process_time() - began < 1
    assert (picture != 255).any(axis=-1).all()


def test_the_slide_stands_beside_its_heat_map_pixel_for_pixel():
    overview = np.random.default_rng(0).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    picture = attention_picture(
        overview, EXTENT, np.array([[0, 0]]), (128.0, 128.0), np.array([1.0]), mpp=(0.5, 0.5), name="weight"
    )
    assert picture.dtype == np.uint8 and picture.shape[0] == 300 and picture.shape[1] > 800
    np.testing.assert_array_equal(picture[:200, :400], overview[:200])


@pytest.mark.parametrize(("limit", "length"), [(733.0, 500.0), (1000.0, 1000.0), (0.3, 0.2), (49.9, 20.0)])
def test_scale_bars_have_round_lengths(limit, length):
    assert round_length(limit) == pytest.approx(length)

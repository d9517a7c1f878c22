import numpy as np
import pytest

from hf_pathology.report.pca import SlidePatches, draw_patches, fit_colours, read_patches


def test_colours_are_the_same_every_time_and_everywhere():
    features = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32) * [9, 5, 3, 1, 1, 1, 1, 1]
    first, again = (fit_colours(features, seed=0, max_patches=200) for _ in range(2))
    np.testing.assert_array_equal(first(features), again(features))
    components = first.pca.components_
    assert (components[np.arange(3), np.abs(components).argmax(axis=1)] > 0).all()
    assert np.abs(components).argmax(axis=1).tolist() == [0, 1, 2]


def test_outliers_do_not_pale_the_other_colours():
    features = np.random.default_rng(0).normal(size=(1000, 4)) * [3, 2, 1, 0.1]
    plain = fit_colours(features, seed=0)(features)
    features[:5, 0] = 40
    assert np.abs(fit_colours(features, seed=0)(features[5:]).astype(int) - plain[5:]).mean() < 25


def test_too_few_patches_are_refused():
    with pytest.raises(ValueError, match="need 4 patches"):
        fit_colours(np.zeros((3, 16)), seed=0)


def test_patches_are_painted_at_their_places_and_nothing_else_is():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 5)).astype(np.float32)
    xy = np.array([[0, 0], [20, 0], [40, 0], [0, 20], [20, 20], [60, 40]], float)
    patches = SlidePatches(np.zeros((8, 8, 3), np.uint8), (10.0, 10.0), xy, (20.0, 20.0), features)
    colours = fit_colours(features, seed=0)
    picture = draw_patches(patches, colours)
    np.testing.assert_array_equal(picture[4:6, 6:8].reshape(-1, 3), np.tile(colours(features)[5], (4, 1)))
    assert (picture[6:] == 255).all() and (picture[:4, 6:] == 255).all()


def test_patches_of_a_slide_lie_where_its_tiles_do(tiled, encoder):
    slide, grid = tiled[1][0]
    with slide.open() as opened:
        patches = read_patches(grid, opened, encoder, max_tiles=5, max_edge=100)
        everything = read_patches(grid, opened, encoder)
    assert len(patches.features) == 5 * 16 and len(everything.features) == len(grid) * 16
    assert patches.patch_extent == (16.0, 16.0)
    assert max(patches.overview.shape) == 100
    height, width = patches.overview.shape[:2]
    assert patches.xy.min() == 0
    np.testing.assert_allclose((patches.xy.max(axis=0) + 16) / patches.extent, [width, height], atol=1)

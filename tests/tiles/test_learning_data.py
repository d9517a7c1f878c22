"""The tiles of the learning experiment: each version has lost exactly what it says it has lost."""

import sys

import learning_data
import numpy as np
import pytest
from PIL import Image

from hf_pathology.tiles.folder import read_tile, read_tile_folder


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """What the script writes of 48 tiles whose colours tell their class, and what it prints."""
    folder, out = tmp_path_factory.mktemp("tiles"), tmp_path_factory.mktemp("out")
    rng, rows = np.random.default_rng(0), ["path,class,group,split"]
    for label, name in enumerate("ab"):
        for i in range(24):
            stain = rng.normal(0, 25, (96, 96, 1)) * [1.0, 1.2, 0.5 + 0.3 * label] + rng.normal(0, 12, (96, 96, 3))
            tile = np.clip(stain + [150 + 40 * label, 130, 180 - 5 * (i % 3)], 0, 255).astype(np.uint8)
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(tile).save(folder / name / f"{i:02}.jpg", quality=95)
            rows.append(f"{name}/{i:02}.jpg,{name},{name}{i // 2},{'train' if i < 16 else 'val'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    arguments = ["learning_data.py", str(folder), str(out), "--whiten", "--grey", "--untrained", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        learning_data.main()
    return folder, out


def pixels_of(folder):
    tiles = read_tile_folder(folder)
    return np.stack([read_tile(tiles.folder / path) for path in tiles.paths])


def test_every_version_has_the_same_tiles_classes_groups_and_splits(versions):
    folder, out = versions
    given = read_tile_folder(folder)
    for name in ("raw", "controlled", "whitened", "grey"):
        tiles = read_tile_folder(out / name)
        assert [path.split(".")[0] for path in tiles.paths] == [path.split(".")[0] for path in given.paths]
        for field in ("labels", "groups", "splits"):
            np.testing.assert_array_equal(getattr(tiles, field), getattr(given, field))
    assert (out / "raw" / given.paths[0]).read_bytes() == (folder / given.paths[0]).read_bytes()


def test_controlled_tiles_have_one_mean_and_spread_and_keep_their_correlations(versions):
    _, out = versions
    (before_means, before), (means, after) = (
        learning_data.moments(pixels_of(out / name)) for name in ("raw", "controlled")
    )
    spreads = np.sqrt(np.diagonal(after, axis1=1, axis2=2))
    assert np.ptp(before_means, axis=0).max() > 30
    assert np.ptp(means, axis=0).max() < 0.5 and np.ptp(spreads, axis=0).max() < 0.5
    correlation = [
        covariances[:, 0, 2] / np.sqrt(covariances[:, 0, 0] * covariances[:, 2, 2]) for covariances in (before, after)
    ]
    np.testing.assert_allclose(*correlation, atol=0.03)


def test_whitened_tiles_have_one_covariance(versions):
    _, out = versions
    means, covariances = learning_data.moments(pixels_of(out / "whitened"))
    spreads = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    correlations = covariances / spreads[:, :, None] / spreads[:, None, :]
    assert np.ptp(means, axis=0).max() < 0.5 and np.ptp(spreads, axis=0).max() < 0.5
    assert np.ptp(correlations, axis=0).max() < 0.03


def test_grey_tiles_have_one_histogram_and_keep_the_order_of_their_values(versions):
    _, out = versions
    before, after = (pixels_of(out / name) for name in ("raw", "grey"))
    histograms = np.stack([np.bincount(tile[..., 0].reshape(-1), minlength=256) for tile in after])
    assert (histograms == histograms[0]).all() and (after == after[..., :1]).all()
    for old, new in zip(before[:5], after[:5]):
        old, new = learning_data.grey(old).reshape(-1), new[..., 0].reshape(-1)
        assert (np.diff(new[np.lexsort((new, old))].astype(int)) >= 0).all()


def test_what_is_left_of_a_tiles_numbers_is_random_and_not_what_clipping_leaves():
    rng = np.random.default_rng(0)
    dark = np.clip(rng.normal(40, 60, (96, 96, 3)), 0, 255).astype(np.uint8)
    mean, covariance = np.full(3, 120.0), np.diag(np.full(3, 40.0**2))
    tiles = np.stack([learning_data.control(dark, seed, mean, covariance) for seed in range(60)])
    left = tiles.mean(axis=(1, 2)) - mean
    assert left.std() == pytest.approx(learning_data.WOBBLE, rel=0.25)
    assert abs(left.mean()) < 3 * learning_data.WOBBLE / np.sqrt(left.size)


def test_the_transport_makes_the_covariance_and_is_symmetric():
    rng = np.random.default_rng(0)
    have, wanted = (a @ a.T + np.eye(3) for a in rng.normal(size=(2, 3, 3)))
    matrix = learning_data.transport(have, wanted)
    np.testing.assert_allclose(matrix @ have @ matrix.T, wanted)
    np.testing.assert_allclose(matrix, matrix.T)

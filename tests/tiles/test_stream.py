import json
from itertools import islice

import numpy as np
import pytest
import torch
from damage import spoil_tiles

from hf_pathology.errors import UserError
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.tissue import Tissue
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.tiles.stream import block_table


def as_it_is(row):
    return {"pixels": row["tile"]}


def loader(cohort, **changes):
    options = {"batch_size": 8, "block": 2, "window": 4, "seed": 0, "workers": 0, **changes}
    return TileLoader(*cohort, as_it_is, **options)


def names(batches):
    """The slide and corner of every tile of the batches, in order."""
    return [(slide, *xy) for batch in batches for slide, xy in zip(batch["slide"], batch["xy"].tolist())]


def take(stream, count):
    return list(islice(iter(stream), count))


def tiles_of(cohort):
    return {(grid.slide, *xy) for grid in cohort[0] for xy in grid.xy.tolist()}


def test_every_tile_is_in_one_block_with_its_neighbours(cohort):
    table = block_table(cohort[0], 2)
    seen = [(cohort[0][row["slide"]].slide, *xy) for row in table for xy in row["xy"]]
    assert sorted(seen) == sorted(tiles_of(cohort))
    assert max(np.ptp(row["xy"], axis=0).max() for row in table) == 64


def test_an_epoch_holds_every_tile_once(cohort):
    total = len(tiles_of(cohort))
    assert total % 8 == 0
    seen = names(take(loader(cohort), total // 8))
    assert sorted(seen) == sorted(tiles_of(cohort))


def test_pixels_belong_to_their_names(cohort):
    batch = take(loader(cohort), 1)[0]
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"].shape == (8, 64, 64, 3)
    for pixels, slide, (x, y) in zip(batch["pixels"], batch["slide"], batch["xy"].tolist()):
        expected = (60 + 60 * int(slide[6]), x // 64 * 28 + 20, y // 64 * 28 + 20)
        assert pixels[8:-8, 8:-8].float().mean(dim=(0, 1)).tolist() == pytest.approx(expected, abs=4)


def test_epochs_differ_and_runs_of_one_seed_do_not(cohort):
    epoch = len(tiles_of(cohort)) // 8
    two = names(take(loader(cohort), 2 * epoch))
    assert two[: len(two) // 2] != two[len(two) // 2 :]
    assert two == names(take(loader(cohort), 2 * epoch))
    assert two != names(take(loader(cohort, seed=1), 2 * epoch))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_resume_gives_exactly_the_tiles_that_would_have_followed(cohort, workers):
    straight = names(take(loader(cohort, workers=workers), 30))
    first = loader(cohort, workers=workers)
    begun = names(take(first, 13))
    state = json.loads(json.dumps(first.state_dict()))
    second = loader(cohort, workers=workers)
    second.load_state_dict([state])
    assert begun + names(take(second, 17)) == straight


def test_ranks_read_different_tiles_and_together_all_of_them(cohort):
    total = len(tiles_of(cohort))
    windows = -(-len(block_table(cohort[0], 2)) // 4)
    ranks = [loader(cohort, rank=rank, world=2, batch_size=1) for rank in range(2)]
    places: list[set] = [set(), set()]
    for rank, stream in enumerate(ranks):
        batches = iter(stream)
        while True:
            batch = next(batches)
            if stream.state_dict()["places"][0][0] >= windows:  # the next epoch has begun
                break
            places[rank] |= set(names([batch]))
    assert not places[0] & places[1]
    assert len(places[0] | places[1]) == total


def test_another_world_size_goes_on_from_the_first_unfinished_window(cohort):
    one = loader(cohort)
    done = names(take(one, 8))
    windows = one.state_dict()["places"][0][0]
    two = [loader(cohort, rank=rank, world=2) for rank in range(2)]
    for stream in two:
        stream.load_state_dict([one.state_dict()])
    assert [stream.state_dict()["places"][0][0] for stream in two] == (
        [windows, windows + 1] if windows % 2 == 0 else [windows + 1, windows]
    )
    left = len(tiles_of(cohort)) - len(done)
    following = names(take(two[0], left // 8)) + names(take(two[1], left // 8))
    assert set(done) | set(following) >= tiles_of(cohort)
    assert len(set(done) & set(following[: left // 2])) <= 16  # at most one window is read again


def test_tiles_that_cannot_be_read_are_left_out(cohort, tmp_path):
    path = tmp_path / "damaged.svs"
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3)).astype(np.uint8)
    write_aperio(path, noise, 0.5)
    grid = tile_grid(Slide(path), Tissue(np.ones((8, 8), bool), (64.0, 64.0)), key="damaged.svs", size=64, mpp=0.5)
    spoil_tiles(path, 0)
    _, valid = Slide(path).read_tiles(grid.xy, 64, 0.5)
    assert 0 < valid.sum() < 64
    stream = TileLoader([grid], [path], as_it_is, batch_size=int(valid.sum()), window=1000, workers=0)
    assert sorted(names(take(stream, 1))) == sorted(("damaged.svs", *xy) for xy in grid.xy[valid].tolist())


def test_grids_of_different_tiles_are_refused(cohort):
    grids, _ = cohort
    other = tile_grid(Slide(cohort[1][0]), Tissue(np.ones((8, 8), bool), (64.0, 64.0)), key="other", size=32, mpp=0.5)
    with pytest.raises(UserError, match="differ in tile size and mpp"):
        block_table([*grids, other], 2)


def test_a_batch_mixes_the_slides(cohort):
    batch = take(loader(cohort, window=16, batch_size=32), 1)[0]
    assert len(set(batch["slide"])) == 3

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
from hf_pathology.tiles.blocks import SlideBlocks, blocks_of
from hf_pathology.tiles.filters import FilterOptions, tile_filter
from hf_pathology.tiles.loader import TileLoader


def as_it_is(row):
    return {"pixels": row["tile"]}


def loader(cohort, **changes):
    options = {"batch_size": 8, "window": 4, "seed": 0, "workers": 0, **changes}
    return TileLoader(SlideBlocks(*cohort, 2), as_it_is, **options)


def names(batches):
    """The slide and corner of every tile of the batches, in order."""
    return [(slide, *xy) for batch in batches for slide, xy in zip(batch["slide"], batch["xy"].tolist())]


def take(stream, count):
    return list(islice(iter(stream), count))


def tiles_of(cohort):
    return {(grid.slide, *xy) for grid in cohort[0] for xy in grid.xy.tolist()}


def test_every_tile_is_in_one_block_with_its_neighbours(cohort):
    grids, paths = cohort
    blocks = [grid.xy[rows] for grid in grids for rows in blocks_of(grid, 2)]
    source = SlideBlocks(grids, paths, 2)
    assert len(source) == len(blocks)
    assert max(np.ptp(xy, axis=0).max() for xy in blocks) == 64
    assert [source.read([number]).xy.tolist() for number in range(len(source))] == [xy.tolist() for xy in blocks]
    assert sum(map(len, blocks)) == len(tiles_of(cohort))


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
    windows = -(-len(SlideBlocks(*cohort, 2)) // 4)
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
    spoil_tiles(path, 0)
    grid = tile_grid(Slide(path), Tissue(np.ones((8, 8), bool), (64.0, 64.0)), key="damaged.svs", size=64, mpp=0.5)
    _, valid = Slide(path).read_tiles(grid.xy, 64, grid.extent)
    assert 0 < valid.sum() < 64
    stream = TileLoader(SlideBlocks([grid], [path], 2), as_it_is, batch_size=int(valid.sum()), window=1000, workers=0)
    assert sorted(names(take(stream, 1))) == sorted(("damaged.svs", *xy) for xy in grid.xy[valid].tolist())


def test_grids_of_different_tiles_are_refused(cohort):
    grids, paths = cohort
    other = tile_grid(Slide(paths[0]), Tissue(np.ones((8, 8), bool), (64.0, 64.0)), key="other", size=32, mpp=0.5)
    with pytest.raises(UserError, match=r"differ in tile size \(\[32, 64\] px\)"):
        SlideBlocks([*grids, other], [*paths, paths[0]], 2)


def test_weights_decide_how_often_the_tiles_of_a_slide_are_seen(cohort):
    weights = [4.0, 1.0, 1.0]
    stream = TileLoader(SlideBlocks(*cohort, 2, weights=weights), as_it_is, batch_size=8, window=4, workers=0)
    seen = [slide for slide, _, _ in names(take(stream, 600))]
    tiles = np.array([len(grid) for grid in cohort[0]]) * weights
    shares = np.array([seen.count(grid.slide) for grid in cohort[0]]) / len(seen)
    assert shares == pytest.approx(tiles / tiles.sum(), abs=0.01)


def test_resume_is_exact_with_weights_too(cohort):
    def weighted():
        return TileLoader(SlideBlocks(*cohort, 2, weights=[3, 1, 2]), as_it_is, batch_size=8, window=4, workers=0)

    straight, first, second = names(take(weighted(), 30)), weighted(), weighted()
    begun = names(take(first, 13))
    second.load_state_dict([first.state_dict()])
    assert begun + names(take(second, 17)) == straight


def test_slides_at_two_resolutions_are_mixed_in_one_stream(cohort):
    grids, paths = cohort
    everywhere = Tissue(np.ones((8, 8), bool), (64.0, 64.0))
    coarse = tile_grid(Slide(paths[0]), everywhere, key=grids[0].slide, size=64, mpp=1.0)
    assert coarse.extent == (128, 128)
    source = SlideBlocks([grids[0], coarse], [paths[0], paths[0]], 2)
    seen = names(take(TileLoader(source, as_it_is, batch_size=16, window=8, workers=0), 5))
    assert sorted(seen) == sorted((grids[0].slide, *xy) for grid in (grids[0], coarse) for xy in grid.xy.tolist())


def test_tiles_that_a_filter_drops_are_left_out_and_resume_stays_exact(cohort):
    only_bright = tile_filter(FilterOptions(min_brightness=150))

    def filtered():
        source = SlideBlocks(*cohort, 2, tile_filter=only_bright)
        return TileLoader(
            source, lambda row: {"value": row["tile"].max(axis=2).mean()}, batch_size=4, window=4, workers=0
        )

    straight = take(filtered(), 20)
    assert all((batch["value"] >= 150).all() for batch in straight)
    first, second = filtered(), filtered()
    begun = names(take(first, 7))
    second.load_state_dict([first.state_dict()])
    assert begun + names(take(second, 13)) == names(straight)


def test_a_batch_mixes_the_slides(cohort):
    batch = take(loader(cohort, window=16, batch_size=32), 1)[0]
    assert len(set(batch["slide"])) == 3


def test_a_stream_without_a_single_good_tile_ends_with_the_cause_instead_of_hanging(cohort):
    source = SlideBlocks(*cohort, 2, tile_filter=tile_filter(FilterOptions(min_brightness=255)))
    with pytest.raises(UserError, match="not one tile of a whole epoch"):
        take(TileLoader(source, as_it_is, batch_size=4, window=4, workers=0), 1)


def test_a_slide_that_vanishes_is_named_and_the_others_go_on(tmp_path, cohort, capsys):
    grids, paths = cohort
    gone = tmp_path / "slide_0.svs"
    source = SlideBlocks(grids, [gone, *paths[1:]], 2)
    seen = {slide for slide, _, _ in names(take(TileLoader(source, as_it_is, batch_size=8, window=4, workers=0), 12))}
    assert seen == {"slide_1.svs", "slide_2.svs"}
    assert capsys.readouterr().err.count("slide_0.svs cannot be opened: No such file or directory") == 1

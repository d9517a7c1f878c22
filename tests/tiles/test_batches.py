import numpy as np
import pytest

from hf_pathology.errors import SlideError
from hf_pathology.slides.reader import Slide
from hf_pathology.tiles.batches import TileJob, read_batches
from hf_pathology.tiles.blocks import blocks_of


def jobs_of(cohort, block=2):
    for grid, path in zip(*cohort):
        slide = grid.open(path)
        for rows in blocks_of(grid, block):
            yield TileJob(slide, grid.xy[rows], grid.extent, rows, grid.slide)


@pytest.mark.parametrize(("threads", "batch_size", "ahead"), [(1, 16, 1), (3, 10, 2), (2, 1000, 3)])
def test_batches_hold_every_tile_once_with_its_pixels(cohort, threads, batch_size, ahead):
    seen = {}
    for batch in read_batches(jobs_of(cohort), 64, batch_size=batch_size, threads=threads, ahead=ahead):
        assert batch.valid.all() and len(batch.tiles) <= batch_size and not batch.errors
        place = 0
        for job in batch.jobs:
            for row in job.rows:
                seen[job.source, int(row)] = batch.tiles[place].copy()
                place += 1
    assert len(seen) == sum(len(grid) for grid in cohort[0])
    for grid, path in zip(*cohort):
        tiles, _ = Slide(path).read_tiles(grid.xy, 64, grid.extent)
        for row, tile in enumerate(tiles):
            assert np.array_equal(seen[grid.slide, row], tile)


def test_buffers_are_used_again(cohort):
    buffers = {batch.tiles.__array_interface__["data"][0] for batch in read_batches(jobs_of(cohort), 64, batch_size=8)}
    assert len(buffers) == 3


def test_jobs_are_asked_for_only_as_they_are_needed(cohort):
    taken = []

    def jobs():
        for job in jobs_of(cohort):
            taken.append(job)
            yield job

    batches = read_batches(jobs(), 64, batch_size=4, ahead=2)
    next(batches)
    assert len(taken) <= 4
    batches.close()


def test_a_slide_that_is_gone_is_an_error_of_its_jobs_alone(cohort, tmp_path):
    gone = Slide(tmp_path / "gone.svs", 0.5)
    bad = TileJob(gone, np.array([[0, 0], [64, 0]]), (64.0, 64.0), source="gone")
    batches = list(read_batches([bad, *jobs_of(cohort)], 64, batch_size=32))
    assert not batches[0].valid[:2].any() and batches[0].valid[2:].all()
    assert isinstance(batches[0].errors[0], SlideError) and "does not exist" in str(batches[0].errors[0])


def test_what_a_thread_raises_ends_the_reading_with_its_cause(cohort):
    class Broken(Slide):
        def read_tiles(self, *arguments):
            raise RuntimeError("the reader is broken")

    bad = TileJob(Broken(cohort[1][0]), np.array([[0, 0]]), (64.0, 64.0))
    with pytest.raises(RuntimeError, match="the reader is broken"):
        list(read_batches([*list(jobs_of(cohort))[:4], bad], 64, batch_size=4, threads=2))

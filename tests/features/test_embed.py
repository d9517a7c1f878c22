"""A cohort embedded as one stream: the same numbers however it is cut, honest about damage, shared and resumed safely."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import spoil_tiles
from transformers import ViTConfig, ViTModel

from hf_pathology.errors import SlideError, UserError
from hf_pathology.features.colour import MeanColour
from hf_pathology.features.embed import embed_cohort, own_share_first
from hf_pathology.features.encoder import load_encoder
from hf_pathology.features.resume import EmbedOptions
from hf_pathology.features.store import SlideFeatures, features_path
from hf_pathology.features.timing import Timing, advice
from hf_pathology.hub_upload.export import export_encoder
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import CohortSlide, find_slides
from hf_pathology.slides.grid import tile_grid
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tissue import Tissue


# A process that embeds the slides of a folder by their mean colours, a batch in 40 ms, and prints each slide.
PROCESS = """
import json, signal, sys, time
from hf_pathology.features.colour import MeanColour
from hf_pathology.features.embed import embed_cohort
from hf_pathology.features.resume import EmbedOptions
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.grid import TileGrid

class Slow(MeanColour):
    def __call__(self, tiles):
        time.sleep(0.04)
        return super().__call__(tiles)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which who started the tests may ignore
slides, out = sys.argv[1:]
pairs = [(slide, TileGrid.load(f"{slide.path}.grid")) for slide in find_slides(slides)]
for slide, result in embed_cohort(pairs, Slow(), out, EmbedOptions(batch_size=16)):
    print(json.dumps([slide.key, result.found]), flush=True)
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    folder = tmp_path_factory.mktemp("release") / "encoder"
    return load_encoder(export_encoder(ViTModel(config, add_pooling_layer=False), folder, tile_size=32, mpp=0.5))


def write_slides(folder: Path, count: int, edge: int = 256, size: int = 32):
    """`count` slides of noise, each wholly tissue, with their grids of edge-to-edge tiles, saved beside them."""
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (edge, edge, 3)).astype(np.uint8)
        write_aperio(folder / f"{number}.svs", pixels, 0.5)
    pairs = [(slide, grid_of(slide, size)) for slide in find_slides(folder)]
    for slide, grid in pairs:
        grid.save(f"{slide.path}.grid")
    return pairs


def grid_of(slide: CohortSlide, size: int = 32):
    with Slide(slide.path) as opened:
        tissue = Tissue(np.ones((8, 8), bool), tuple(edge / 8 for edge in opened.dimensions))
        return tile_grid(opened, tissue, key=slide.key, size=size, mpp=0.5)


def run(pairs, encoder, out, **options):
    return {slide.key: result for slide, result in embed_cohort(pairs, encoder, out, EmbedOptions(**options))}


def features_of(out, slide) -> SlideFeatures:
    return SlideFeatures.load(features_path(out, slide.key))


class Counting(MeanColour):
    """Counts what it is given, and does something before a batch."""

    def __init__(self, before=lambda number: None):
        self.sizes, self.before = [], before

    def __call__(self, tiles):
        self.before(len(self.sizes))
        self.sizes.append(len(tiles))
        return super().__call__(tiles)


@pytest.mark.parametrize(("batch_size", "threads"), [(7, 1), (64, 3), (500, 2)])
def test_features_do_not_depend_on_batches_and_threads(encoder, tmp_path, batch_size, threads):
    pairs = write_slides(tmp_path, 3)
    run(pairs, encoder, tmp_path / "out", batch_size=batch_size, threads=threads)
    for slide, grid in pairs:
        tiles, _ = Slide(slide.path).read_tiles(grid.xy, 32, grid.extent)
        one_by_one = torch.cat([encoder(torch.from_numpy(tile[None])) for tile in tiles])
        np.testing.assert_allclose(features_of(tmp_path / "out", slide).features, one_by_one.numpy(), atol=1e-5)


def test_batches_are_full_from_slide_to_slide(tmp_path):
    colours = Counting()
    run(write_slides(tmp_path, 3), colours, tmp_path / "out", batch_size=50)  # 64 tiles each
    assert colours.sizes == [50, 50, 50, 42]


def test_unreadable_tiles_are_masked_counted_and_never_filled(encoder, tmp_path):
    pairs = write_slides(tmp_path, 2, edge=512)
    spoil_tiles(pairs[0][0].path, 0)  # a quarter of the slide
    pairs = [(slide, grid_of(slide)) for slide, _ in pairs]
    results = run(pairs, encoder, tmp_path / "out", max_invalid=0.25)
    assert (results["0.svs"].tiles, results["0.svs"].unreadable, results["1.svs"].unreadable) == (256, 64, 0)
    bag = features_of(tmp_path / "out", pairs[0][0])
    assert (~bag.valid).sum() == 64 and np.isnan(bag.features[~bag.valid]).all()
    assert np.isfinite(bag.features[bag.valid]).all()


def test_a_slide_with_too_many_unreadable_tiles_fails_by_name_and_the_others_go_on(encoder, tmp_path):
    pairs = write_slides(tmp_path, 3, edge=512)
    spoil_tiles(pairs[1][0].path, 0)
    pairs = [(slide, grid_of(slide)) for slide, _ in pairs]
    results = run(pairs, encoder, tmp_path / "out")
    assert isinstance(results["1.svs"], SlideError)
    assert "1.svs has" in str(results["1.svs"]) and "of 256 tiles that cannot be read" in str(results["1.svs"])
    assert not features_path(tmp_path / "out", "1.svs").exists()
    assert results["0.svs"].unreadable == results["2.svs"].unreadable == 0


def test_what_is_embedded_is_found_and_left_as_it_is(encoder, tmp_path):
    pairs = write_slides(tmp_path, 2)
    run(pairs, encoder, tmp_path / "out")
    stamps = [features_path(tmp_path / "out", slide.key).stat().st_mtime_ns for slide, _ in pairs]
    again = run(pairs, encoder, tmp_path / "out")
    assert all(result.found and result.tiles == 64 for result in again.values())
    assert [features_path(tmp_path / "out", slide.key).stat().st_mtime_ns for slide, _ in pairs] == stamps


@pytest.mark.parametrize(
    "change",
    [
        lambda pair, encoder: (pair, replace(encoder, revision="other"), {}),
        lambda pair, encoder: (pair, replace(encoder, pooling="mean"), {}),
        lambda pair, encoder: ((pair[0], pair[1].select(np.arange(5))), encoder, {}),
        lambda pair, encoder: ((pair[0], pair[1].select(np.arange(64)[::-1])), encoder, {}),
        lambda pair, encoder: ((pair[0], grid_of(pair[0], 64)), encoder, {}),
        lambda pair, encoder: (pair, encoder, {"dtype": "float16"}),
        lambda pair, encoder: (rewritten(pair), encoder, {}),
    ],
    ids=["revision", "pooling", "fewer tiles", "other order", "tile size", "dtype", "slide file"],
)
def test_a_slide_is_embedded_again_when_what_decides_its_features_changes(encoder, tmp_path, change):
    pair = write_slides(tmp_path, 1)[0]
    run([pair], encoder, tmp_path / "out")
    pair, other, options = change(pair, encoder)
    assert not run([pair], other, tmp_path / "out", **options)["0.svs"].found
    assert run([pair], other, tmp_path / "out", **options)["0.svs"].found


def rewritten(pair):
    """The slide after its file was written anew with other pixels, and tiled again."""
    slide = pair[0]
    write_aperio(slide.path, np.full((256, 256, 3), 99, np.uint8), 0.5)
    return slide, grid_of(slide)


def test_a_damaged_feature_file_is_made_again(encoder, tmp_path):
    pairs = write_slides(tmp_path, 1)
    run(pairs, encoder, tmp_path / "out")
    path = features_path(tmp_path / "out", "0.svs")
    path.write_bytes(path.read_bytes()[:-100])
    assert not run(pairs, encoder, tmp_path / "out")["0.svs"].found
    assert len(features_of(tmp_path / "out", pairs[0][0])) == 64


def test_a_slide_that_vanishes_or_changes_during_the_run_fails_by_name(tmp_path):
    pairs = write_slides(tmp_path, 5)

    def disturb(number: int) -> None:
        if number == 0:  # the last slides are not open yet
            pairs[3][0].path.unlink()
            write_aperio(pairs[4][0].path, np.zeros((512, 256, 3), np.uint8), 0.5)

    results = run(pairs, Counting(disturb), tmp_path / "out", batch_size=16)
    assert "3.svs cannot be opened" in str(results["3.svs"]) and "4.svs has changed" in str(results["4.svs"])
    assert [results[f"{number}.svs"].tiles for number in range(3)] == [64, 64, 64]
    assert not features_path(tmp_path / "out", "4.svs").exists()


def test_a_slide_that_is_replaced_while_it_is_read_has_no_features(tmp_path):
    pairs = write_slides(tmp_path, 1)
    results = run(pairs, Counting(lambda number: rewritten(pairs[0])), tmp_path / "out", batch_size=64)
    assert "is gone or has changed while it was read" in str(results["0.svs"])
    assert not features_path(tmp_path / "out", "0.svs").exists()


def test_an_encoder_that_fails_ends_the_run_and_leaves_no_claim(tmp_path):
    pairs = write_slides(tmp_path, 4)

    def fail(number: int) -> None:
        if number == 6:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(pairs, Counting(fail), tmp_path / "out", batch_size=16, threads=2)
    assert not list((tmp_path / "out").rglob("*.lock"))
    results = run(pairs, Counting(), tmp_path / "out", batch_size=16)
    assert results["0.svs"].found and not results["3.svs"].found


def test_numbers_that_are_not_finite_are_no_features(tmp_path):
    class Overflowing(MeanColour):
        def __call__(self, tiles):
            return super().__call__(tiles) / torch.tensor(0.0)

    results = run(write_slides(tmp_path, 1), Overflowing(), tmp_path / "out")
    assert "of which mean colour makes no finite numbers" in str(results["0.svs"])


def test_a_disk_that_is_full_ends_the_run_with_its_cause_and_the_same_command_goes_on(tmp_path):
    pairs = write_slides(tmp_path, 2)
    (tmp_path / "out").mkdir()
    blocked = features_path(tmp_path / "out", "0.svs")
    blocked.with_name(f".{blocked.name}.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"0.svs.features.safetensors cannot be written: No space left on device; mend"
    ):
        run(pairs, Counting(), tmp_path / "out")
    assert not blocked.exists() and not list((tmp_path / "out").rglob("*.lock"))
    assert all(isinstance(result.tiles, int) for result in run(pairs, Counting(), tmp_path / "out").values())


def start(folder: Path, out: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", PROCESS, str(folder), str(out)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_on_one_folder_do_each_slide_once_and_both_know_all(tmp_path):
    pairs = write_slides(tmp_path, 12)
    both = [start(tmp_path, tmp_path / "out") for _ in range(2)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    told = [dict(map(json.loads, lines.splitlines())) for lines in printed]
    assert [sorted(each) for each in told] == [sorted(slide.key for slide, _ in pairs)] * 2
    assert all(told[0][slide.key] != told[1][slide.key] for slide, _ in pairs)  # one embedded it, the other found it
    assert all(not all(each.values()) for each in told)


def test_after_a_kill_the_next_run_finds_what_is_finished_and_does_the_rest(tmp_path):
    pairs = write_slides(tmp_path, 10)
    process = start(tmp_path, tmp_path / "out")
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    began = time.monotonic()
    results = run(pairs, MeanColour(), tmp_path / "out")
    assert time.monotonic() - began < 10  # no claim of the dead process is waited for
    assert results["0.svs"].found and not results["9.svs"].found
    assert all(np.isfinite(features_of(tmp_path / "out", slide).features).all() for slide, _ in pairs)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # fifty programs that load torch
def test_fifty_kills_leave_the_same_store_as_an_undisturbed_run(tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    pairs = write_slides(slides, 40)
    run(pairs, MeanColour(), tmp_path / "undisturbed")
    rng, kills, finished = np.random.default_rng(0), 0, 0
    while kills < 50:
        process = start(slides, out)
        process.stdout.readline()  # at work
        time.sleep(rng.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        files = list(out.glob("*.safetensors"))
        if len(files) == len(pairs):  # all done: some of it again
            finished += 1
            for path in files[::3]:
                path.unlink()
    done, _ = start(slides, out).communicate(timeout=120)
    assert len(done.split("\n")) == len(pairs) + 1
    for slide, _ in pairs:
        name = features_path(out, slide.key).name
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_ctrl_c_leaves_no_claim_and_no_half_written_file(tmp_path):
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    pairs = write_slides(slides, 12)
    process = start(slides, out)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    left = [path.name for path in out.rglob("*") if path.is_file()]
    assert 0 < len(left) < len(pairs) and all(name.endswith(".features.safetensors") for name in left)
    assert all(not result.found or result.tiles == 64 for result in run(pairs, MeanColour(), out).values())


def launch(words: list, **more) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", *map(str, words)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def write_tissue(folder: Path, count: int) -> None:
    for number in range(count):
        write_aperio(folder / f"{number}.svs", draw_slide(number, "solid", 512)[0], 0.5)


def test_processes_that_accelerate_launches_share_the_slides_and_write_one_honest_report(encoder, tmp_path):
    write_tissue(tmp_path, 4)
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    verb = ["hf_pathology.cli", "embed", tmp_path, "--encoder", encoder.name, "--out", tmp_path / "out"]
    words = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0, "-m", *verb]
    process = launch(words)
    printed, errors = process.communicate()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert process.returncode == 1 and "4 of 5 slides embedded" in printed, errors
    assert not report["complete"] and ["broken.svs is no slide" in problem for problem in report["problems"]] == [True]
    assert len(report["slides"]) == 4 and not any(facts["found"] for facts in report["slides"].values())
    assert report["timing"]["forward"] > 0 and "limited by" in report["advice"]
    assert "Where the time went" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_same_command_twice_at_the_same_time_ends_well_twice(encoder, tmp_path):
    write_tissue(tmp_path, 6)
    verb = ["hf_pathology.cli", "embed", tmp_path, "--encoder", encoder.name, "--out", tmp_path / "out"]
    both = [launch(verb) for _ in range(2)]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] and len(report["slides"]) == 6
    assert len(list((tmp_path / "out").glob("*.features.safetensors"))) == 6


def test_shares_are_balanced_by_tiles_and_end_with_those_of_the_others():
    slides = [(CohortSlide(str(n), Path(str(n)), "p"), range(n)) for n in (1, 2, 3, 4, 10)]
    orders = [[len(grid) for _, grid in own_share_first(slides, rank, 2)] for rank in range(2)]
    assert orders == [[10, 1, 2, 3, 4], [4, 3, 2, 1, 10]]


def test_grids_of_different_tile_sizes_are_refused(encoder, tmp_path):
    slide, grid = write_slides(tmp_path, 1)[0]
    with pytest.raises(UserError, match=r"the grids differ in tile size \(\[32, 64\] px\)"):
        list(embed_cohort([(slide, grid), (slide, grid_of(slide, 64))], encoder, tmp_path))


def test_the_time_of_a_slide_is_told_by_its_parts(encoder, tmp_path):
    results = run(write_slides(tmp_path, 2), encoder, tmp_path / "out", batch_size=48)
    for result in results.values():
        assert result.timing.forward > 0 and result.timing.decode > 0 and result.timing.write > 0


@pytest.mark.parametrize(
    ("timing", "threads", "on_gpu", "words"),
    [
        (Timing(read=1, decode=9, wait=8, forward=2), 2, True, "80% of the time the encoder waited for tiles; raise"),
        (Timing(read=9, decode=1, wait=8, forward=2), 2, True, "readers for the storage; raise"),
        (Timing(read=1, decode=9, wait=8, forward=2), 16, True, "all 16 cores are in use"),
        (Timing(transfer=3, forward=2), 2, True, "limited by copying"),
        (Timing(forward=2), 2, True, "--precision bfloat16"),
        (Timing(forward=2), 2, False, "use a GPU"),
        (Timing(), 2, False, "use a GPU"),
    ],
)
def test_the_advice_names_what_limits(timing, threads, on_gpu, words):
    assert words in advice(timing, threads=threads, cores=16, on_gpu=on_gpu)


def test_slides_are_read_from_a_fast_disk_when_asked_to(tmp_path):
    (tmp_path / "slides").mkdir()
    pairs = write_slides(tmp_path / "slides", 3)
    staged = dict(embed_cohort(pairs, MeanColour(), tmp_path / "staged", EmbedOptions(stage=tmp_path / "fast")))
    plain = dict(embed_cohort(pairs, MeanColour(), tmp_path / "plain"))
    assert len(staged) == len(plain) == 3 and list((tmp_path / "fast").iterdir()) == []
    for slide in staged:
        one, other = (SlideFeatures.load(features_path(tmp_path / out, slide.key)) for out in ("staged", "plain"))
        assert np.array_equal(one.features, other.features)

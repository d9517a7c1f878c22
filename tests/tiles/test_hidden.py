import itertools
import math
from functools import cache

import numpy as np
import pytest
from originals import FIXTURES, read_case

from hf_pathology.errors import UserError
from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches, draw_hidden_blocks


DRAWS = 10_000  # as many as the numbers of the original iBOT were taken from
IBOT = read_case(FIXTURES / "05_ibot_mask_stats.safetensors")
DINOV2 = read_case(FIXTURES / "14_dinov2_extras.safetensors")
NAMES = list(IBOT.meta["confs"])


@cache
def drawn(name: str) -> np.ndarray:
    """As many masks as the original drew with the arguments of configuration `name`, bool (DRAWS, h, w)."""
    arguments = IBOT.meta["confs"][name]
    shares, spreads = (np.atleast_1d(arguments[key]).tolist() for key in ("pred_ratio", "pred_ratio_var"))
    shape = "random" if arguments.get("pred_shape") == "rand" else "block"
    patches = HiddenPatches(HiddenOptions(shares, spreads, shape), arguments["H"], arguments["W"])
    rng = np.random.default_rng(0)
    return np.stack([patches.draw(rng) for _ in range(DRAWS)])


def of_original(name: str, what: str) -> np.ndarray:
    return IBOT.output[f"{name}/{what}"].double().numpy()


@pytest.mark.parametrize("name", NAMES)
def test_mean_spread_and_share_of_empty_masks_are_those_of_the_original(name):
    share = drawn(name).mean(axis=(1, 2))
    mean, std, none = of_original(name, "stats")
    assert share.mean() == pytest.approx(mean, abs=0.006)
    assert share.std() == pytest.approx(std, abs=0.006)
    assert (share == 0).mean() == pytest.approx(none, abs=0.015 if name == "list_0_03" else 0.006)


@pytest.mark.parametrize("name", NAMES)
def test_quantiles_of_the_hidden_share_are_those_of_the_original(name):
    # Of list_0_03, half of the masks are empty, so that its median is 0 or the smallest share of the others, by chance.
    levels = np.array(IBOT.meta["quantile_levels"])
    inner = (levels > 0) & (levels < 1) & ~((levels == 0.5) & (name == "list_0_03"))
    ours = np.quantile(drawn(name).mean(axis=(1, 2)), levels)
    np.testing.assert_allclose(ours[inner], of_original(name, "quantiles")[inner], atol=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_every_patch_is_hidden_as_often_as_in_the_original(name):
    ours, theirs = drawn(name).mean(axis=0), of_original(name, "per_cell_mask_prob")
    error = np.sqrt(2 * theirs * (1 - theirs) / DRAWS)
    assert np.abs((ours - theirs) / error).max() < 4.5  # of 1,200 cells in all, one is beyond this in a hundred trials


def single_rectangles(masks: np.ndarray) -> np.ndarray:
    """Heights and widths (n, 2) of the masks that are one whole rectangle."""
    rows, columns = masks.any(axis=2).sum(axis=1), masks.any(axis=1).sum(axis=1)
    whole = (masks.sum(axis=(1, 2)) == rows * columns) & (rows > 0)
    return np.stack([rows, columns], axis=1)[whole]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rand03v02"])
def test_single_blocks_are_as_frequent_and_as_oblong_as_in_the_original(name):
    sizes = single_rectangles(drawn(name))
    frequency = IBOT.meta["confs"][name]["stats"]["p_single_rect"]
    assert len(sizes) / DRAWS == pytest.approx(frequency, abs=4 * math.sqrt(2 * frequency / DRAWS))
    aspects = sizes[:, 0] / sizes[:, 1]
    for level, quantile in zip((0.05, 0.25, 0.5, 0.75, 0.95), of_original(name, "aspect_hw_quantiles")[1:-1]):
        # Aspects are few, so ranks are compared: the original's quantile must be about the same quantile of ours.
        error = 4 * math.sqrt(level * (1 - level) * 2 / (frequency * DRAWS))
        assert (aspects < quantile - 1e-9).mean() <= level + error
        assert (aspects < quantile + 1e-9).mean() >= level - error


@pytest.mark.parametrize("target", [0, 20, 60, 98])
def test_counts_of_the_dinov2_rule_are_those_of_the_original(target):
    mean, std, least, most = DINOV2.output[f"maskgen_target{target}_mean_std_min_max_count"].tolist()
    rng = np.random.default_rng(0)
    counts = np.array([draw_hidden_blocks(14, 14, target / 196, rng, rule="dinov2").sum() for _ in range(5000)])
    error = std * math.sqrt(1 / 1000 + 1 / len(counts))  # the original's are of 1,000 draws
    assert counts.mean() == pytest.approx(mean, abs=4 * error)
    assert counts.std() == pytest.approx(std, abs=0.25 * std)
    assert counts.max() == most and counts.min() == pytest.approx(least, abs=6)


@pytest.mark.parametrize("rule", ["ibot", "dinov2"])
@pytest.mark.parametrize("grid", [(14, 14), (6, 10), (16, 7)])
def test_blocks_never_hide_more_than_the_share(rule, grid):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.04, 0.1, 0.3, 0.5, 0.9):
        budget = share * grid[0] * grid[1] + 1e-9
        assert max(draw_hidden_blocks(*grid, share, rng, rule).sum() for _ in range(200)) <= budget


class Numbers:
    """Gives the same four numbers again and again: the area, the aspect, the top and the left of a block, 0 to 1."""

    def __init__(self, *numbers: float):
        self.random = itertools.cycle(numbers).__next__


@pytest.mark.parametrize(
    ("rule", "share", "area", "aspect", "size"),
    [
        ("ibot", 0.2, 1.0, 0.0, (5, 16)),  # all that is to be hidden, 80 patches, with an aspect of 0.3
        ("ibot", 0.2, 1.0, 1.0, (16, 5)),
        ("ibot", 0.2, 0.0, 0.5, (6, 6)),  # the square of a third of the edge
        ("ibot", 0.85, 1.0, 0.5, (18, 18)),
        ("dinov2", 0.2, 1.0, 0.0, (5, 16)),
        ("dinov2", 0.2, 0.0, 0.5, (2, 2)),  # 4 patches
        ("dinov2", 0.2, 0.0, 1.0, (4, 1)),
        ("dinov2", 0.85, 1.0, 0.5, (14, 14)),  # half of all patches
    ],
)
def test_the_largest_smallest_and_most_oblong_blocks_are_the_published_ones(rule, share, area, aspect, size):
    hidden = draw_hidden_blocks(20, 20, share, Numbers(area, aspect, 0.3, 0.0), rule)
    assert single_rectangles(hidden[None]).tolist() == [list(size)]


def blocks_cell_by_cell(height: int, width: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """The rule of iBOT on an array of patches, from the same random numbers."""
    hidden = np.zeros((height, width), bool)
    budget, least = share * height * width, (min(height, width) // 3) ** 2
    while budget - hidden.sum() >= 1:
        for _ in range(10):
            area = least + (budget - hidden.sum() - least) * rng.random()
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * rng.random())
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < high < height and 0 < wide < width):
                continue
            top, left = int(rng.random() * (height - high + 1)), int(rng.random() * (width - wide + 1))
            tried = hidden.copy()
            tried[top : top + high, left : left + wide] = True
            if 0 < tried.sum() - hidden.sum() <= budget - hidden.sum():
                hidden = tried
                break
        else:
            break
    return hidden


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (5, 9), (12, 3), (2, 2), (1, 8)])
def test_blocks_in_the_bits_of_an_integer_are_those_on_an_array(grid):
    for seed in range(100):
        share = np.random.default_rng(seed).random()
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        masks = draw_hidden_blocks(*grid, share, first), blocks_cell_by_cell(*grid, share, second)
        np.testing.assert_array_equal(*masks)
        assert first.random() == second.random()


@pytest.mark.parametrize("options", [{"hidden_shape": "random"}, {}, {"hidden_block_rule": "dinov2"}])
def test_exactly_the_asked_share_is_hidden_when_asked_for(options):
    patches = HiddenPatches(HiddenOptions([0.1, 0.47], [0.0, 0.0], hidden_exact=True, **options), 14, 16)
    rng = np.random.default_rng(0)
    counts = [int(patches.draw(rng).sum()) for _ in range(300)]
    assert set(counts) == {int(0.1 * 224), int(0.47 * 224)}
    assert counts.count(22) == pytest.approx(150, abs=35)


def test_filling_up_adds_single_patches_to_the_blocks():
    rng = np.random.default_rng
    blocks = HiddenPatches(HiddenOptions([0.3], [0.0]), 14, 14)
    exact = HiddenPatches(HiddenOptions([0.3], [0.0], hidden_exact=True), 14, 14)
    pairs = [(blocks.draw(rng(seed)), exact.draw(rng(seed))) for seed in range(100)]
    assert all((filled | ~block).all() for block, filled in pairs)
    assert any(block.sum() < 58 for block, _ in pairs) and all(filled.sum() == 58 for _, filled in pairs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_shares": []}, r"hidden_shares is \[\]"),
        ({"hidden_shares": [0.3]}, "a spread for each share"),
        ({"hidden_shares": [0.0, 0.1]}, "0.1 -. 0.2 must lie within 0 and 1"),
        ({"hidden_shares": [0.0, 0.9]}, "0.9 -. 0.2 must lie within 0 and 1"),
        ({"hidden_spreads": [0.0, -0.1]}, "0.3 -. -0.1"),
        ({"hidden_spreads": [0.0, math.nan]}, "0.3 -. nan"),
        ({"hidden_shape": "disc"}, "hidden_shape is disc: it must be one of block, random"),
        ({"hidden_block_rule": "beit"}, "hidden_block_rule is beit: it must be one of ibot, dinov2"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        HiddenOptions(**options)


def test_a_view_smaller_than_a_patch_is_refused():
    with pytest.raises(UserError, match="0 x 0 patches"):
        HiddenPatches(HiddenOptions(), 0, 0)

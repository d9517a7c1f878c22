"""The learning experiment: what its report says of results, and, slowly, the whole of it on a few tiles."""

import json

import learning
import learning_report
import numpy as np
import pytest
import torch
from PIL import Image
from unrelated_recipe import unrelated

from hf_pathology.tiles.folder import read_tile_folder


TILES, GROUPS = 40, 10


def result(seed: int, right: int, **more) -> dict:
    """A run whose untrained encoder knows 10 of 40 tiles, and whose trained one `right` of them, a few of each group."""
    order = np.arange(TILES).reshape(GROUPS, -1).T.flatten()  # the first of each group, then the second of each ...

    def knows(count: int) -> str:
        known = np.zeros(TILES, int)
        known[order[:count]] = 1
        return "".join(map(str, known))

    curve = [
        {"step": step, "images": 64 * step, "cpu_seconds": 60.0 * step, "cls kNN": share}
        for step, share in ((0, 0.25), (40, right / TILES))
    ]
    panel = {"teacher_entropy": 5.0, "uniform_entropy": 7.6, "kl": 0.4, "effective_rank": 9.0, "prototype_usage": 0.2}
    fixed = {"tiles": "raw", "method": "dino", "seed": seed, "minutes": 40.0, "setting": "published", "changes": {}}
    correct = {"untrained": {"cls kNN": knows(10)}, "trained": {"cls kNN": knows(right)}}
    groups = [tile // (TILES // GROUPS) for tile in range(TILES)]
    panels = [{"images": images, **panel} for images in (0, 2560)]
    return fixed | {"curve": curve, "panels": panels, "correct": correct, "groups": groups} | more


def report(tmp_path, capsys, *results) -> list[str]:
    capsys.readouterr()  # what was printed before
    paths = []
    for number, content in enumerate(results):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content))
    learning_report.main([*map(str, paths), "--figures", str(tmp_path)])
    return capsys.readouterr().out.splitlines()


def test_the_report_says_what_training_gained_and_draws_it(tmp_path, capsys):
    rows = report(tmp_path, capsys, result(0, 30))
    # One tile of each group untrained, three of four trained: the groups agree, so both intervals have no width.
    sure = "25.0 [25.0, 25.0] | 75.0 [75.0, 75.0] | +50.0 [+50.0, +50.0]"
    assert rows[2] == f"| raw | dino, 0 | 2,560 | 40.0 | cls kNN | {sure} |"
    for name in ("learning_curves.svg", "learning_panels.svg"):
        assert (tmp_path / name).read_text().count("<path") > 10


def test_a_change_is_compared_with_the_run_of_the_same_seed_and_budget(tmp_path, capsys):
    hed = {"changes": {"hed": 0.05}}
    others = [result(1, 35, **hed), result(0, 35, minutes=9.0, **hed)]  # without a run to compare them with
    rows = report(tmp_path, capsys, result(0, 30), result(0, 20, **hed), *others)
    (changed,) = [row for row in rows if "hed 0.05" in row]
    assert "-25.0 [-25.0, -25.0] | +25.0 [+25.0, +25.0]" in changed


def test_no_two_views_of_the_control_are_of_one_tile():
    views = torch.arange(8).expand(2, 8), torch.arange(8).expand(4, 8)  # the number of the tile in place of pixels
    inputs = unrelated(lambda batch: dict(zip(("global_views", "local_views"), batch)))(views)
    together = torch.cat([inputs["global_views"], inputs["local_views"]])  # (6, 8)
    assert all(len(set(of_place.tolist())) == 6 for of_place in together.T)
    assert all(sorted(view.tolist()) == list(range(8)) for view in together)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiles of two classes, dark and light noise, four to a group, in both splits."""
    folder, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    lines = ["path,class,group,split"]
    for number in range(80):
        label = number // 4 % 2
        pixels = rng.integers(0, 100, (224, 224, 3), np.uint8) + np.uint8(100 * label)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'dl'[label]},{number // 4},{'train' if number < 48 else 'val'}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_own_statistics_are_those_of_the_train_tiles(folder):
    found = learning.own_statistics(read_tile_folder(folder))
    assert found["mean"] == pytest.approx([(49.5 + 50) / 255] * 3, abs=1e-3)
    assert found["std"] == pytest.approx([100 / 12**0.5 / 255] * 3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", learning.METHODS)
def test_an_encoder_is_trained_and_judged_beside_itself_untrained(folder, tmp_path, capsys, method):
    small = ["hidden_size=24", "batch_size=8", "out_dim=16", "head_hidden_dim=16"][: 2 if method == "mae" else 4]
    learning.main([str(folder), str(tmp_path / "run"), "--method", method, "--minutes", "0.02", "--change", *small])
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(found["curve"]) == 1 + learning.POINTS and found["curve"][-1]["cpu_seconds"] > 0
    assert found["correct"].keys() == {"trained", "untrained"}
    for right in found["correct"].values():
        assert right.keys() == set(learning.JUDGED_BY[method]) and all(len(each) == 32 for each in right.values())
    assert found["changes"].keys() == {change.split("=")[0] for change in small}
    rows = report(tmp_path, capsys, found | {"changes": {}})
    assert [row.split(" | ")[1] for row in rows[2 : 2 + len(learning.JUDGED_BY[method])]] == [f"{method}, 0"] * len(
        learning.JUDGED_BY[method]
    )

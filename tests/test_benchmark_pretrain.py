"""The benchmark of pretraining compares two ways to compute the same thing, and counts what it says it counts."""

import random
from dataclasses import replace

import cv2
import numpy as np
import plain_pretraining
import pretrain
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from pretrain_ways import OurStep, Setup, formula_flops, our_model, plain_inputs, plain_step, published, small
from torch.testing import assert_close

from hf_pathology.tiles.hidden import HiddenOptions, HiddenPatches
from hf_pathology.tiles.views import ViewOptions


CPU = torch.device("cpu")
both = pytest.mark.parametrize("method", ["dino", "ibot"])


def tiny(method: str, **head) -> Setup:
    """Views of 4 and 1 patches, and no stochastic depth, which each way draws for itself."""
    views = ViewOptions(global_size=32, local_size=16, local_views=3)
    head = {"out_dim": 24, "head_hidden_dim": 20, "head_bottleneck_dim": 12, "drop_path_rate": 0.0, **head}
    return Setup(method, "tiny", 4, views, tile_size=40, head=head)


def inputs(setup: Setup, seed: int) -> dict[str, torch.Tensor]:
    draw, views, batch = torch.Generator().manual_seed(seed), setup.views, setup.batch_size
    sizes = {
        "global_views": (views.global_views, views.global_size),
        "local_views": (views.local_views, views.local_size),
    }
    made = {name: torch.randn(count, batch, 3, size, size, generator=draw) for name, (count, size) in sizes.items()}
    if setup.hidden:
        made["hidden"] = torch.rand(views.global_views, batch, 2, 2, generator=draw) < 0.4
        made["hidden"][0, 0] = False
    return made


@both
def test_the_plain_way_takes_the_same_steps_as_ours(method):
    setup = tiny(method)
    ours, plain = OurStep(our_model(setup, CPU), "fp32"), plain_step(setup, "fp32", CPU)
    for seed in range(3):  # with the weights, centres and teachers that the steps before have made
        views = inputs(setup, seed)
        assert_close(plain(*plain_inputs(views)), ours(**views), rtol=0, atol=1e-5)
    assert_close(plain.method.center, ours.method.center.value, rtol=0, atol=1e-6)
    if method == "ibot":
        assert_close(plain.method.patch_center, ours.method.patch_center.value, rtol=0, atol=1e-6)


@both
def test_the_plain_way_has_the_same_gradients_as_ours(method):
    setup = tiny(method)
    ours, plain = OurStep(our_model(setup, CPU), "fp32"), plain_step(setup, "fp32", CPU)
    views = inputs(setup, 0)
    ours.backward(ours.forward(**views))
    plain.backward(plain.forward(*plain_inputs(views)))
    student, head = ours.method.student, ours.method.student_head
    for found, expected in [
        (plain.method.student.pos_embed.grad, student.embeddings.position_embeddings.grad),
        (plain.method.student.blocks[0].fc1.weight.grad, student.layers[0].mlp.fc1.weight.grad),
        (plain.method.student_head.weight_v.grad, head.last_layer.weight_v.grad),
    ]:
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_plain_way_drops_whole_branches_and_keeps_their_mean():
    block = plain_pretraining.PlainBlock(8, 2, drop_path=0.25).train()
    torch.manual_seed(0)
    dropped = block.dropped(torch.ones(4000, 3, 8))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_plain_views_are_like_ours():
    setup = replace(small("ibot"), batch_size=1)
    noise = np.random.default_rng(0).standard_normal((224, 224, 3)).astype(np.float32)
    tile = (127 + 700 * cv2.GaussianBlur(noise, (0, 0), 8)).clip(0, 255).astype(np.uint8)
    torch.manual_seed(0)
    random.seed(0)
    rows = [{"tile": tile, "slide": "s", "xy": np.array([i, 0]), "epoch": 0} for i in range(100)]
    ours = pretrain.make_inputs(setup, rows, CPU)
    views, hidden = zip(*(setup.plain_views()(Image.fromarray(tile)) for _ in rows))
    for place, view in enumerate(plain_inputs(ours)[0]):
        found = torch.stack([each[place] for each in views])
        assert found.shape == view.shape
        assert_close(found.mean(), view.mean(), rtol=0, atol=0.15)
        assert_close(found.std(), view.std(), rtol=0.1, atol=0)
    assert np.shape(hidden) == (100, 2, 6, 6)


def test_the_plain_way_hides_as_many_patches_as_ours():
    options, rng = HiddenOptions(), np.random.default_rng(0)
    ours = HiddenPatches(options, 14, 14)
    random.seed(0)
    shares = np.array(
        [[plain_pretraining.draw_hidden(14, options).mean(), ours.draw(rng).mean()] for _ in range(1500)]
    )
    plain, own = shares.T
    error = 3 * np.hypot(*shares.std(axis=0)) / len(shares) ** 0.5
    assert abs(plain.mean() - own.mean()) < error
    assert np.mean(plain == 0) == pytest.approx(np.mean(own == 0), abs=0.06)


@pytest.mark.parametrize(
    ("method", "size", "every_patch", "hidden", "gigaflops"),
    [
        ("dino", "vit-s", False, 0.0, 113.8),
        ("dino", "vit-b", False, 0.0, 435.6),
        ("dino", "vit-l", False, 0.0, 1527),
        ("ibot", "vit-s", True, 58.8, 146.5),
        ("ibot", "vit-b", True, 58.8, 499.3),
        ("mae", "vit-b", False, 147, 58.7),
        ("mae", "vit-l", False, 147, 124.5),
    ],
)
def test_the_formula_gives_the_known_flops_of_an_image(method, size, every_patch, hidden, gigaflops):
    setup = published(method, size, 8)
    assert formula_flops(setup, hidden, every_patch) / 1e9 == pytest.approx(gigaflops, rel=1e-3)


@both
def test_the_counted_flops_are_those_of_the_formula(method):
    # The formula takes three forward passes for a step, of which the pixels' gradient, never computed, is a part.
    setup = replace(small(method, batch_size=2), head={"out_dim": 512, "drop_path_rate": 0.0})
    views = make_small_inputs(setup)
    hidden = views["hidden"].sum().item() / 2 if "hidden" in views else 0.0
    plain = plain_step(setup, "fp32", CPU)
    counted = pretrain.counted_flops(lambda: plain(*plain_inputs(views))) / 2
    assert counted == pytest.approx(formula_flops(setup, hidden, every_patch=True), rel=0.03)


def make_small_inputs(setup: Setup) -> dict[str, torch.Tensor]:
    views = {"global_views": torch.randn(2, 2, 3, 96, 96), "local_views": torch.randn(4, 2, 3, 48, 48)}
    return views | ({"hidden": torch.rand(2, 2, 6, 6) < 0.3} if setup.hidden else {})


@pytest.mark.parametrize("method", ["dino", "mae"])
def test_every_measure_prints_its_table(method, capsys, tmp_path):
    pretrain.draw_tiles(tmp_path, 224, count=4)
    asked = [
        "--small",
        "--size",
        "tiny",
        "--batch-size",
        "2",
        "--rounds",
        "1",
        "--tiles",
        str(tmp_path),
        "--cpu",
        "--peak",
        "1",
    ]
    AcceleratorState._reset_state(True)  # the precision of a test before this one
    pretrain.main([*asked, "--methods", method, "--measure", "step", "views", "pipeline", "parts"])
    said = capsys.readouterr().out
    assert said.count("| ours, bf16 |") == 3
    for title in ("step", "views", "pipeline", "parts"):
        assert title in said

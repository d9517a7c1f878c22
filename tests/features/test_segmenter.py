"""A segmentation model finds what was drawn, at its own resolution, and says what it needs to be told."""

import numpy as np
import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from hf_pathology.commands.tile import find_tissue_by
from hf_pathology.errors import UserError
from hf_pathology.features.segmenter import find_tissue_by_model, load_segmenter, tissue_labels
from hf_pathology.slides.aperio import write_aperio
from hf_pathology.slides.cohort import find_slides
from hf_pathology.slides.reader import Slide
from hf_pathology.slides.synthetic import draw_slide
from hf_pathology.slides.tiling import GridOptions, mask_path, tile_cohort
from hf_pathology.slides.tissue import Tissue, intersection_over_union


SIZE, MPP = 64, 4.0  # of the model's windows
LABELS = ("Background", "tumour", "stroma")


def config_of(labels: tuple[str, ...]) -> SegformerConfig:
    return SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[8, 4],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 1],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    image, truth = draw_slide(3, "solid", 1024)
    path = tmp_path_factory.mktemp("slide") / "drawn.svs"
    write_aperio(path, image, 0.5)
    return path, truth


@pytest.fixture(scope="module")
def release(drawn, tmp_path_factory):
    """A SegFormer of some thousand weights that learned from a drawn slide to tell tissue (two labels) from glass."""
    torch.manual_seed(0)
    processor = SegformerImageProcessor(size={"height": SIZE, "width": SIZE}, mpp=MPP)
    model = SegformerForSemanticSegmentation(config_of(LABELS)).train()
    path, truth = drawn
    with Slide(path) as slide:
        picture = slide.read((0, 0), (128, 128), MPP)
    share = truth.mask.reshape(128, 2, 128, 2).mean(axis=(1, 3))  # of 4 um
    windows = [(y, x) for y in (0, 32, 64) for x in (0, 32, 64)]
    pixels = processor([picture[y : y + SIZE, x : x + SIZE] for y, x in windows], return_tensors="pt")["pixel_values"]
    target = np.stack([share[y : y + SIZE, x : x + SIZE] > 0.5 for y, x in windows])
    target = torch.from_numpy(target * np.where(np.arange(SIZE) < SIZE // 2, 1, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        model(pixel_values=pixels, labels=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("segmenter")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("skip_glass", [False, True])
def test_a_model_finds_the_tissue_that_was_drawn_in_windows_that_fit_together(tmp_path, release, skip_glass):
    image, truth = draw_slide(
        6, "glandular", 1100
    )  # another slide than the model has seen, and no multiple of windows
    write_aperio(tmp_path / "slide.svs", image, 0.5)
    with Slide(tmp_path / "slide.svs") as slide:
        found = find_tissue_by_model(slide, release, skip_glass=skip_glass, batch_size=3)
    assert found.mask.shape == (69, 69)  # 550 um, on pixels of 8 um
    assert found.extent == pytest.approx((16, 16))
    assert intersection_over_union(found, truth) > 0.9


def test_the_mask_lies_where_the_tissue_lies_on_a_slide_of_another_resolution(tmp_path, release):
    image, truth = draw_slide(6, "glandular", 1100)
    write_aperio(tmp_path / "slide.svs", image[:, :900], None)
    with Slide(tmp_path / "slide.svs", mpp=0.4) as slide:
        found = find_tissue_by_model(slide, release)
    assert found.mask.shape == (55, 45)
    assert intersection_over_union(found, Tissue(truth.mask[:, :225], truth.extent)) > 0.85


def test_windows_without_colour_can_be_left_out(tmp_path, release, monkeypatch):
    image = np.full((1536, 1536, 3), (244, 243, 246), np.uint8)
    image[100:300, 100:300] = (226, 120, 170)
    write_aperio(tmp_path / "slide.svs", image, 0.5)
    read, reads = Slide.read, []
    monkeypatch.setattr(Slide, "read", lambda self, *args: reads.append(args) or read(self, *args))
    with Slide(tmp_path / "slide.svs") as slide:
        find_tissue_by_model(slide, release, skip_glass=True)
        few = len(reads)
        find_tissue_by_model(slide, release)
    assert few == 1
    assert len(reads) - few == 16


def test_the_labels_that_are_tissue_are_told_by_their_words():
    labels = ("Glass", "Tumor epithelium", "pen_marking", "out-of-focus", "Stroma", "Artefact: fold")
    assert tissue_labels("m", config_of(labels)) == [1, 4]
    assert tissue_labels("m", config_of(labels), classes=["Stroma"]) == [4]
    with pytest.raises(UserError, match="has no label Fat"):
        tissue_labels("m", config_of(labels), classes=["Fat"])


@pytest.mark.parametrize("labels", [("LABEL_0", "LABEL_1"), ("tumour", "stroma"), ("background", "glass")])
def test_labels_that_do_not_tell_tissue_from_the_rest_have_to_be_chosen(labels):
    with pytest.raises(UserError, match="pass classes"):
        tissue_labels("m", config_of(labels))
    assert tissue_labels("m", config_of(labels), classes=labels[1:]) == [1]


def test_a_model_that_does_not_say_its_resolution_is_refused_until_it_is_told(tmp_path, release):
    SegformerForSemanticSegmentation(config_of(LABELS)).save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="pass mpp"):
        load_segmenter(tmp_path)
    assert load_segmenter(tmp_path, mpp=2.0).mpp == 2.0
    with pytest.raises(UserError, match="trained at 4.0 mpp, not at 2.0"):
        load_segmenter(release, mpp=2.0)


def test_what_is_no_segmentation_model_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_segmenter(tmp_path / "nowhere")
    SegformerImageProcessor(mpp=1.0).save_pretrained(tmp_path)
    SegformerForSemanticSegmentation(config_of(LABELS)).segformer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lacks the weights"):
        load_segmenter(tmp_path)


def test_tiling_takes_a_model_by_its_name(tmp_path, release):
    path = tmp_path / "slides" / "slide.svs"
    path.parent.mkdir()
    write_aperio(path, draw_slide(7, "solid", 768)[0], 0.5)
    options = GridOptions(mpp=0.5, tile_size=64, tissue=str(release))
    ((_, grid),) = tile_cohort(find_slides(path.parent), tmp_path / "out", options, find_tissue_by)
    expected = find_tissue_by_model(Slide(path), release)
    assert np.array_equal(Tissue.load(mask_path(tmp_path / "out", "slide.svs")).mask, expected.mask)
    assert len(grid) and (grid.tissue_fraction >= 0.5).all()

"""SLPD's prototype losses against a loop over regions and views, and where there is nothing to learn from."""

import pytest
import torch
from torch.testing import assert_close

from hf_pathology.modeling.configuration_hipt import HiptRegionConfig
from hf_pathology.modeling.configuration_slpd import SlpdConfig
from hf_pathology.modeling.modeling_slpd import SlpdForPreTraining


REGIONS, SLIDES, CLUSTERS, NEIGHBOURS, WIDTH, BOTTLENECK, OUT = 9, 3, 2, 2, 6, 5, 8


def model() -> SlpdForPreTraining:
    """A model with clusters: three regions of each slide, of which the last is in none."""
    torch.manual_seed(0)
    trunk = HiptRegionConfig(
        input_size=WIDTH, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, grid_size=3
    )
    found = SlpdForPreTraining(
        SlpdConfig(
            trunk,
            num_regions=REGIONS,
            num_slides=SLIDES,
            num_clusters=CLUSTERS,
            num_neighbours=NEIGHBOURS,
            out_dim=OUT,
            head_hidden_dim=12,
            head_bottleneck_dim=BOTTLENECK,
        )
    ).train()
    slides = torch.arange(SLIDES).repeat_interleave(REGIONS // SLIDES)
    clusters = torch.tensor([0, 1, -1]).repeat(SLIDES)
    prototypes = torch.nn.functional.normalize(torch.randn(SLIDES, CLUSTERS, BOTTLENECK), dim=-1)
    neighbours = torch.tensor([[1, 2], [2, 0], [0, 1]])
    matched = torch.randint(CLUSTERS, (SLIDES, CLUSTERS, NEIGHBOURS))
    found.set_clusters(slides, clusters, prototypes, neighbours, matched)
    for center in found.centers:
        center.value.normal_(std=0.1)
    return found


def inputs(regions: list[int]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "global_views": torch.randn(2, len(regions), WIDTH, 3, 3, generator=draw),
        "local_views": torch.randn(3, len(regions), WIDTH, 2, 2, generator=draw),
        "regions": torch.tensor(regions),
    }


def test_the_losses_are_those_of_a_loop_over_regions_views_and_prototypes():
    slpd, regions = model(), [0, 1, 2, 4, 8]
    scores = torch.randn(5, len(regions), OUT)
    found = slpd.prototype_losses(scores, torch.tensor(regions))
    own, neighbour = [], []
    for place, region in enumerate(regions):
        slide, cluster = int(slpd.slide_of[region]), int(slpd.cluster_of[region])
        if cluster < 0:
            continue
        others = [
            slpd.prototypes[slpd.neighbours[slide, j], slpd.matched[slide, cluster, j]] for j in range(NEIGHBOURS)
        ]
        for prototypes, center, losses in (
            ([slpd.prototypes[slide, cluster]], slpd.own_center, own),
            (others, slpd.neighbour_center, neighbour),
        ):
            for prototype in prototypes:
                target = slpd.teacher_head.last_layer(prototype) - center.value[0]
                target = (target / slpd.teacher_temperature).softmax(dim=-1)
                for view in range(5):
                    losses.append(-(target * (scores[view, place] / 0.1).log_softmax(dim=-1)).sum())
    assert_close(found, (sum(own) / len(own), sum(neighbour) / len(neighbour)))


def test_a_batch_without_clustered_regions_is_dino_and_moves_no_centre_of_prototypes():
    slpd, before = model(), model()
    output = slpd(**inputs([2, 5, 8]))
    output.loss.backward()
    assert output.own_loss == output.neighbour_loss == 0 and torch.equal(output.loss.detach(), output.cls_loss)
    assert all(torch.isfinite(weight.grad).all() for weight in slpd.parameters() if weight.grad is not None)
    slpd.after_step(0, 10)
    assert torch.equal(slpd.own_center.value, before.own_center.value)
    assert not torch.equal(slpd.center.value, before.center.value)


def test_each_centre_moves_once_a_step_towards_what_its_prototypes_score():
    slpd, before = model(), model()
    for regions in ([0, 1], [4, 2]):  # two micro-batches
        slpd(**inputs(regions))
    slpd.after_step(0, 10)
    own = before.prototypes[before.slide_of[[0, 1, 4]], before.cluster_of[[0, 1, 4]]]
    mean = before.teacher_head.last_layer(own).mean(dim=0)
    assert_close(slpd.own_center.value[0], 0.9 * before.own_center.value[0] + 0.1 * mean)


def test_clusters_of_another_cohort_are_refused():
    slpd = model()
    with pytest.raises(ValueError, match=r"clusters of shape \(4,\) for a model of \(9,\)"):
        slpd.set_clusters(torch.zeros(4), slpd.cluster_of, slpd.prototypes, slpd.neighbours, slpd.matched)

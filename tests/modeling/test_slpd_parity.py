"""Our SLPD gives the numbers of the original (see `tests/originals.py`), with its artefacts where it has them."""

import numpy as np
import pytest
import torch
from originals import Case, cases, head_weights
from sklearn.cluster import KMeans
from torch.testing import assert_close

from hf_pathology.features.region_clusters import (
    cluster_slide,
    matched_prototypes,
    nearest_slides,
    slide_similarity,
)
from hf_pathology.modeling.configuration_slpd import SlpdConfig
from hf_pathology.modeling.modeling_slpd import SlpdForPreTraining
from hf_pathology.modeling.self_distillation import teacher_probabilities, view_loss


CASE = pytest.mark.parametrize("case", cases("12_slpd"), indirect=True)
LOSS = {"atol": 1e-5, "rtol": 1e-6}


def slides_of(case: Case) -> list[np.ndarray]:
    """The rows of the features of each slide, in the order of its regions."""
    return [
        np.flatnonzero(case.input["slide_inds"].numpy() == slide) for slide in range(len(case.input["num_regions"]))
    ]


@CASE
def test_k_means_finds_the_originals_clusters_in_another_order(case):
    features = case.input["region_features"].numpy()
    for slide, rows in enumerate(slides_of(case)):
        if case.output["ignore_cluster"][slide]:
            continue
        labels, prototypes = cluster_slide(features[rows], clusters=4, seed=0)
        expected = case.output["centroids"][slide].numpy()
        order = (prototypes @ expected.T).argmax(axis=1)
        assert sorted(order) == [0, 1, 2, 3]
        np.testing.assert_allclose(prototypes, expected[order], atol=1e-5)
        assert (order[labels] == case.output["im2cluster"][slide, : len(rows)].numpy()).all()


@CASE
def test_similar_slides_and_prototypes_are_the_originals(case):
    prototypes, usable = case.output["centroids"].numpy(), ~case.output["ignore_cluster"].numpy()
    similarity = slide_similarity(prototypes, usable)
    expected = np.where(np.outer(usable, usable), case.output["matching_sim"].numpy(), -np.inf)
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    nearest = nearest_slides(similarity, 1)
    assert (nearest[usable] == case.output["neighbor_slide_inds"].numpy()[usable]).all()
    matched = matched_prototypes(prototypes, nearest)
    assert (matched[usable] == case.output["neighbor_proto_inds"].numpy()[usable]).all()


@pytest.mark.parametrize("case", cases("12_slpd_kmeans_fixed_init"), indirect=True)
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_library_iterates_as_the_originals_does(case, iterations):
    found = KMeans(
        len(case.input["init_centroids"]),
        init=case.input["init_centroids"].numpy(),
        n_init=1,
        max_iter=iterations,
        tol=0,
    )
    found.fit(case.input["x"].numpy())
    np.testing.assert_allclose(found.cluster_centers_, case.output[f"centroids_iter{iterations}"], atol=1e-5)
    assert (found.labels_ == case.output[f"assign_iter{iterations}"].numpy()).all()


def clustered_model(case: Case, **options) -> SlpdForPreTraining:
    """A model with the recorded head and clusters; its trunk is of no importance."""
    arguments, regions = case.meta["args"], len(case.input["slide_inds"])
    config = SlpdConfig(
        {
            "model_type": "hipt_region",
            "input_size": 4,
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        out_dim=arguments["out_dim"],
        head_bottleneck_dim=arguments["bottleneck_dim"],
        teacher_temperature=0.07,
        num_regions=regions,
        num_slides=len(case.input["num_regions"]),
        num_clusters=arguments["num_cluster"],
        num_neighbours=arguments["neighbor_num"],
        **options,
    )
    model = SlpdForPreTraining(config)
    last = {name: weight for name, weight in case.state.items() if name.startswith("head.last_layer.")}
    model.teacher_head.last_layer.load_state_dict(head_weights(last, {"bottleneck_dim": 1}, "head.last_layer."))
    slides, places = case.input["slide_inds"], case.input["region_inds"]
    clusters = case.output["im2cluster"][slides, places].masked_fill(case.output["ignore_cluster"][slides], -1)
    found = ("centroids", "neighbor_slide_inds", "neighbor_proto_inds")
    model.set_clusters(slides, clusters, *(case.output[name] for name in found))
    return model


def regions_of(case: Case, iteration: int) -> torch.Tensor:
    """The numbers of the regions of a batch."""
    slides, places = case.input[f"slide_inds_{iteration}"], case.input[f"region_inds_{iteration}"]
    same = (case.input["slide_inds"] == slides[:, None]) & (case.input["region_inds"] == places[:, None])
    return same.int().argmax(dim=1)


@CASE
def test_losses_centres_and_gradients_are_the_originals(case):
    model = clustered_model(case, original_artefacts=True)
    for iteration in range(3):
        student = case.input[f"student_output_{iteration}"].clone().requires_grad_()
        teacher = case.input[f"teacher_output_{iteration}"]
        scores = student.unflatten(0, (10, -1))
        targets = teacher_probabilities(teacher, model.center.value, model.teacher_temperature).unflatten(0, (2, -1))
        dino = view_loss(scores, targets, 0.1)
        model.center.add(teacher.sum(dim=0), len(teacher))
        model.center.step()
        own, neighbour = model.prototype_losses(scores, regions_of(case, iteration))
        (dino + own + neighbour).backward()
        for name, loss in (("dino", dino), ("intra", own), ("inter", neighbour), ("loss", dino + own + neighbour)):
            assert_close(loss.detach(), case.output[f"loss_{name}"][iteration], **LOSS)
        assert_close(student.grad, case.output[f"grad_student_{iteration}"], atol=1e-6, rtol=1e-5)
        assert_close(model.center.value, case.output[f"center_dino_{iteration}"], atol=1e-6, rtol=1e-5)
        assert_close(model.own_center.value, case.output[f"center_proto_{iteration}"], atol=1e-6, rtol=1e-5)


@CASE
def test_the_teachers_head_scores_prototypes_as_the_original_does(case):
    model = clustered_model(case)
    assert_close(model.teacher_head.prototypes(model.prototypes), case.output["proto_logits"], atol=1e-6, rtol=1e-5)

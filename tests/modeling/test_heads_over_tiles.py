"""The heads that HIPT is compared with: parity with the published code, padding, order, neighbours, clusters; and survival."""

import pytest
import torch
from originals import cases
from torch.testing import assert_close
from transformers import AutoModel, PreTrainedModel

from hf_pathology.modeling.configuration_abmil import AbmilConfig
from hf_pathology.modeling.configuration_deep_attn_misl import DeepAttnMislConfig
from hf_pathology.modeling.configuration_deep_graph_conv import DeepGraphConvConfig
from hf_pathology.modeling.configuration_dsmil import DsmilConfig
from hf_pathology.modeling.modeling_deep_attn_misl import DeepAttnMislForSlideClassification
from hf_pathology.modeling.modeling_deep_graph_conv import DeepGraphConvForSlideClassification, nearest_edges
from hf_pathology.modeling.modeling_dsmil import DsmilForSlideClassification
from hf_pathology.modeling.modeling_slide_head import slide_loss
from hf_pathology.modeling.survival_loss import discrete_survival_loss


CLOSE = {"atol": 1e-5, "rtol": 0}
WIDTH = 8
GATE = {"attention_a.0": "attention.value", "attention_b.0": "attention.gate", "attention_c": "attention.score"}
DSMIL_NAMES = {
    "i_classifier.fc.0": "tile_classifier",
    "b_classifier.q": "query",
    "b_classifier.v": "value",
    "b_classifier.fcc": "classifier",
}
GRAPH_NAMES = {
    **{f"conv{i + 1}.nn": f"convolutions.{i}.perceptron" for i in range(3)},
    **{f"path_attention_head.{original}": ours for original, ours in GATE.items()},
    "path_rho.0": "rho.0",
    "classifier": "classifier",
}
CLUSTER_NAMES = {
    **{f"phis.{kind}.{i}": f"clusters.{kind}.{i // 3}.0" for kind in range(10) for i in (0, 3)},
    "attention_net.0": "embed.0",
    **{f"attention_net.3.{original}": ours for original, ours in GATE.items()},
    "rho.0": "rho.0",
    "classifier": "classifier",
}


def with_weights(head: PreTrainedModel, state: dict[str, torch.Tensor], names: dict[str, str]) -> PreTrainedModel:
    """The head with the weights of the original; the epsilon of its convolutions, which is 0, has no place in it."""
    weights = {}
    for key, tensor in state.items():
        if key.endswith(".eps"):
            assert tensor == 0
            continue
        original = next(name for name in names if key.startswith(f"{name}."))
        weights[names[original] + key.removeprefix(original)] = tensor
    missing, unexpected = head.load_state_dict(weights, strict=False)
    assert set(missing) <= {"feature_mean", "feature_std", "cluster_centres"} and not unexpected
    assert head.num_parameters() == sum(weight.numel() for weight in weights.values())
    return head.eval()


@pytest.mark.parametrize("case", cases("11_hipt_dsmil"), indirect=True)
@torch.no_grad()
def test_the_dual_stream_head_gives_the_logits_of_the_original(case):
    sizes = {"input_dim": 32, "query_dim": case.meta["args"]["query_dim"], "num_labels": 4}
    head = with_weights(DsmilForSlideClassification(DsmilConfig(**sizes)), case.state, DSMIL_NAMES)
    output = head(case.input["x"][None])
    assert_close(output.logits, case.output["logits"], **CLOSE)
    assert_close(output.logits.softmax(dim=-1), case.output["Y_prob"], **CLOSE)
    assert_close(output.tile_logits[0], case.output["instance_logits"], **CLOSE)
    assert_close(output.tile_scores[0], case.output["attention"].mean(dim=1), **CLOSE)
    assert_close(output.slide_embedding, case.output["bag_repr"].flatten(1), **CLOSE)
    assert_close(
        head.classifier(output.slide_embedding.unflatten(1, (4, 32)))[..., 0], case.output["bag_logits"], **CLOSE
    )


@pytest.mark.parametrize("case", cases("11_hipt_dgcn"), indirect=True)
@torch.no_grad()
def test_the_graph_head_gives_the_logits_of_the_original(case):
    config = DeepGraphConvConfig(input_dim=32, hidden_dim=case.meta["args"]["hidden_dim"], num_labels=4)
    head = with_weights(DeepGraphConvForSlideClassification(config), case.state, GRAPH_NAMES)
    spatial = head(case.input["x"][None], edges=case.input["edge_index"])
    assert_close(spatial.logits, case.output["logits_spatial"], **CLOSE)
    assert_close(spatial.logits.softmax(dim=-1), case.output["Y_prob_spatial"], **CLOSE)
    latent = head(case.input["x"][None], edges=case.input["edge_latent"])
    assert_close(latent.logits, case.output["logits_latent"], **CLOSE)


@pytest.mark.parametrize("case", cases("11_hipt_mi_fcn_cluster"), indirect=True)
@torch.no_grad()
def test_the_head_over_clusters_gives_the_logits_of_the_original(case):
    clusters = case.input["cluster_id"]
    assert set(clusters.tolist()) == set(range(4))  # none is empty: there we follow the paper, and the code does not
    config = DeepAttnMislConfig(input_dim=32, num_clusters=4, hidden_dim=28, attention_dim=18, num_labels=4)
    head = with_weights(DeepAttnMislForSlideClassification(config), case.state, CLUSTER_NAMES)
    output = head(case.input["x"][None], cluster_of=clusters[None])
    assert_close(output.logits, case.output["logits"], **CLOSE)
    assert_close(output.logits.softmax(dim=-1), case.output["Y_prob"], **CLOSE)


@pytest.mark.parametrize("case", cases("11_nll_surv_loss"), indirect=True)
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_survival_and_its_gradients_are_those_of_the_original(case, alpha, reduction):
    logits = case.input["logits"].clone().requires_grad_()
    each = discrete_survival_loss(logits, case.input["y_bins"][:, 0], case.input["y_event"][:, 0], alpha)
    loss = getattr(each, reduction)()
    loss.backward()
    assert_close(loss, case.output[f"loss_alpha{alpha}_{reduction}"], atol=1e-5, rtol=1e-6)
    assert_close(logits.grad, case.output[f"grad_alpha{alpha}_{reduction}"], **CLOSE)


def test_the_loss_of_survival_is_the_likelihood_written_out():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval, event = torch.tensor([0, 1, 2, 3, 3]), torch.tensor([1, 0, 1, 0, 1])
    hazard = logits.sigmoid()
    for row in range(5):
        reached = torch.prod(1 - hazard[row, : interval[row]])
        last = hazard[row, interval[row]]
        likelihood = reached * (last if event[row] else 1 - last)
        assert_close(discrete_survival_loss(logits, interval, event)[row], -likelihood.log())
    config = AbmilConfig(num_labels=4, problem_type="discrete_survival")
    labels = torch.stack([interval, event], dim=1)
    assert_close(slide_loss(logits, labels, config), discrete_survival_loss(logits, interval, event).mean())


HEADS = {
    "dsmil": lambda: DsmilForSlideClassification(DsmilConfig(input_dim=WIDTH, query_dim=6, num_labels=3)),
    "clusters": lambda: DeepAttnMislForSlideClassification(
        DeepAttnMislConfig(input_dim=WIDTH, num_clusters=3, hidden_dim=10, attention_dim=6, num_labels=3)
    ),
    "graph": lambda: DeepGraphConvForSlideClassification(
        DeepGraphConvConfig(input_dim=WIDTH, hidden_dim=10, num_neighbours=3, num_labels=3)
    ),
}


@pytest.fixture(params=list(HEADS))
def head(request) -> PreTrainedModel:
    torch.manual_seed(0)
    head = HEADS[request.param]().eval()
    if request.param == "clusters":
        head.cluster_centres.copy_(torch.randn(3, WIDTH))
    return head


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 20, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_slides_in_a_batch_are_what_they_are_alone(head, features):
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    output = head(features.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    assert output.tile_scores[~mask].eq(0).all()
    assert_close(output.tile_scores.sum(dim=1), torch.ones(3))
    for bag, length in enumerate((20, 7, 1)):
        alone = head(features[bag : bag + 1, :length])
        assert_close(output.logits[bag], alone.logits[0], **CLOSE)
        assert_close(output.slide_embedding[bag], alone.slide_embedding[0], **CLOSE)
        assert_close(output.tile_scores[bag, :length], alone.tile_scores[0], **CLOSE)


@torch.no_grad()
def test_the_order_of_the_tiles_does_not_matter(head, features):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    straight, shuffled = head(features), head(features[:, order])
    assert_close(straight.logits, shuffled.logits, **CLOSE)
    assert_close(straight.tile_scores[:, order], shuffled.tile_scores, **CLOSE)


def test_a_loss_reaches_every_weight(head, features):
    head.train()(features, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert not [name for name, weight in head.named_parameters() if weight.grad is None]


@torch.no_grad()
def test_features_are_standardised_by_the_buffers(head, features):
    mean, std = torch.randn(WIDTH), torch.rand(WIDTH) + 0.5
    expected = head((features - mean) / std).logits
    head.feature_mean.copy_(mean)
    head.feature_std.copy_(std)
    assert_close(head(features).logits, expected, **CLOSE)


@torch.no_grad()
def test_a_tile_belongs_to_the_nearest_centre_and_empty_clusters_do_not_count(features):
    torch.manual_seed(0)
    head = HEADS["clusters"]().eval()
    head.cluster_centres.copy_(torch.stack([features[0, 0], features[0, 1], torch.full((WIDTH,), 100.0)]))
    nearest = torch.cdist(features, head.cluster_centres[:2].expand(3, -1, -1)).argmin(dim=-1)
    output = head(features)
    assert_close(output.logits, head(features, cluster_of=nearest).logits)
    for bag in range(3):
        for kind in range(2):
            assert output.tile_scores[bag, nearest[bag] == kind].unique().numel() == 1
    assert_close(output.tile_scores.sum(dim=1), torch.ones(3))  # nothing is left to the cluster without tiles


def test_edges_come_from_the_nearest_tiles_of_the_same_bag():
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, 12, 2, generator=generator)
    mask = torch.arange(12) < torch.tensor([[12], [3]])
    source, target = nearest_edges(places, mask, 4)
    for bag, length in enumerate((12, 3)):
        for tile in range(length):
            distance = (places[bag, :length] - places[bag, tile]).norm(dim=1)
            nearest = distance.argsort()[1:5] + bag * 12
            assert sorted(source[target == bag * 12 + tile].tolist()) == sorted(nearest.tolist())
    assert not ((target >= 15) | (source >= 15)).any()  # padding


def test_edges_are_the_same_however_many_distances_are_held_at_once(monkeypatch):
    places, mask = (
        torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 50, dtype=torch.bool),
    )
    whole = nearest_edges(places, mask, 5)
    monkeypatch.setattr("hf_pathology.modeling.modeling_deep_graph_conv.DISTANCES", 120)
    assert set(map(tuple, nearest_edges(places, mask, 5).T.tolist())) == set(map(tuple, whole.T.tolist()))


@torch.no_grad()
def test_spatial_edges_are_made_of_the_coordinates(features):
    torch.manual_seed(0)
    config = DeepGraphConvConfig(input_dim=WIDTH, hidden_dim=10, num_neighbours=3, edges="spatial", num_labels=3)
    head = DeepGraphConvForSlideClassification(config).eval()
    coords = torch.randint(0, 10_000, (3, 20, 2), generator=torch.Generator().manual_seed(3))
    edges = nearest_edges(coords.float(), torch.ones(3, 20, dtype=torch.bool), 3)
    assert_close(head(features, coords=coords).logits, head(features, edges=edges).logits)
    with pytest.raises(ValueError, match="pass coords"):
        head(features)
    with pytest.raises(ValueError, match="it is 'latent' or 'spatial'"):
        DeepGraphConvConfig(edges="both")


def test_a_head_of_ten_clusters_has_the_width_that_was_published():
    head = AutoModel.from_config(DeepAttnMislConfig(num_labels=2))
    sizes = 10 * (384 * 512 + 512 + 512 * 512 + 512) + (512 * 512 + 512) + 2 * (512 * 256 + 256) + 257
    assert head.num_parameters() == sizes + (512 * 256 + 256) + (256 * 2 + 2)

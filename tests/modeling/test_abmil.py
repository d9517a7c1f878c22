"""The gated-attention head: parity with HistoSSLscaling's ABMIL, padding, losses, saving, and life without our package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_pathology.modeling.configuration_abmil import AbmilConfig
from hf_pathology.modeling.modeling_abmil import AbmilForSlideClassification
from hf_pathology.modeling.modeling_slide_head import slide_loss


FIXTURES = Path(__file__).parents[1] / "fixtures"
VARIANTS = {
    "08_owkin_abmil": AbmilConfig(
        input_dim=24, attention_dim=16, mlp_hidden_dims=[14, 7], mlp_activation="sigmoid", num_labels=1
    ),
    "08_owkin_abmil_hidden": AbmilConfig(
        input_dim=24,
        attention_dim=12,
        tile_hidden_dims=[18],
        mlp_hidden_dims=[9],
        attention_temperature=1.7,
        num_labels=2,
    ),
}
ORIGINAL_MODULES = ("tiles_emb.", "attention_layer.att", "attention_layer.gate", "attention_layer.w", "mlp.")


@pytest.fixture
def head() -> AbmilForSlideClassification:
    torch.manual_seed(0)
    config = AbmilConfig(
        input_dim=12, attention_dim=8, mlp_hidden_dims=[6], num_labels=3, encoder="some/encoder", mpp=0.5
    )
    return AbmilForSlideClassification(config).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1))


def load_original(config: AbmilConfig, state: dict[str, torch.Tensor]) -> AbmilForSlideClassification:
    """A head with the weights of an original one: its linear layers, put in the order of its forward pass, are ours."""
    head = AbmilForSlideClassification(config)
    modules = sorted({key.rpartition(".")[0] for key in state}, key=lambda name: (position_of(name), name))
    linears = [name for name, module in head.named_modules() if isinstance(module, torch.nn.Linear)]
    for ours, original in zip(linears, modules, strict=True):
        head.get_submodule(ours).load_state_dict(
            {name: state[f"{original}.{name}"] for name in ("weight", "bias")}, strict=True
        )
    return head.eval()


def position_of(module: str) -> int:
    return next(i for i, prefix in enumerate(ORIGINAL_MODULES) if module.startswith(prefix))


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def test_the_published_head_has_156418_parameters():
    head = AbmilForSlideClassification(AbmilConfig(input_dim=768, num_labels=1))
    assert head.num_parameters() == 156_418


@pytest.mark.parametrize("case", VARIANTS)
def test_logits_attention_and_gradients_equal_those_of_the_original_code(case):
    golden = {key: tensor.float() for key, tensor in load_file(FIXTURES / f"{case}.safetensors").items()}
    features, padded = golden["input/x"][..., 3:], golden["input/mask"].squeeze(-1).bool()  # three columns of metadata
    head = load_original(VARIANTS[case], part(golden, "state/"))
    output = head(features, ~padded)
    torch.testing.assert_close(output.logits, golden["output/logits"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        output.tile_scores, golden["output/attention_weights"].squeeze(-1), atol=1e-6, rtol=1e-5
    )
    torch.testing.assert_close(head(features).logits, golden["output/logits_nomask"], atol=2e-6, rtol=1e-5)
    output.logits.sum().backward()
    gradient = golden["output/grad_of_sum/tiles_emb.hidden_layers.0.weight"]
    torch.testing.assert_close(head.embed[0].weight.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("case", VARIANTS)
def test_the_fixture_holds_the_numbers_of_the_golden_file(case, goldens):
    golden, kept = load_file(goldens / f"{case}.safetensors"), load_file(FIXTURES / f"{case}.safetensors")
    assert all(torch.equal(tensor.to(golden[key].dtype), golden[key]) for key, tensor in kept.items())


def test_weights_start_as_pytorch_draws_them():
    torch.manual_seed(0)
    weight = AbmilForSlideClassification(AbmilConfig(input_dim=400)).embed[0].weight
    assert weight.abs().max() <= 400**-0.5  # kaiming_uniform with a = sqrt(5); N(0, 0.02) would exceed it
    assert weight.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.02)


def test_attention_ignores_padded_tiles(head, features):
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    output = head(features.masked_fill(~mask.unsqueeze(-1), float("nan")), mask)
    assert output.tile_scores[~mask].eq(0).all()
    torch.testing.assert_close(output.tile_scores.sum(dim=1), torch.ones(3))
    for bag, length in enumerate((20, 7, 1)):
        alone = head(features[bag : bag + 1, :length])
        torch.testing.assert_close(output.logits[bag], alone.logits[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(output.slide_embedding[bag], alone.slide_embedding[0], atol=1e-6, rtol=1e-6)


def test_padded_tiles_receive_no_gradient(head, features):
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    features.requires_grad_()
    head(features, mask).logits.sum().backward()
    assert features.grad[~mask].eq(0).all() and features.grad[mask].ne(0).any()


def test_the_order_of_the_tiles_does_not_matter(head, features):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    straight, shuffled = head(features), head(features[:, order])
    torch.testing.assert_close(straight.logits, shuffled.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(straight.tile_scores[:, order], shuffled.tile_scores, atol=1e-6, rtol=1e-6)


def test_a_bag_without_a_real_tile_is_refused_by_its_number(head, features):
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="bag 1 of this batch has no real tile"):
        head(features, mask)


@pytest.mark.parametrize("mask", [torch.ones(3, 20, 1, dtype=torch.bool), torch.ones(3, 20)])
def test_a_mask_of_another_shape_or_type_is_refused(head, features, mask):
    with pytest.raises(ValueError, match=r"need a bool mask \(3, 20\)"):
        head(features, mask)


def test_features_are_standardised_by_the_saved_buffers(head, features):
    plain = head(features).logits
    head.feature_mean.fill_(5.0)
    head.feature_std.fill_(2.0)
    torch.testing.assert_close(head(features * 2 + 5).logits, plain, atol=1e-6, rtol=1e-5)


def test_the_problem_type_decides_the_loss():
    logits = torch.tensor([[0.3, -1.2], [2.0, 0.5]])
    classes, numbers = torch.tensor([1, 0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    naive = {
        "single_label_classification": (classes, -(logits[0].softmax(0)[1].log() + logits[1].softmax(0)[0].log()) / 2),
        "multi_label_classification": (
            numbers,
            -(numbers * logits.sigmoid().log() + (1 - numbers) * (1 - logits.sigmoid()).log()).mean(),
        ),
        "regression": (numbers, ((logits - numbers) ** 2).mean()),
    }
    for problem_type, (labels, expected) in naive.items():
        torch.testing.assert_close(slide_loss(logits, labels, AbmilConfig(problem_type=problem_type)), expected)


def test_without_a_problem_type_the_labels_imply_it():
    logits, single = torch.tensor([[0.3, -1.2]]), torch.tensor([[0.3]])
    asked = AbmilConfig()
    for outputs, labels, problem_type in (
        (logits, torch.tensor([1]), "single_label_classification"),
        (logits, torch.tensor([[1.0, 0.0]]), "multi_label_classification"),
        (single, torch.tensor([2.0]), "regression"),
    ):
        explicit = AbmilConfig(problem_type=problem_type)
        assert torch.equal(slide_loss(outputs, labels, asked), slide_loss(outputs, labels, explicit))


def test_one_output_learns_zeros_and_ones_by_binary_cross_entropy():
    config = AbmilConfig(problem_type="multi_label_classification", num_labels=1)
    loss = slide_loss(torch.tensor([[0.0], [0.0]]), torch.tensor([1, 0]), config)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_a_saved_head_loads_through_automodel_with_nothing_missing(head, features, tmp_path):
    head.feature_mean.fill_(0.25)
    head.save_pretrained(tmp_path)
    loaded, loading = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is AbmilForSlideClassification
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert torch.equal(loaded.eval()(features).logits, head(features).logits)
    assert (loaded.config.encoder, loaded.config.mpp, loaded.config.pooling) == ("some/encoder", 0.5, None)

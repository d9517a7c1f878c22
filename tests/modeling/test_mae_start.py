"""How a new MAE starts: its weights, its tables, what it cannot be made of."""

import pytest
import torch
from tiny_mae import TINY_DECODER, TINY_VIT, tiny_config
from torch import nn
from torch.testing import assert_close
from transformers import (
    ResNetConfig,
    ViTMAEConfig,
)

from hf_pathology.modeling.configuration_mae import MaeConfig
from hf_pathology.modeling.modeling_mae import MaeForPreTraining


@pytest.fixture(scope="module")
def new_model() -> MaeForPreTraining:
    """An untrained model wide enough for its random weights to be judged by their spread."""
    torch.manual_seed(0)
    trunk = {"hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 768}
    return MaeForPreTraining(MaeConfig({**trunk, "image_size": 32, "patch_size": 8}, decoder_num_hidden_layers=2))


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    """All of `weight` lies within the bound, and its spread is that of a uniform distribution over it."""
    weight = weight.detach()
    assert weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert abs(float(weight.mean())) < 4 * bound / (3 * weight.numel()) ** 0.5


def test_linear_layers_start_as_xavier_with_query_key_and_value_as_one_matrix(new_model):
    linears = {name: each for name, each in new_model.named_modules() if isinstance(each, nn.Linear)}
    assert len(linears) == 2 * 6 + 2 * 6 + 2  # two layers of each, the way into the decoder, the way out
    for name, linear in linears.items():
        outputs, inputs = linear.weight.shape
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            outputs *= 3
        assert_uniform(linear.weight, (6 / (inputs + outputs)) ** 0.5)
        assert not linear.bias.any()


def test_the_patch_projection_starts_as_one_linear_layer_of_all_values_of_a_patch(new_model):
    projection = new_model.autoencoder.vit.embeddings.patch_embeddings.projection
    assert_uniform(projection.weight, (6 / (3 * 8 * 8 + 192)) ** 0.5)
    bound = (3 * 8 * 8) ** -0.5
    assert 0.9 * bound < projection.bias.abs().max() <= bound


def test_class_token_and_mask_token_start_small_and_norms_as_the_identity(new_model):
    for token in (new_model.autoencoder.vit.embeddings.cls_token, new_model.autoencoder.decoder.mask_token):
        assert float(token.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(token.detach().mean())) < 0.005
    norms = [each for each in new_model.modules() if isinstance(each, nn.LayerNorm)]
    assert len(norms) == 2 * 2 + 2 * 2 + 2
    assert all((norm.weight == 1).all() and not norm.bias.any() and norm.eps == 1e-6 for norm in norms)


def test_the_tables_are_waves_of_the_column_then_of_the_row(new_model):
    for table in (
        new_model.autoencoder.vit.embeddings.position_embeddings,
        new_model.autoencoder.decoder.decoder_pos_embed,
    ):
        width, edge = table.shape[2], 4
        assert not table[0, 0].any()
        for row, column in ((0, 0), (2, 1), (3, 3)):
            wave = []
            for place in (column, row):
                angles = [place / 10000 ** (4 * k / width) for k in range(width // 4)]
                wave += [
                    torch.tensor(angles, dtype=torch.float64).sin(),
                    torch.tensor(angles, dtype=torch.float64).cos(),
                ]
            assert_close(table[0, 1 + edge * row + column], torch.cat(wave).float(), atol=1e-7, rtol=0)


def test_two_seeds_make_two_models_with_the_same_tables():
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(MaeForPreTraining(tiny_config()).state_dict())
    same = {name for name, value in models[0].items() if torch.equal(value, models[1][name])}
    tables = {"autoencoder.vit.embeddings.position_embeddings", "autoencoder.decoder.decoder_pos_embed"}
    constant = {name for name in same if "norm" in name or (name.endswith("bias") and "projection" not in name)}
    assert same - constant == tables


def test_a_new_model_predicts_no_better_than_the_mean_and_no_worse_than_twice_that(new_model):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(1, 8, 16, generator=generator).argsort(dim=2).argsort(dim=2)
    with torch.no_grad():
        loss = new_model(torch.randn(1, 8, 3, 32, 32, generator=generator), (ranks < 12).view(1, 8, 4, 4)).loss
    assert 1 < float(loss) < 2.5


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (ResNetConfig(), {}, "a resnet cannot, take a vit"),
        ({"image_size": 100}, {}, "image_size is 100: it must be square and a multiple of patch_size, 8"),
        ({"image_size": [40, 80]}, {}, "it must be square"),
        ({"hidden_size": 18}, {}, "hidden_size is 18: it must be a multiple of 4 and of its number of heads, 2"),
        ({}, {"decoder_hidden_size": 16}, "decoder_hidden_size is 16: it must be a multiple of 4 and .* heads, 3"),
        ({}, {"mask_ratio": 0.0}, "mask_ratio is 0.0: of 25 patches it must hide some and leave some"),
        ({}, {"mask_ratio": 0.97}, "mask_ratio is 0.97"),
    ],
)
def test_what_mae_cannot_be_made_of_is_refused(encoder, options, message):
    config = MaeConfig(
        {**TINY_VIT, **encoder} if isinstance(encoder, dict) else encoder, **{**TINY_DECODER, **options}
    )
    with pytest.raises(ValueError, match=message):
        MaeForPreTraining(config)


def test_layer_norm_has_the_epsilon_of_the_paper_unless_told_otherwise():
    assert MaeForPreTraining(tiny_config()).autoencoder.config.layer_norm_eps == 1e-6
    assert MaeForPreTraining(tiny_config()).autoencoder.decoder.decoder_norm.eps == 1e-6


def test_the_defaults_are_the_published_base_model():
    config = MaeConfig()
    encoder = config.encoder_config
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.num_attention_heads) == (768, 12, 12)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 8)
    assert (config.mask_ratio, config.norm_pix_loss) == (0.75, True)
    with torch.device("meta"):
        model = MaeForPreTraining(config)
    published = ViTMAEConfig(norm_pix_loss=True, layer_norm_eps=1e-6)
    ours = model.autoencoder.config.to_dict()
    assert {name: ours[name] for name in published.to_dict() if name != "architectures"}.items() >= {
        name: value for name, value in published.to_dict().items() if name in ours and name != "architectures"
    }.items()
    assert sum(parameter.numel() for parameter in model.parameters()) == 111_907_840

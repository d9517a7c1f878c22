"""Configuration of MAE pretraining (He et al. 2021, arXiv 2111.06377)."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .trunk import trunk_config


class MaeConfig(PretrainedConfig):
    """What a masked autoencoder is made of; the defaults are the published ViT-B/16 recipe.

    Args:
        encoder_config: the encoder, a configuration of a `vit` of transformers or a dict of its fields. The position tables
            are made for its `image_size`, square and a multiple of its `patch_size`.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder, which is the same for every size of encoder.
        mask_ratio: share of the patches that the encoder does not see.
        norm_pix_loss: predict each patch's pixels less their mean, over their standard deviation.
    """

    model_type = "mae"
    sub_configs = {"encoder_config": AutoConfig}

    def __init__(
        self,
        encoder_config: PretrainedConfig | dict[str, Any] | None = None,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 2048,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        **kwargs,
    ):
        self.encoder_config = trunk_config(encoder_config)
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = decoder_intermediate_size
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        super().__init__(**kwargs)

"""What was inferred of an architecture, and from what, for the account of a conversion."""

from typing import Any

from transformers import ResNetConfig, ViTConfig

from hf_pathology.modeling.configuration_hipt import HiptRegionConfig
from hf_pathology.modeling.configuration_mae import MaeConfig


def vit_notes(config: ViTConfig, options: Any, stated: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of a ViT; `options` have `num_heads`, and `stated` is the content of a `config.json`."""
    rule = "config.json" if stated and "num_attention_heads" in stated else "the rule for this width"
    return {
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "heads_from": "--num-heads" if options.num_heads else rule,
        "patch_size": config.patch_size,
        "mlp_width": config.intermediate_size,
        "qkv_bias": config.qkv_bias,
        "layer_norm_eps": config.layer_norm_eps,
        "layer_norm_eps_from": "config.json"
        if stated and "layer_norm_eps" in stated
        else "that of the original codes",
    }


def table_note(stored: int, config: ViTConfig, dino_table: bool) -> str:
    """Of a ViT's table of positions, that was stored for images of `stored` pixels."""
    edge, now = stored // config.patch_size, config.image_size // config.patch_size
    if stored == config.image_size:
        return f"{edge} x {edge} positions, as stored, for {stored} px"
    rule = "DINO's rule" if dino_table else "the rule of transformers and MAE"
    return f"{edge} x {edge} positions, interpolated to {now} x {now} by {rule}, for {config.image_size} px"


def region_notes(config: HiptRegionConfig, options: Any) -> dict[str, Any]:
    """Of the second level of a hierarchy."""
    return {
        "input_width": config.input_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "heads_from": "--region-heads" if options.region_heads else "those of ViT-4K-XS",
        "mlp_width": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "table": f"{config.grid_size} x {config.grid_size} positions, interpolated by DINO's rule for every other grid",
    }


def mae_notes(config: MaeConfig, settings: dict[str, Any], options: Any) -> dict[str, Any]:
    """Of a masked autoencoder, whose run was made with `settings`."""
    encoder = config.encoder_config
    return {
        **vit_notes(encoder, options),
        "table": table_note(encoder.image_size, encoder, dino_table=False),
        "decoder_width": config.decoder_hidden_size,
        "decoder_layers": config.decoder_num_hidden_layers,
        "decoder_heads": config.decoder_num_attention_heads,
        "decoder_heads_from": "--decoder-heads" if options.decoder_heads else "those of the published decoders",
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix_loss,
        "norm_pix_loss_from": "the run's settings"
        if "norm_pix_loss" in settings
        else "the paper: the file does not say",
    }


def resnet_notes(config: ResNetConfig) -> dict[str, Any]:
    """Of a ResNet."""
    return {
        "widths": config.hidden_sizes,
        "blocks": config.depths,
        "block": config.layer_type,
        "stride": "on the 3 x 3 convolution (v1.5)",
    }

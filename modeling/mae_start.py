"""How a masked autoencoder starts: MAE's position tables and random weights (He et al. 2021, arXiv 2111.06377, its code)."""

import torch
from torch import nn
from transformers import ViTMAEForPreTraining


TOKEN_STD = 0.02  # of the class token and the mask token


def sincos_table(width: int, edge: int) -> torch.Tensor:
    """MAE's position table (1 + edge * edge, width), float64: zeros for the class token, then the patches row by row.

    Of a patch, its column comes first and then its row, each as the sines and then the cosines of its number times the
    frequencies 10000^(-k / (width / 4)).
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(edge, dtype=torch.float64), frequencies)  # (edge, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (edge, width / 2)
    patches = torch.cat([axis.repeat(edge, 1), axis.repeat_interleave(edge, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])


def position_tables(autoencoder: ViTMAEForPreTraining) -> tuple[nn.Parameter, nn.Parameter]:
    """Those of the encoder and of the decoder."""
    return autoencoder.vit.embeddings.position_embeddings, autoencoder.decoder.decoder_pos_embed


@torch.no_grad()
def start_as_mae(autoencoder: ViTMAEForPreTraining) -> None:
    """Gives an untrained `autoencoder` the tables and the random weights of the original code.

    transformers leaves both tables, the class token and the mask token at zero, and draws other weights.
    """
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Linear):
            # The original draws query, key and value as one matrix, whose bound is that of three times as many outputs.
            fused = name.endswith(("q_proj", "k_proj", "v_proj"))
            nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if fused else 1.0)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embeddings, decoder = autoencoder.vit.embeddings, autoencoder.decoder
    projection = embeddings.patch_embeddings.projection
    nn.init.xavier_uniform_(projection.weight.view(len(projection.weight), -1))
    bound = projection.weight[0].numel() ** -0.5  # of a bias that torch has drawn, and that the original leaves alone
    nn.init.uniform_(projection.bias, -bound, bound)
    nn.init.normal_(embeddings.cls_token, std=TOKEN_STD)
    nn.init.normal_(decoder.mask_token, std=TOKEN_STD)
    edge = autoencoder.config.image_size // autoencoder.config.patch_size
    for table in position_tables(autoencoder):
        table.copy_(sincos_table(table.shape[-1], edge))

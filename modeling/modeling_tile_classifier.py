"""A released ViT with a linear head on its class token, as transformers' own `ViTForImageClassification`."""

from collections.abc import Sequence

from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel


def vit_classifier(encoder: ViTModel, head: nn.Linear, classes: Sequence[str]) -> ViTForImageClassification:
    """A classifier whose logits are `head` of the encoder's class token, and which knows the names of its classes.

    Plain transformers loads it (`AutoModelForImageClassification`). The encoder's pooler, which such a classifier does
    not have, is left behind. The weights are copied.

    Args:
        encoder: with merged adapters, if it had any.
        head: from the hidden size to the number of classes.
        classes: the names, in the order of the head's outputs.
    """
    config = ViTConfig.from_dict(
        {
            **encoder.config.to_dict(),
            "id2label": dict(enumerate(classes)),
            "label2id": {name: index for index, name in enumerate(classes)},
        }
    )
    classifier = ViTForImageClassification(config)
    weights = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith("pooler.")}
    classifier.vit.load_state_dict(weights)
    classifier.classifier.load_state_dict(head.state_dict())
    return classifier

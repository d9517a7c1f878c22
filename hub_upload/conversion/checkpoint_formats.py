"""The formats of published checkpoints: where in the file the encoder is, what else is there, how its pixels are made.

A format says which network is taken and how its authors use it. What the network is (a ViT, a ResNet ...) is told by its
tensors, see `original_vit.py` and its neighbours.
"""

from dataclasses import dataclass
from typing import Literal

from hf_pathology.errors import UserError
from hf_pathology.hub_upload.export import IMAGENET_MEAN, IMAGENET_STD


Statistics = Literal["imagenet", "half", "none"]
STATISTICS: dict[str, tuple[list[float], list[float]]] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ([0.5] * 3, [0.5] * 3),
    "none": ([0.0] * 3, [1.0] * 3),
}


@dataclass(frozen=True)
class Network:
    """One of the networks in a checkpoint.

    Attributes:
        name: what its authors call it.
        entry: of the checkpoint's dictionary, where it has one of its own.
        prefixes: with which its parameters' names begin; the first that is there counts, and none is needed.
    """

    name: str
    entry: str | None = None
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """What files of one training code hold.

    Attributes:
        title: of the method, for people.
        kinds: of networks that it trains, "vit", "hub_vit" (in transformers' names), "region", "mae" or "resnet".
        networks: the one that is taken, and the one that `--student` takes.
        left_out: beginnings of names of what is not needed, and what that is.
        statistics: of pixels, by which its authors use it.
        image_size: edge in pixels at which its authors use it; None for the one that its table of positions is made for.
        dino_table: whether its code interpolates tables of positions by the rule of DINO, see `modeling/position.py`.
        marks: ends of names that only files of this format, and of others that have them too, hold.
    """

    title: str
    kinds: tuple[str, ...]
    networks: tuple[Network, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    statistics: Statistics = "imagenet"
    image_size: int | None = None
    dino_table: bool = True
    marks: tuple[str, ...] = ()


HEAD = (("head.", "projection head"),)
MASK_TOKEN = (("masked_embed", "mask token"),)
CLASSIFIER = (("fc.", "projection head or classifier"),)
PROTOTYPES = (("prototypes", "prototypes"),)
DECODER = (("decoder", "decoder"), ("mask_token", "mask token"))
HUB = (
    ("pooler.", "pooler"),
    ("classifier.", "classifier"),
    ("decoder.", "decoder"),
    ("embeddings.mask_token", "mask token"),
)
TEACHER = (Network("teacher", "teacher", ("backbone.",)), Network("student", "student", ("backbone.",)))
PHIKON = (Network("teacher", "teacher", ("backbone.", "vit.")), Network("student", "student", ("backbone.",)))
DINO_MARKS, IBOT_MARKS, REGION_MARKS = ("dino_loss",), ("masked_embed", "ibot_loss"), ("phi.0.weight",)
MAE_MARKS, HUB_MARKS = ("decoder_embed.weight",), ("embeddings.patch_embeddings.projection.weight",)
BESIDE_THE_WEIGHTS = {  # entries of checkpoints that hold no network
    "optimizer": "optimizer state",
    "opt_state_dict": "optimizer state",
    "sch_state_dict": "schedule",
    "lr_scheduler": "schedule",
    "scaler": "gradient scaler",
    "scaler_state_dict": "gradient scaler",
    "fp16_scaler": "gradient scaler",
    "dino_loss": "centres of the loss",
    "ibot_loss": "centres of the loss",
    "args": "settings of the run",
    "hparams": "settings of the run",
    "arch": "settings of the run",
    "epoch": "progress of the run",
    "iter": "progress of the run",
    "itr": "progress of the run",
    "num_updates": "progress of the run",
    "best_acc1": "progress of the run",
}

FORMATS: dict[str, Format] = {
    "dino": Format("DINO", ("vit", "resnet"), TEACHER, HEAD + CLASSIFIER, marks=DINO_MARKS),
    "ibot": Format("iBOT", ("vit",), TEACHER, HEAD + MASK_TOKEN, marks=IBOT_MARKS),
    "phikon": Format("Phikon", ("vit", "hub_vit"), PHIKON, HEAD + MASK_TOKEN + HUB, marks=IBOT_MARKS + HUB_MARKS),
    "mae": Format("MAE", ("vit",), left_out=DECODER + HEAD, dino_table=False, marks=MAE_MARKS),
    "mae-full": Format("MAE", ("mae",), dino_table=False, marks=MAE_MARKS),
    "hipt": Format(
        "HIPT",
        ("vit", "region"),
        TEACHER,
        HEAD + PROTOTYPES,
        statistics="half",  # as its authors evaluate it; its training code has ImageNet's
        image_size=256,
        marks=DINO_MARKS + REGION_MARKS,
    ),
    "slpd": Format(
        "SLPD", ("vit", "region"), TEACHER, HEAD + PROTOTYPES, image_size=256, marks=DINO_MARKS + REGION_MARKS
    ),
    "intelligens": Format("INTELLIGENS", ("vit",), TEACHER, HEAD, image_size=224, marks=DINO_MARKS),
    "simclr": Format(
        "SimCLR",
        ("resnet",),
        (Network("convnet", prefixes=("convnet.", "encoder.", "backbone.")),),
        (*CLASSIFIER, ("projection.", "projection head"), ("projector.", "projection head")),
        marks=("convnet.conv1.weight",),
    ),
    "moco": Format(
        "MoCo v2",
        ("resnet",),
        (Network("encoder_q", prefixes=("encoder_q.",)), Network("encoder_k", prefixes=("encoder_k.",))),
        (*CLASSIFIER, ("queue", "queue of negatives")),
        marks=("encoder_q.conv1.weight",),
    ),
    "byol": Format(
        "BYOL",
        ("resnet",),
        (Network("net_online", prefixes=("net_online.net.",)), Network("net_target", prefixes=("net_target.net.",))),
        (
            *CLASSIFIER,
            ("projector_online.", "projection head"),
            ("projector_target.", "projection head"),
            ("predictor_online.", "predictor"),
            ("classifier_online.", "online classifier"),
        ),
        marks=("net_online.net.conv1.weight",),
    ),
    "vit": Format(
        "ViT of the Hub",
        ("hub_vit",),
        (Network("encoder", prefixes=("vit.",)),),
        HUB,
        dino_table=False,
        marks=HUB_MARKS,
    ),
}


def format_named(name: str) -> Format:
    """The format of that name. Raises UserError, with all names, when there is none."""
    if name not in FORMATS:
        raise UserError(f"{name} is no format that is converted: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]

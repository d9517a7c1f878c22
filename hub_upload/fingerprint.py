"""A release's fingerprint: the features it has of an input that a formula makes, so that anyone can see it is the same model.

This file needs torch, transformers and numpy only, and nothing else of this package: `verify_release.py` runs it where the
package is not to be had.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedModel,
)


NAME = "fingerprint.json"
TOLERANCE = 1e-4  # other processors and versions give 1e-6; a weight that was rounded to 16 bits gives more than 1e-4
RULES = {
    "tile": "uint8[y, x, c] = (7 x x + 5 y y + 3 x y + 11 x + 85 c) // 32 mod 256, through the image processor",
    "region": "uint8[y, x, c] = (7 x x + 5 y y + 3 x y + 11 x + 85 c) // 32 mod 256, through the image processor",
    "grid": "float32[i] = (7919 i mod 2003 - 1001) / 512 for the i-th number of (1, D, h, w), row by row",
    "bag": "float32[i] = (7919 i mod 2003 - 1001) / 512 for the i-th number of (1, N, D), row by row; the last tile masked",
}
OUTPUTS = ("pooler_output", "tile_mean", "slide_embedding", "logits")


def load_release(folder: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Model and image processor (None where there is none) of a release, on the CPU, in fp32 and in eval mode.

    Raises ValueError when weights are missing, left over or not finite.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = {"ForImageClassification": AutoModelForImageClassification, "MAEForPreTraining": AutoModelForPreTraining}
    architecture = (config.get("architectures") or [""])[0]
    loader = next((auto for ending, auto in classes.items() if architecture.endswith(ending)), AutoModel)
    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    model, loading = loader.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            names = ", ".join(sorted(str(name) for name in loading[problem])[:5])
            raise ValueError(f"it does not load whole: {problem.replace('_', ' ')} {names}")
    broken = [name for name, weight in model.state_dict().items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"it has weights that are not finite: {', '.join(broken[:5])}")
    processor = None
    if (folder / "preprocessor_config.json").is_file():
        processor = AutoImageProcessor.from_pretrained(folder, **options)
    return model.eval(), processor


def pixels(height: int, width: int) -> np.ndarray:
    """The picture of RULES, uint8 (height, width, 3): integers only, the same on every machine."""
    y, x, c = np.meshgrid(*(np.arange(edge, dtype=np.int64) for edge in (height, width, 3)), indexing="ij")
    return ((7 * x * x + 5 * y * y + 3 * x * y + 11 * x + 85 * c) // 32 % 256).astype(np.uint8)


def numbers(*shape: int) -> np.ndarray:
    """The features of RULES, float32: multiples of 1/512 between -2 and 2, which are exact."""
    count = np.arange(np.prod(shape), dtype=np.int64)
    return ((7919 * count % 2003 - 1001) / 512).astype(np.float32).reshape(shape)


def make_input(model: PreTrainedModel, processor: Any) -> tuple[str, np.ndarray, dict[str, torch.Tensor]]:
    """What the fingerprint is of: the name of its rule, the array, and what the model is called with.

    Pixels have the size that the processor resizes to, so that how a library resizes does not matter.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        if processor is None:
            raise ValueError("it takes pixels, and has no preprocessor_config.json")
        if config.model_type == "hipt":  # two tiles by three, so that rows and columns cannot be taken for each other
            kind, array = "region", pixels(2 * config.tile_size, 3 * config.tile_size)
        else:
            size = processor.size
            edges = [size[name] if name in size else size["shortest_edge"] for name in ("height", "width")]
            kind, array = "tile", pixels(*edges)
        inputs = dict(processor(array, return_tensors="pt"))
        if config.model_type == "vit_mae":  # hides patches by chance, but for the order that it is given
            inputs["noise"] = torch.from_numpy(numbers(1, (config.image_size // config.patch_size) ** 2))
        return kind, array, inputs
    if config.model_type == "hipt_region":
        array = numbers(1, config.input_size, 3, 4)
        return "grid", array, {"features": torch.from_numpy(array)}
    region_tiles = getattr(config, "region_tiles", 1)
    array = numbers(1, 8 if region_tiles == 1 else 2 * region_tiles, config.input_dim)
    mask = torch.ones(array.shape[:2], dtype=torch.bool)
    mask[:, -1] = False
    return "bag", array, {"features": torch.from_numpy(array), "mask": mask}


@torch.inference_mode()
def features_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What the model says of the input, float32 vectors by name; `mean` is that of the last layer over all places."""
    output = model(**inputs)
    if model.config.model_type == "vit_mae":
        output = {"last_hidden_state": output["logits"]}  # the pixels of all patches
    last = output.get("last_hidden_state")
    found = {name: output[name].flatten() for name in OUTPUTS if output.get(name) is not None}
    if last is not None:
        found["mean"] = last.mean(dim=(0, 2, 3)) if last.ndim == 4 else last.flatten(0, -2).mean(dim=0)
    return {name: vector.float().numpy() for name, vector in found.items()}


def sha256(content: Path | np.ndarray) -> str:
    """The hash of a file, or of an array's bytes in little-endian order."""
    if isinstance(content, np.ndarray):
        little = content.astype(content.dtype.newbyteorder("<"), copy=False)
        return hashlib.sha256(np.ascontiguousarray(little).tobytes()).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_of(folder: Path) -> dict[str, str]:
    """The hashes of the files that hold the weights."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def fingerprint_of(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """The fingerprint of a release, as it is written into its `fingerprint.json`. Raises ValueError as `load_release`."""
    model, processor = load_release(folder, trust_remote_code=trust_remote_code)
    kind, array, inputs = make_input(model, processor)
    features = features_of(model, inputs)
    return {
        "input": {
            "kind": kind,
            "rule": RULES[kind],
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "sha256": sha256(array),
        },
        "features": {
            name: {"values": [float(f"{value:.6g}") for value in vector.tolist()], "sha256": sha256(vector)}
            for name, vector in features.items()
        },
        "tolerance": TOLERANCE,
        "weights": weights_of(folder),
        "made_with": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def deviation(found: np.ndarray, stated: np.ndarray) -> float:
    """How far two vectors are apart, as a share of the length of the stated one."""
    return float(np.linalg.norm(found - stated) / max(np.linalg.norm(stated), np.finfo(np.float32).tiny))


def compare(found: dict[str, Any], stated: dict[str, Any]) -> str:
    """How well two fingerprints agree, in words. Raises ValueError with what differs."""
    if found["input"]["sha256"] != stated["input"]["sha256"]:
        raise ValueError("the input of the fingerprint is another one: it was made for other sizes")
    if found["weights"] != stated["weights"]:
        changed = sorted(name for name, _ in set(found["weights"].items()) ^ set(stated["weights"].items()))
        raise ValueError(f"the weights are not those of the fingerprint: {', '.join(dict.fromkeys(changed))}")
    if found["features"].keys() != stated["features"].keys():
        raise ValueError(f"the model gives {', '.join(found['features'])}, not {', '.join(stated['features'])}")
    apart = []
    for name, feature in stated["features"].items():
        values = [np.array(each["values"], np.float64) for each in (found["features"][name], feature)]
        if values[0].shape != values[1].shape:
            raise ValueError(f"{name} has {len(values[0])} numbers, not {len(values[1])}")
        apart.append(deviation(*values))
    worst = float(np.max(apart))  # NaN where one is
    if not worst <= stated["tolerance"]:
        raise ValueError(f"the features differ by {worst:.2g} of their length, more than {stated['tolerance']:g}")
    if all(found["features"][name]["sha256"] == feature["sha256"] for name, feature in stated["features"].items()):
        return "the same bits"
    return f"the same within {max(worst, 1e-6):.0e} of their length"

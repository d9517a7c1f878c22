"""What `accelerate launch` makes of a configuration in recipes/accelerate, without launching anything."""

import argparse
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env


CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


def launch_arguments(name: str, *options: str) -> argparse.Namespace:
    """The arguments of `accelerate launch --config_file recipes/accelerate/<name>.yaml <options> recipe.py`."""
    words = ["--config_file", str(CONFIGS / f"{name}.yaml"), *options, "recipe.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments


def launch_environment(name: str, *options: str) -> dict[str, str]:
    """The environment of the processes that this launch of several GPUs would start."""
    return prepare_multi_gpu_env(launch_arguments(name, *options))

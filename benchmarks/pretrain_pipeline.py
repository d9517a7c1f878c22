"""Pretraining from images on disk to moved weights, ours and the plain way, as a whole and in parts."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from plain_pretraining import PlainTiles
from pretrain_clocks import Options
from pretrain_ways import OurStep, Setup, computed, our_model, plain_step
from torch import nn
from torch.utils.data import DataLoader

from hf_pathology.recipes.inputs import views_to_inputs
from hf_pathology.tiles.folder_blocks import FolderBlocks, find_images
from hf_pathology.tiles.loader import TileLoader
from hf_pathology.training.loop import TrainingLoop
from hf_pathology.training.options import TrainingOptions


class Enough(Exception):
    """Ends a training loop from within its loader."""


class TimedLoader:
    """Hands on the batches of a loader, and ends the training loop after some steps."""

    def __init__(self, loader: TileLoader, options: Options):
        self.loader, self.options = loader, options
        self.seconds = 0.0  # of a step with the making of a batch, in the last run of the loop

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, batch in enumerate(self.loader):
            if number == 1:  # the loop may ask for a batch before it takes the step of the one before
                began = self.options.clock()
            if number == 1 + self.options.steps:
                self.seconds = (self.options.clock() - began) / self.options.steps
                raise Enough
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self.loader.load_state_dict(states)


def our_pipeline(setup: Setup, folder: Path, out: Path, options: Options) -> Callable[[], float]:
    """Seconds of a step in the training loop of the recipes, from images on disk."""
    on_cpu, precision = options.device.type == "cpu", {"bf16": "bf16", "fp32": "no"}[options.precisions[0]]
    accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
    source = FolderBlocks(folder, in_memory=True)
    loader = TimedLoader(
        TileLoader(source, setup.multi_crop(), batch_size=setup.batch_size, workers=options.workers), options
    )
    model = computed(our_model(setup, accelerator.device), compile=not on_cpu)
    to_inputs = views_to_inputs(setup.views, accelerator.device)
    training = TrainingOptions(steps=10**6, batch_size=setup.batch_size, checkpoint_every=10**6, cpu=on_cpu)
    loop = TrainingLoop(model, loader, to_inputs, training, accelerator, out, config={})

    def run() -> float:
        with suppress(Enough):
            loop.run()
        return loader.seconds

    return run


def plain_pipeline(setup: Setup, folder: Path, precision: str, options: Options) -> Callable[[], float]:
    """Seconds of a step of the plain way, from images on disk."""
    step, loader = plain_step(setup, precision, options.device), plain_loader(setup, folder, options)

    def run() -> float:
        for number, batch in enumerate(loader):
            if number == 0:
                began = options.clock()
            if number == options.steps:
                return (options.clock() - began) / options.steps
            step(*([each.to(options.device, non_blocking=True) for each in kind] for kind in batch))
        raise AssertionError("there is always another batch")

    return run


def plain_loader(setup: Setup, folder: Path, options: Options) -> DataLoader:
    """Endless batches of Pillow's views of tiles in random order."""
    tiles = PlainTiles([folder / path for path in find_images(folder)], setup.plain_views())
    chance = torch.Generator().manual_seed(0)
    order = (int(torch.randint(len(tiles), (), generator=chance)) for _ in iter(int, 1))
    pinned = options.device.type == "cuda"
    return DataLoader(tiles, setup.batch_size, sampler=order, num_workers=options.workers, pin_memory=pinned)


class Parts:
    """Adds up the seconds of the parts of a run, by the names that they are given."""

    def __init__(self, options: Options):
        self.options = options
        self.seconds: dict[str, float] = defaultdict(float)
        self._began: dict[str, float] = {}

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._begin(name)
            result = call(*args, **kwargs)
            self._end(name)
            return result

        return run

    def of_methods(self, owner: Any, **names: str) -> None:
        """Times these methods of `owner` from now on."""
        for method, name in names.items():
            setattr(owner, method, self.timed(getattr(owner, method), name))

    def of_modules(self, first: nn.Module, last: nn.Module, name: str) -> None:
        """Times from the call of `first` to the end of `last`, which may be the same."""
        first.register_forward_pre_hook(lambda *_: self._begin(name))
        last.register_forward_hook(lambda *_: self._end(name))

    def _begin(self, name: str) -> None:
        self._began.setdefault(name, self._now())

    def _end(self, name: str) -> None:
        self.seconds[name] += self._now() - self._began.pop(name)

    def _now(self) -> float:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize()
        return self.options.clock()


VIEWS, BATCH, COLOURS, TEACHER, STUDENT, HEADS = "views", "batch", "colour changes", "teacher", "student", "heads"
FORWARD = "forward"
OF_STEP = {
    "forward": FORWARD,
    "backward": "backward",
    "clip_gradients": "norms, clipping",
    "optimize": "optimizer",
    "follow": "centres, EMA",
}


def plain_parts(setup: Setup, folder: Path, precision: str, options: Options) -> tuple[Parts, Callable[[], None]]:
    """The clock of its parts, and a step of the plain way with the making of its batch."""
    parts, step = Parts(options), plain_step(setup, precision, options.device)
    loader = plain_loader(setup, folder, options)
    loader.dataset.views = parts.timed(loader.dataset.views, VIEWS)
    for trunk, name in ((step.method.teacher, TEACHER), (step.method.student, STUDENT)):
        parts.of_modules(trunk.patch_embed, trunk.norm, name)
    for head in (step.method.teacher_head, step.method.student_head):
        parts.of_modules(head, head, HEADS)
    parts.of_methods(step, **OF_STEP)
    batches = iter(loader)
    draw = parts.timed(lambda: next(batches), BATCH)
    return parts, lambda: step(*([each.to(options.device) for each in kind] for kind in draw()))


def our_parts(setup: Setup, folder: Path, options: Options) -> tuple[Parts, Callable[[], None]]:
    """The same of ours."""
    parts, model = Parts(options), our_model(setup, options.device)
    step, source = OurStep(model, options.precisions[0]), FolderBlocks(folder, in_memory=True)
    loader = TileLoader(source, parts.timed(setup.multi_crop(), VIEWS), batch_size=setup.batch_size, workers=0)
    to_inputs = parts.timed(views_to_inputs(setup.views, options.device), COLOURS)
    for who, name in (("teacher", TEACHER), ("student", STUDENT)):
        if trunk := getattr(model, who, None):
            parts.of_modules(trunk.embeddings, trunk.layernorm, name)
    for name, child in model.named_children():
        for part in child.children() if name.endswith("_head") else []:
            parts.of_modules(part, part, HEADS)
    parts.of_methods(step, **OF_STEP)
    batches = iter(loader)
    draw = parts.timed(lambda: next(batches), BATCH)
    return parts, lambda: step(**to_inputs(draw()))

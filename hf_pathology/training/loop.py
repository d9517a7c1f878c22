"""The one training loop: schedules, micro-batches, clipping, the step, what the method does after it, checkpoints.

The method is a module whose `model(**inputs)` returns an output with `loss` and detached scalars, and which has

- `after_step(step, total_steps)`, called once after each optimizer step, to move what follows the weights;
- `frozen_parameters(step)`, the parameters that must not move at this step;
- `discard_step()`, to forget what the micro-batches of a step that is not taken have gathered;
- `collapse_panel()` and `schedule_values(step, total_steps)`, numbers for the log.

The loader is an endless iterable of batches with `state_dict()` and `load_state_dict(states_of_all_ranks)`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..atomic import write_json
from ..errors import UserError, require_at_least
from ..progress import ProgressBar
from .checkpoint import Checkpoints
from .interrupt import Interrupted, stop_on_signals
from .log import JsonLog
from .optimizer import clip_each_gradient, parameter_groups, set_rates
from .schedules import cosine_with_warmup


@dataclass
class TrainingOptions:
    """How long and how fast to train; the defaults of the rates are those of DINO and iBOT.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: tiles in a micro-batch of one process.
        accumulation: micro-batches of one optimizer step.
        learning_rate: for 256 tiles a step; the rate used is `learning_rate * tiles_a_step / 256`.
        min_learning_rate: where the cosine ends; not scaled.
        warmup_steps: steps of the linear warm-up of the learning rate.
        weight_decay, final_weight_decay: where the cosine of the weight decay starts and ends.
        clip_gradient: norm to which each parameter's gradient is clipped by itself.
        seed: of the weights, the order of the tiles and the views.
        log_every, panel_every, checkpoint_every: steps between two records, two collapse panels, two checkpoints.
        keep_checkpoints: how many of the last checkpoints stay.
        max_non_finite: steps in a row whose loss is not finite before the run stops.
        cpu: train on the CPU even where there is a GPU.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    learning_rate: float = 5e-4
    min_learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    clip_gradient: float = 3.0
    seed: int = 0
    log_every: int = 10
    panel_every: int = 50
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_non_finite: int = 3
    cpu: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "log_every", "panel_every", "checkpoint_every")
        require_at_least(1, **{name: getattr(self, name) for name in (*counts, "keep_checkpoints", "max_non_finite")})
        require_at_least(0, learning_rate=self.learning_rate, warmup_steps=self.warmup_steps)

    def deciding(self) -> dict[str, Any]:
        """The options that decide the result; the others may change when a run goes on."""
        free = {"log_every", "panel_every", "checkpoint_every", "keep_checkpoints", "max_non_finite", "cpu"}
        return {name: value for name, value in asdict(self).items() if name not in free}


class ResumableLoader(Protocol):
    """An endless stream of batches that knows its place."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, states: list[dict[str, Any]]) -> None: ...


class TrainingLoop:
    """Trains a method to the end of its schedule; goes on by itself from the last whole checkpoint in `out`.

    Args:
        model: the method, see above.
        to_inputs: makes the method's inputs, on the accelerator's device, of a batch of the loader.
        out: gets `log.jsonl`, `checkpoints/`, and `non_finite/` where a loss was not finite.
        config: every option that decides the result; a run goes on only with the same.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: ResumableLoader,
        to_inputs: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        options: TrainingOptions,
        accelerator: Accelerator,
        out: Path,
        config: dict[str, Any],
    ):
        self.loader, self.to_inputs, self.options = loader, to_inputs, options
        self.accelerator, self.out, self.config = accelerator, Path(out), config
        model.train()
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model)))
        self.method = accelerator.unwrap_model(self.model)
        self.checkpoints = Checkpoints(self.out / "checkpoints", accelerator, options.keep_checkpoints)
        self.step, states = self.checkpoints.load_last(config)
        if states:
            loader.load_state_dict(states)
        self.log = JsonLog(self.out / "log.jsonl", self.step) if accelerator.is_main_process else None
        self.waited = 0.0  # seconds spent waiting for the loader since the last record
        self.non_finite = 0  # steps in a row that were not taken

    @property
    def tiles_a_step(self) -> int:
        return self.options.batch_size * self.options.accumulation * self.accelerator.num_processes

    def run(self) -> nn.Module:
        """The trained method.

        Raises Interrupted after Ctrl-C or SIGTERM, when the run has saved itself, and UserError when the loss was not
        finite `options.max_non_finite` times in a row.
        """
        options, saved = self.options, self.step
        batches = iter(self.loader)
        progress = ProgressBar("training", options.steps - self.step, "tiles") if self.log else nullcontext()
        with stop_on_signals() as stop, progress:
            began = time.monotonic()
            while self.step < options.steps:
                rates = self._set_rates()
                scalars, seen = self._accumulate(batches)
                scalars, stop_signal = self._agree(scalars, stop.signal)
                if scalars["finite"] == 1.0:
                    scalars["gradient_norm"] = self._take_step()
                    self.non_finite = 0
                else:
                    self._refuse_step(seen)
                if self.log and self.step % options.log_every == 0:
                    began = self._record({**rates, **scalars}, began)
                if self.log:
                    progress.advance(f"loss {scalars['loss']:.3f}", self.tiles_a_step)
                self.step += 1
                if self.step % options.checkpoint_every == 0 or self.step == options.steps or stop_signal:
                    self.checkpoints.save(self.step, self.loader.state_dict(), self.config)
                    saved = self.step
                if stop_signal:
                    raise Interrupted(stop_signal, f"stopped after step {saved}; the same command goes on from there")
        return self.method

    def _set_rates(self) -> dict[str, float]:
        """Sets this step's learning rate and weight decay."""
        options = self.options
        learning_rate = cosine_with_warmup(
            self.step,
            options.steps,
            base=options.learning_rate * self.tiles_a_step / 256,
            final=options.min_learning_rate,
            warmup_steps=options.warmup_steps,
        )
        weight_decay = cosine_with_warmup(
            self.step, options.steps, base=options.weight_decay, final=options.final_weight_decay
        )
        set_rates(self.optimizer, learning_rate, weight_decay)
        return {"learning_rate": learning_rate, "weight_decay": weight_decay}

    def _accumulate(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Gradients of all micro-batches of the step, their mean scalars, and the batches themselves."""
        scalars: dict[str, torch.Tensor] = {}
        seen = []
        for last in [False] * (self.options.accumulation - 1) + [True]:
            asked = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - asked
            seen.append(batch)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                output = self.model(**self.to_inputs(batch))
                self.accelerator.backward(output.loss / self.options.accumulation)
            for name, value in output.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach().float() / self.options.accumulation
        return scalars, seen

    def _agree(self, scalars: dict[str, torch.Tensor], stop_signal: int) -> tuple[dict[str, float], int]:
        """The mean of the scalars over the ranks, `finite` 1 if all losses were, and the signal any rank has had."""
        finite = torch.isfinite(scalars["loss"]).float()
        values = torch.stack([*scalars.values(), finite, torch.full_like(finite, stop_signal)])
        values = self.accelerator.gather(values[None])  # (ranks, scalars + 2)
        means = values.mean(dim=0).tolist()
        return dict(zip([*scalars, "finite"], means)), int(values[:, -1].max())

    def _take_step(self) -> float:
        """Clips, holds back what is frozen, steps, and lets the method follow; returns the unclipped gradient norm."""
        norm = clip_each_gradient(self.method.parameters(), self.options.clip_gradient)
        for parameter in self.method.frozen_parameters(self.step):
            parameter.grad = None  # the optimizer then neither moves nor decays it
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(self.step, self.options.steps)
        return float(norm)

    def _refuse_step(self, seen: list[dict[str, Any]]) -> None:
        """Leaves the weights alone, keeps the names of the tiles, and gives up after too many such steps in a row."""
        self.optimizer.zero_grad()
        self.method.discard_step()
        self.non_finite += 1
        place = self.out / "non_finite" / f"step_{self.step:08d}_rank_{self.accelerator.process_index}.json"
        tiles = [{"slide": batch["slide"], "xy": torch.as_tensor(batch["xy"]).tolist()} for batch in seen]
        write_json(place, tiles)
        if self.non_finite >= self.options.max_non_finite:
            raise UserError(
                f"the loss was not finite {self.non_finite} steps in a row, last at step {self.step}: the tiles are in "
                f"{place.parent}; lower --learning_rate, or train without mixed precision"
            )

    def _record(self, values: dict[str, float], began: float) -> float:
        """Writes one line of the log; returns the time from which the next line counts."""
        options, now = self.options, time.monotonic()
        record = {"step": self.step, "tiles": self.step * self.tiles_a_step, **values}
        record |= self.method.schedule_values(self.step, options.steps)
        if self.step % options.panel_every == 0 and values["finite"] == 1.0:
            record |= self.method.collapse_panel()
        record |= {"seconds": now - began, "waited_seconds": self.waited}
        self.log.write(record)
        self.waited = 0.0
        return now

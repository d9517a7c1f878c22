"""The one training loop: schedules, micro-batches, clipping, the step, what the method does after it, checkpoints.

The method is a module whose `model(**inputs)` returns an output with `loss` and detached scalars, and which has

- `after_step(step, total_steps)`, called once after each optimizer step, to move what follows the weights;
- `frozen_parameters(step)`, the parameters that must not move at this step;
- `discard_step()`, to forget what the micro-batches of a step that is not taken have gathered;
- `collapse_panel()` and `schedule_values(step, total_steps)`, numbers for the log;
- `encoder`, what outlives training, and `encoder_part`, the module that holds its weights, for when they are sharded;
- where they are of use, `depths()`, how deep each parameter lies (see `parameter_groups`), and `restart()`, which sets
  buffers that follow the step back to step 0, for weights that come from another run.

The loader is an endless iterable of batches with `state_dict()` and `load_state_dict(states_of_all_ranks)`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from ..progress import ProgressBar
from .agreement import Agreement, agree
from .checkpoint import Checkpoints
from .clipping import clip_gradients, tensor_norms
from .init_from import start_from
from .interrupt import Interrupted, stop_on_signals
from .judging import EncoderOnTheWay
from .optimizer import make_optimizer, parameter_groups, set_rates
from .options import TrainingOptions
from .random_state import seed_rank
from .records import Records
from .refusal import Refusals
from .same_run import require_same_run
from .schedules import cosine_with_warmup, scaled_rate
from .spent import Spent


class ResumableLoader(Protocol):
    """An endless stream of batches that knows its place."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, states: list[dict[str, Any]]) -> None: ...


class TrainingLoop:
    """Trains a method to the end of its schedule; goes on by itself from the last whole checkpoint in `out`.

    Args:
        model: the method, see above.
        to_inputs: makes the method's inputs, on the accelerator's device, of a batch of the loader; draws no random
            numbers, for it is called one batch ahead.
        out: gets `log.jsonl`, `run.json`, `checkpoints/`, and, when there is something to put there, `encoders/`, `trackers/` and
            `non_finite/`.
        config: every option that decides the result; a run goes on only with the same.
        export: writes the method's encoder to a path, every `options.export_every` steps, on the main process.
        judge: numbers for the log that say what the encoder it is given is worth, every `options.judge_every` steps and
            after the last, on the main process. Whatever they draw, the run goes on as if neither had been called.
        before_step: called on all ranks before each step with its number, for what a method needs from the whole cohort
            now and then; what it leaves in buffers of the method is saved with them.
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
        *,
        export: Callable[[Path], None] | None = None,
        judge: Callable[[nn.Module], dict[str, float]] | None = None,
        before_step: Callable[[int], None] | None = None,
    ):
        self.before_step = before_step
        self.loader, self.to_inputs, self.options = loader, to_inputs, options
        self.accelerator, self.out = accelerator, Path(out)
        self.config = {**config, "tiles_a_step": self.tiles_a_step, "mixed_precision": accelerator.mixed_precision}
        self.ahead: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None  # the next batch, fetched already
        self.encoder_on_the_way = EncoderOnTheWay(model, accelerator, options, self.out / "encoders", export, judge)
        self._prepare(model)
        self.records = Records(self.out, options, self.config, accelerator, self.step, self.step * self.tiles_a_step)
        self.refusals = Refusals(self.method, self.out / "non_finite", options.max_non_finite)

    def _prepare(self, model: nn.Module) -> None:
        """Puts the method, its optimizer and the loader where the last checkpoint left them, or at a new start."""
        options, accelerator = self.options, self.accelerator
        keep = (options.keep_checkpoints, options.keep_every)
        self.checkpoints = Checkpoints(self.out / "checkpoints", accelerator, *keep)
        last = self.checkpoints.find_last()
        if last is not None:
            require_same_run(last.path, last.index["config"], self.config, options, accelerator.num_processes)
        elif options.init_from is not None:
            start_from(model, options.init_from)
        model.train()
        groups = parameter_groups(model, options.layer_decay, options.patch_embedding_rate)
        betas = (options.beta1, options.beta2)
        optimizer = make_optimizer(groups, options.optimizer, momentum=options.momentum, betas=betas)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.method = accelerator.unwrap_model(self.model)
        # Collected once: to walk through all modules takes milliseconds, in which a GPU would have nothing to do.
        self.trained = {name: weight for name, weight in self.method.named_parameters() if weight.requires_grad}
        self.step, self.spent = 0, Spent()
        if last is None:
            seed_rank(options.seed, self.step, accelerator.process_index)
            return
        self.loader.load_state_dict(self.checkpoints.restore(last, options.seed))
        self.step = last.index["step"]
        if accelerator.is_main_process:
            self.spent = Spent(last.index["spent"]["cpu_seconds"])

    @property
    def tiles_a_step(self) -> int:
        return self.options.batch_size * self.options.accumulation * self.accelerator.num_processes

    def run(self) -> nn.Module:
        """The trained method.

        Raises Interrupted after Ctrl-C or SIGTERM, when the run has saved itself, and UserError when the loss or the
        gradient was not finite `options.max_non_finite` times in a row.
        """
        steps_left = self.options.steps - self.step
        progress = (
            ProgressBar("training", steps_left, "samples") if self.accelerator.is_main_process else nullcontext()
        )
        with stop_on_signals() as stop, progress, closing(self._batches()) as batches:
            self.spent.lap()
            while self.step < self.options.steps:
                if self.before_step is not None:
                    self.before_step(self.step)
                rates = self._set_rates()
                scalars, tiles = self._accumulate(batches)
                gradients = {name: weight.grad for name, weight in self.trained.items() if weight.grad is not None}
                agreed = self._agree(scalars, gradients, stop.signal)
                if agreed.is_finite:
                    self._take_step(gradients, agreed.norms)
                else:
                    self._refuse_step(tiles, agreed)
                judged = self._look(agreed.stop_signal)
                if self.accelerator.is_main_process:
                    self._record(rates, agreed, judged)
                    progress.advance(self.records.note, self.tiles_a_step)
                if self.options.ends(self.step, self.options.checkpoint_every) or agreed.stop_signal:
                    self._save()
                self.step += 1
                if agreed.stop_signal:
                    said = f"stopped after step {self.step}; the same command goes on from there"
                    raise Interrupted(agreed.stop_signal, said)
        self.encoder_on_the_way.make_whole()
        return self.method

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The loader's batches; closed, and its workers with it, however the run ends."""
        yield from self.loader

    def _set_rates(self) -> dict[str, float]:
        """Sets this step's learning rate and weight decay."""
        step, steps, options = self.step, self.options.steps, self.options
        scaling = (self.tiles_a_step, options.reference_batch, options.batch_scaling)
        learning_rate = cosine_with_warmup(
            step,
            steps,
            base=scaled_rate(options.learning_rate, *scaling),
            final=options.min_learning_rate,
            warmup_steps=options.warmup_steps,
            includes_end=options.warmup_includes_end,
        )
        weight_decay = cosine_with_warmup(step, steps, base=options.weight_decay, final=options.final_weight_decay)
        set_rates(self.optimizer, learning_rate, weight_decay)
        return {"learning_rate": learning_rate, "weight_decay": weight_decay}

    def _accumulate(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Gradients of all micro-batches of the step, their mean scalars, and the names of their tiles."""
        scalars: dict[str, torch.Tensor] = {}
        tiles = []
        for last in [False] * (self.options.accumulation - 1) + [True]:
            names, inputs = self.ahead or self._fetch(batches)
            tiles.append(names)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():  # which `prepare` applies to whole models, not to sharded ones
                    output = self.model(**inputs)
                self.accelerator.backward(output.loss / self.options.accumulation)
            for name, value in output.items():
                scalars[name] = scalars.get(name, 0.0) + value.detach().float() / self.options.accumulation
            self.place = self.loader.state_dict()  # after what was trained on, not what is fetched ahead
            self.ahead = None if last and self._is_last() else self._fetch(batches)  # while a GPU still computes
        return scalars, tiles

    def _fetch(self, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The names of the tiles of the next batch, and the method's inputs of it."""
        with self.spent.waiting():
            batch = next(batches)
        return {name: batch[name] for name in ("slide", "xy") if name in batch}, self.to_inputs(batch)

    def _agree(
        self, scalars: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], stop_signal: int
    ) -> Agreement:
        """What all processes think of this step; the scalars are exchanged only when they are going to be written down."""
        wanted = {}
        if self.records.are_due(self.step) or self.encoder_on_the_way.is_judged(self.step):
            wanted = {**scalars, "cpu_seconds": torch.full_like(scalars["loss"], self.spent.cpu_seconds)}
        norms = tensor_norms(list(gradients.values()))
        return agree(self.accelerator, loss=scalars["loss"], norms=norms, stop_signal=stop_signal, scalars=wanted)

    def _take_step(self, gradients: dict[str, torch.Tensor], norms: list[float]) -> None:
        """Clips, holds back what is frozen, steps, and lets the method follow."""
        clip_gradients(gradients, norms, self.options.clip_gradient, self.options.clip_scope)
        for parameter in self.method.frozen_parameters(self.step):
            parameter.grad = None  # the optimizer then neither moves nor decays it
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.method.after_step(self.step, self.options.steps)
        self.refusals.step_was_taken()

    def _refuse_step(self, tiles: list[dict[str, Any]], agreed: Agreement) -> None:
        """Leaves the weights alone, keeps the names of the tiles, and gives up after too many such steps in a row."""
        self.optimizer.zero_grad()
        self.method.discard_step()
        what = "gradient" if agreed.loss_is_finite else "loss"
        self.refusals.refuse(self.step, self.accelerator.process_index, what, tiles)

    def _look(self, stop_signal: int) -> dict[str, float]:
        """Exports and judges the encoder when it is time to; a run that is asked to stop does not wait for that."""
        if stop_signal and not self._is_last():
            return {}
        with self.spent.uncounted():
            return self.encoder_on_the_way.look(self.step)

    def _record(self, rates: dict[str, float], agreed: Agreement, judged: dict[str, float]) -> None:
        """Writes what the log is to know of this step, if anything."""
        if not agreed.means:
            return
        images = (self.step + 1) * self.tiles_a_step
        record = {"step": self.step, "images": images, **rates, **agreed.means}
        record["cpu_seconds"] *= self.accelerator.num_processes  # of all of them
        record |= {"gradient_norm": math.hypot(*agreed.norms), "finite": float(agreed.is_finite)}
        record |= self.method.schedule_values(self.step, self.options.steps)
        if self.step % self.options.panel_every == 0 and agreed.is_finite:
            record |= self.method.collapse_panel()
        self.records.write({**record, **judged, **self.spent.lap()})

    def _save(self) -> None:
        mine = torch.tensor(self.spent.cpu_seconds, device=self.accelerator.device)
        spent = {"cpu_seconds": float(self.accelerator.reduce(mine, "sum"))}
        self.checkpoints.save(self.step + 1, self.place, self.config, spent)

    def _is_last(self) -> bool:
        return self.step + 1 == self.options.steps

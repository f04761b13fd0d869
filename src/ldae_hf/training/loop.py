"""What every training shares: steps until it is over, and between them reports, evaluations and checkpoints."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from tqdm import tqdm

from .checkpointing import checkpoints
from .metrics_log import MetricsLog
from .optimization import Plan


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


class Step(NamedTuple):
    """What an optimizer step reports: `numbers` on the device, `loss` and `gradient_norm` among them, and the seconds
    that it waited for data."""

    numbers: dict[str, torch.Tensor]
    waited: float


@dataclass
class Loop:
    """Steps from where the run stands to its end, or to where it is told to stop.

    Args:
        name: shown in the bar. folder: of the checkpoints. plan: what the run is. started: its `time.monotonic()`.
        checkpoint_every, evaluate_every: steps, default an epoch. log_every: steps between lines of the log.
        max_steps, max_minutes: stop early, with a checkpoint.
    """

    name: str
    folder: Path
    plan: Plan
    accelerator: Accelerator
    log: MetricsLog
    log_every: int
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def run(
        self,
        step: int,
        take_step: Callable[[int], Step],
        save: Callable[[int], None],
        evaluate: Callable[[int], None] | None = None,
    ) -> int:
        """Runs on from `step`; returns the step at which it stopped.

        Args:
            take_step: given the steps done so far, takes one. save: writes a checkpoint; all processes call it.
            evaluate: is called on the main process while the others wait.

        Raises:
            RunError: the loss or the gradient is not finite.
        """
        plan, accelerator = self.plan, self.accelerator
        last_step = plan.total_steps if self.max_steps is None else min(self.max_steps, plan.total_steps)
        checkpoint_every = self.checkpoint_every or plan.steps_per_epoch
        evaluate_every = self.evaluate_every or plan.steps_per_epoch
        stops = step >= last_step
        bar = tqdm(
            total=plan.total_steps * plan.global_batch_size,
            initial=step * plan.global_batch_size,
            unit=" images",
            unit_scale=True,
            desc=self.name,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file would get ten lines a second
            disable=not accelerator.is_main_process,
        )
        with bar:
            while not stops:
                began, learning_rate = time.monotonic(), plan.learning_rate_at(step)
                taken = take_step(step)
                step += 1

                # ---- report
                bar.update(plan.global_batch_size)
                self.log.add(taken.numbers, taken.waited, time.monotonic() - began, plan.global_batch_size)
                stops = step == last_step or self.is_over()
                saves = stops or step % checkpoint_every == 0
                if saves or step % self.log_every == 0:
                    line = self.log.summary(step, epoch=step / plan.steps_per_epoch, learning_rate=learning_rate)
                    self.check_finite(line)
                    self.log.write(line)
                    shown = dict(loss=f"{line['loss']:.4f}", wait=f"{line['data_wait']:.0%}", lr=f"{learning_rate:.1e}")
                    bar.set_postfix(shown, refresh=False)

                # ---- save: after the evaluation, so that none is missing if the run dies between the two
                if evaluate is not None and (step % evaluate_every == 0 or step == plan.total_steps):
                    if accelerator.is_main_process:
                        evaluate(step)
                    accelerator.wait_for_everyone()
                if saves:
                    save(step)
                    accelerator.wait_for_everyone()
        return step

    def is_over(self) -> bool:
        """Whether the time is up in any process."""
        if self.max_minutes is None:
            return False
        over = time.monotonic() - self.started > 60 * self.max_minutes
        return bool(self.accelerator.reduce(torch.tensor(float(over), device=self.accelerator.device)).item())

    def check_finite(self, line: dict) -> None:
        """Raises RunError, before anything is saved, if the loss, the gradient or another number is not finite."""
        wrong = [f"{name} is {value}" for name, value in line.items() if not math.isfinite(value)]
        if not wrong:
            return
        found = checkpoints(self.folder)
        raise RunError(
            f"At step {line['step']} {' and '.join(wrong)}; "
            f"{f'{found[-1]} is intact' if found else 'nothing has been saved'}, and another --output-dir with a "
            "smaller learning rate, or with clipped gradients, may go further."
        )

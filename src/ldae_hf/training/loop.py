"""What every training shares: steps until it is over, and between them reports, evaluations and checkpoints."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..progress import progress_bar
from .checkpointing import CheckpointError, CheckpointWriter, checkpoints
from .metrics_log import MetricsLog
from .optimization import Plan
from .session import Interrupted, RunError, Session


class Gradient(NamedTuple):
    """What a step has computed, before it changes any weight: `numbers` on the device, `loss` and `gradient_norm` among
    them, and the seconds that it waited for data."""

    numbers: dict[str, torch.Tensor]
    waited: float


@dataclass
class Loop:
    """Steps from where the run stands to its end, or to where it is told to stop.

    Args:
        name: shown in the bar. writer: of the checkpoints. plan: what the run is. started: its `time.monotonic()`.
        checkpoint_every, evaluate_every: steps, default an epoch. log_every: steps between lines of the log.
        max_steps, max_minutes: stop early, with a checkpoint.
        flops_per_image: of a step; None if nobody knows. peak_flops: of a device, per second; None for no MFU.
    """

    name: str
    writer: CheckpointWriter
    plan: Plan
    session: Session
    log: MetricsLog
    log_every: int
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    started: float = field(default_factory=time.monotonic)
    flops_per_image: float | None = None
    peak_flops: float | None = None

    def run(
        self,
        step: int,
        take_gradient: Callable[[int], Gradient],
        apply_gradient: Callable[[int], dict[str, torch.Tensor]],
        save: Callable[[int], None],
        evaluate: Callable[[int], None] | None = None,
        explain: Callable[[int, str, dict[str, float]], str] = lambda step, reason, numbers: "",
    ) -> int:
        """Runs on from `step`; returns the step at which it stopped. All processes call all of these:

        Args:
            take_gradient: given the steps done so far, computes the next one's gradient. apply_gradient: changes the
                weights by it; returns further numbers for the log.
            save: begins a checkpoint. evaluate: may be broken off by a signal; it is then done when the run goes on.
            explain: notes what led to a loss or a gradient that is not finite; returns a sentence for the error.

        Raises:
            RunError: the loss or the gradient is not finite, and no weight has been changed by it; or a checkpoint
                could not be written, and the one before it is intact.
            Interrupted: by a signal, after a checkpoint.
        """
        plan, session = self.plan, self.session
        last_step = plan.total_steps if self.max_steps is None else min(self.max_steps, plan.total_steps)
        checkpoint_every = self.checkpoint_every or plan.steps_per_epoch
        session.stopped_by_limit = last_step <= step < plan.total_steps
        number = 0  # of the signal that ends the run
        if evaluate is not None and self.is_evaluated_at(step) and not self.log.has_evaluation(step):
            number = self.evaluate(step, evaluate)  # which a signal broke off, or came before
        stops = bool(number or step >= last_step)
        bar = progress_bar(
            total=plan.total_steps * plan.global_batch_size,
            initial=step * plan.global_batch_size,
            unit=" images",
            unit_scale=True,
            desc=self.name,
            disable=not session.accelerator.is_main_process,
        )
        try:
            while not stops:
                began, learning_rate = time.monotonic(), plan.learning_rate_at(step)
                gradient = take_gradient(step)
                number, is_over, has_failed = self.agree_on(step, gradient, explain)
                numbers = gradient.numbers | apply_gradient(step)
                step += 1
                session.step, session.stopped_by_limit = step, is_over or step == last_step < plan.total_steps
                stops = bool(step == last_step or is_over or has_failed or number)

                # ---- report
                bar.update(plan.global_batch_size)
                self.log.add(numbers, gradient.waited, time.monotonic() - began, plan.global_batch_size)
                if stops or step % checkpoint_every == 0 or step % self.log_every == 0:
                    bar.set_postfix(self.report(step, learning_rate), refresh=False)

                # ---- save: after the evaluation, so that none is missing if the run dies between the two
                if evaluate is not None and self.is_evaluated_at(step) and not number:
                    number = self.evaluate(step, evaluate)
                    stops = bool(stops or number)
                if stops or step % checkpoint_every == 0:
                    self.save(self.writer.wait)  # first: where that fails, no process may wait for another's shards
                    self.save(lambda step=step: save(step))
            self.save(self.writer.wait)
        finally:
            bar.close()
            self.writer.join()
        if number:
            raise Interrupted(number)
        return step

    def is_evaluated_at(self, step: int) -> bool:
        """Whether an evaluation belongs to a step; none does to the start."""
        every = self.evaluate_every or self.plan.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.plan.total_steps)

    def agree_on(self, step: int, gradient: Gradient, explain: Callable) -> tuple[int, bool, bool]:
        """A signal's number, whether the time is up, and whether a checkpoint has failed, in any process.

        Raises:
            RunError: the loss or the gradient is not finite in one of them.
        """
        numbers = {name: float(gradient.numbers[name]) for name in ("loss", "gradient_norm")}
        finite = all(map(math.isfinite, numbers.values()))
        is_over = self.max_minutes is not None and time.monotonic() - self.started > 60 * self.max_minutes
        session = self.session
        number, over, failed, wrong = session.agree(session.signals.number, is_over, self.writer.failed, not finite)
        if wrong:
            found = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
            reason = " and ".join(found) or "the loss of another process is not finite"
            raise RunError(
                f"At step {step + 1} {reason}; no weight has been changed by it, and {self.what_is_intact()}. "
                f"{explain(step, reason, numbers)} Another --output-dir with a smaller learning rate, or with clipped "
                "gradients, may go further."
            )
        return number, bool(over), bool(failed)

    def report(self, step: int, learning_rate: float) -> dict[str, str]:
        """Writes a line of the log; returns what the bar shows of it."""
        line = self.log.summary(step, epoch=step / self.plan.steps_per_epoch, learning_rate=learning_rate)
        shown = dict(loss=f"{line['loss']:.4f}", wait=f"{line['data_wait']:.0%}")
        if self.flops_per_image is not None:
            flops = line["images_per_second"] * self.flops_per_image
            line["tflops_per_second"] = flops / 1e12
            if self.peak_flops is not None:
                line["mfu"] = flops / (self.peak_flops * self.plan.num_processes)
                shown["mfu"] = f"{line['mfu']:.0%}"
        self.save(lambda: self.log.write(line))
        return shown | dict(lr=f"{learning_rate:.1e}")

    def evaluate(self, step: int, evaluate: Callable[[int], None]) -> int:
        """Returns the number of the signal that broke the evaluation off, else 0."""
        try:
            self.save(lambda: evaluate(step))
        except Interrupted as interrupted:
            return interrupted.number
        return 0

    def save(self, write: Callable[[], None]) -> None:
        """Calls `write` in all processes.

        Raises:
            RunError: there is no room for what it writes, or it fails for another reason outside of this program.
        """
        try:
            self.session.together(write)
        except CheckpointError as error:
            raise RunError(f"{error}; {self.what_is_intact()}.") from error
        except OSError as error:
            raise RunError(
                f"At step {self.session.step} something could not be read or written: {error}; "
                f"{self.what_is_intact()}. If the disk is full, make room, and run the same command again."
            ) from error

    def what_is_intact(self) -> str:
        self.writer.join()
        found = checkpoints(self.writer.folder)
        return f"{found[-1]} is intact" if found else "nothing has been saved yet"

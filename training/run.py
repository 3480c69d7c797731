"""What goes on around the training steps: position, saving, logging, signals, the end."""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from config.recipe_flags import steps_of_run
from config.settings import class_names
from distributed.ranks import Ranks, is_rank
from distributed.signals import Interruption
from training.batches import loader_workers, read_batches
from training.checkpoint import Checkpoint, Progress, newest_state, restore
from training.curves import draw_curves
from training.memory import peak_memory
from training.model_card import write_card
from training.resuming import has_state
from training.run_log import RunLog
from training.trained import Trained
from training.validation import Validation, note_validation

BEST = "best.pth"
MOST_OF_START = 0.05  # of the running average
SAVE_EVERY = 20  # epochs; epoch_159.pth is the published adapter
PICTURES_EVERY = 200  # steps
NEWS_EVERY = 60  # seconds between lines of progress where no bar is shown


class TrainingRun:
    """One run, or the rest of it, as a context manager around the training loop.

    On entering, it restores the newest state if the run is resumed. On leaving, it closes the logs,
    ends the loader's workers and draws the curves.

    Args:
        folder: the run folder.
        args: the flags of `train.py`.
        trained: what is saved and restored.
        loader: training slices, with an `EpochBatches` as sampler.
        validating: whether cases are held out.
    """

    def __init__(
        self,
        folder: Path,
        args: argparse.Namespace,
        trained: Trained,
        loader: DataLoader,
        validating: bool,
        ranks: Ranks,
    ) -> None:
        self.folder, self.args, self.trained, self.ranks = folder, args, trained, ranks
        self.loader, self.sampler = loader, loader.batch_sampler
        self.validating = validating
        self.steps_per_epoch = len(loader)
        # Length of the learning rate's schedule, in steps.
        self.max_iterations = args.max_epochs * self.steps_per_epoch
        self.last_epoch = min(args.stop_epoch, args.max_epochs)
        self.last_step = steps_of_run(args, self.steps_per_epoch)

    def __enter__(self) -> TrainingRun:
        resumes = self.args.resume and self.ranks.first
        self.ranks.copy_first(self.trained.model.state_dict().values())
        self.trained.average.start()
        resumes = resumes and has_state(self.folder)
        state = self.ranks.from_first(newest_state(self.folder) if resumes else None)
        self.fresh = state is None
        self.progress = Progress()
        if state:
            self.progress = restore(state, self.trained, self.ranks)
        self._announce()
        self.trained.model.train()
        with ExitStack() as opened:
            opened.enter_context(loader_workers(self.loader))
            self.interruption = opened.enter_context(Interruption(with_parent=is_rank()))
            self.log = opened.enter_context(self._open_log(state))
            self.bar = opened.enter_context(self._progress_bar())
            opened.enter_context(logging_redirect_tqdm())
            if self.ranks.first:
                write_card(self.folder, vars(self.args))
            self.opened = opened.pop_all()
        self.first_step, self.started = self.progress.step, time.perf_counter()
        self.last_news = self.started
        self.checkpoint = Checkpoint(
            self.folder,
            self.args,
            self.progress,
            self.trained,
            self.log,
            self.ranks,
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self.opened.__exit__(*exception)
        if exception[0] is None and self.ranks.first:
            draw_curves(self.folder, class_names(self.args))
            write_card(self.folder, vars(self.args))

    @property
    def step(self) -> int:
        """The number of the next step, over all epochs."""
        return self.progress.step

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.progress.step >= self.last_step

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, and move the position on after each.

        A state is saved before the first step too. Results without a state then always mean that
        states were deleted, and a folder that cannot hold a state is found at once.
        """
        if self.fresh:
            self.checkpoint.save()
        for epoch in range(self.progress.epoch, self.last_epoch):
            if self.progress.out_of_patience(self.args.patience):
                count = self.progress.not_better
                logging.info("no better score in %d validations: stopping", count)
                return
            yield epoch
            if self.finished:
                return
            self.progress.begin_epoch(epoch + 1)
            self.checkpoint.save()

    def batches(self, epoch: int) -> Iterator[dict[str, Any]]:
        """Yield the batches of raw slices that are left of an epoch."""
        self.sampler.enter(epoch, self.progress.done)
        self.last_time = time.perf_counter()
        if self.finished:
            return
        for slices in read_batches(self.loader):
            yield slices
            if self.finished:
                return

    def end_step(
        self,
        lr: float,
        terms: dict[str, torch.Tensor],
        batch: dict[str, torch.Tensor],
        logits: torch.Tensor,
    ) -> None:
        """Log a step, move the position on, and save the state when it is time.

        Raises:
            SystemExit: a signal asked to stop; the state is saved.
        """
        progress = self.progress
        self.log.step({"step": progress.step, "epoch": progress.epoch, "lr": lr}, terms)
        if progress.step % PICTURES_EVERY == 0 and len(logits):
            image, label = batch["image"][0], batch["low_res_label"][0]
            self.log.pictures(progress.step, image, logits[0], label, class_names(self.args))
        now = time.perf_counter()
        progress.end_step(now - self.last_time)
        self.last_time = now
        self.bar.update()
        self.bar.set_postfix(epoch=progress.epoch, loss=f"{self.log.last_loss:.4f}", refresh=False)
        if self.bar.disable and self.ranks.first and now - self.last_news >= NEWS_EVERY:
            self.last_news = now
            self._tell_progress(now)
        self.checkpoint.after_step(self.interruption)

    def end_epoch(self, epoch: int) -> None:
        """Log the end of an epoch."""
        if self.finished or self.validates(epoch):
            # Validation and the last adapter may be interrupted: they can be repeated from here.
            self.checkpoint.save()
        device = next(self.trained.model.parameters()).device
        seconds = self.progress.seconds
        loss = self.log.end_epoch(epoch, self.progress.step, seconds, peak_memory(device))
        logging.info("epoch %d: mean loss %.4f, %.0f s", epoch, loss, seconds)

    def validates(self, epoch: int) -> bool:
        """Return whether a validation is due after this epoch."""
        complete = self.progress.done == self.steps_per_epoch
        return self.validating and complete and (epoch + 1) % self.args.val_every == 0

    def end_validation(self, epoch: int, found: Validation) -> None:
        """Log a validation, and save `best.pth` if its score is the best so far."""
        if note_validation(self.progress, found, epoch, class_names(self.args), self.log):
            self.checkpoint.save_adapter(BEST)

    def save_adapter(self, epoch: int) -> None:
        """Save the adapter at the published epochs and at the end."""
        ends = self.finished or self.progress.out_of_patience(self.args.patience)
        if ends or (epoch + 1) % SAVE_EVERY == 0:
            self.checkpoint.save_adapter(f"epoch_{epoch}.pth")

    def stop_if_asked(self) -> None:
        """End the program if a signal asked for it; the state was saved before."""
        if self.interruption.asked:
            self.checkpoint.stop()

    def _announce(self) -> None:
        logging.info(
            "%d slices, %d steps per epoch with %d slices each, on %d process(es) with %d slices "
            "at once; %d steps in all, on %s%s",
            len(self.loader.dataset),
            self.steps_per_epoch,
            self.sampler.global_batch,
            self.ranks.count,
            self.args.at_once,
            self.last_step,
            next(self.trained.model.parameters()).device,
            " with --use_amp" if self.args.use_amp else "",
        )
        if self.progress.step:
            logging.info("going on after step %d", self.progress.step)
        best = self.progress.best_epoch
        if best is not None and self.ranks.first and not (self.folder / BEST).is_file():
            logging.warning(
                "%s of epoch %d is gone; only a better validation will write it again", BEST, best
            )
        start = (self.args.ema or 0) ** self.last_step  # of the weights at the start in the average
        if start > MOST_OF_START:
            logging.warning(
                "--ema %g is slow for %d steps: %.0f %% of the last average are the weights at the "
                "start; pass a smaller one",
                self.args.ema,
                self.last_step,
                100 * start,
            )
        if self.validating and self.last_step < self.args.val_every * self.steps_per_epoch:
            logging.warning("training ends before the first validation, after --val_every epochs")

    def _open_log(self, state: dict[str, Any] | None) -> RunLog:
        return RunLog(
            self.folder if self.ranks.first else None,
            every=self.args.log_every,
            names_of=self._slice_names,
            skip=self.args.skip_nan,
            # A GradScaler skips a step whose gradient overflows; that is nothing to report.
            watched=("loss",) if self.trained.scaler.is_enabled() else ("loss", "grad_norm"),
            position=state["log"] if state else None,
            step=self.progress.step,
        )

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.last_step,
            initial=self.progress.step,
            desc="training",
            unit="step",
            # None: no bar where the output is no terminal; `end_step` logs the progress there.
            disable=None if self.ranks.first else True,
        )

    def _tell_progress(self, now: float) -> None:
        """Log step, loss and the time left, at the mean speed since the start of the program."""
        step = self.progress.step
        left = (now - self.started) / (step - self.first_step) * (self.last_step - step)
        minutes = math.ceil(left / 60)
        loss = self.log.last_loss  # NaN until the log fetches the first losses from the device
        logging.info(
            "step %d of %d, epoch %d: %sabout %s left",
            step,
            self.last_step,
            self.progress.epoch,
            f"loss {loss:.4f}, " if math.isfinite(loss) else "",
            f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min",
        )

    def _slice_names(self, facts: dict[str, Any]) -> list[str]:
        """Return the names of the slices of a step, on all ranks together."""
        number = facts["step"] - facts["epoch"] * self.steps_per_epoch
        names = self.loader.dataset.dataset.sample_list
        return [names[index] for index in self.sampler.step(facts["epoch"], number)]

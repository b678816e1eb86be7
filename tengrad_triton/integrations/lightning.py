"""The stats of an optimizer in the loggers of PyTorch Lightning."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from tengrad_triton.integrations.numbers import has_stats, numbers_of
from tengrad_triton.optim.validation import check_count


class LogStats(Callback):  # type: ignore[misc] # of a package that need not be installed
    """Logs the stats of every optimizer that has some, in all loggers of the trainer.

    Args:
        every: the number of steps between two logs; by default the trainer's ``log_every_n_steps``.
        each: whether every block has its own curves: see `numbers_of`.

    Raises:
        TypeError: ``every`` is no whole number.
        ValueError: ``every`` is below 1.
    """

    def __init__(self, every: int | None = None, *, each: bool = False) -> None:
        check_count("every", every, optional=True)
        self._every, self._each, self._last = every, each, 0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last or step % (self._every or trainer.log_every_n_steps):
            return
        self._last = step
        for optimizer in filter(has_stats, trainer.optimizers):
            numbers = numbers_of(optimizer, each=self._each)
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step)

"""`TENGraD` in the `Trainer` of Hugging Face: the likelihood of a model's labels, an optimizer factory, a callback.

The models of transformers take the labels in their forward, and the likelihood has to know which of them count. So a
hook on the model hands it the labels of each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from typing_extensions import override

from tengrad_triton.integrations.numbers import numbers_of
from tengrad_triton.likelihoods import Bernoulli, Categorical, Gaussian
from tengrad_triton.optim.tengrad import TENGraD
from tengrad_triton.optim.validation import check_count

_NEXT_TOKEN = {"ForCausalLM"}
_EACH_TOKEN = {"ForMaskedLM", "ForTokenClassification"}
_EACH_SAMPLE = {f"For{kind}Classification" for kind in ("Sequence", "Image", "Video", "Audio")}
_OF_PROBLEM = {"regression": Gaussian, "multi_label_classification": Bernoulli}
_IGNORED = -100

MicroBatches = int | Callable[[], int]
"""The number of forwards of a step, or a function that returns it before each forward."""


def likelihood_of_labels(
    model: nn.Module, *, micro_batches: MicroBatches = 1, average_tokens_across_devices: bool = True
) -> Categorical | Gaussian | Bernoulli:
    """Return the likelihood of the loss that a model of transformers computes from its ``labels``.

    Where there is a label for each token, a hook on the model tells the likelihood before each forward which of them
    count: those that are not -100, shifted by one token for a causal language model.

    Args:
        model: a model of transformers for causal or masked language modelling, for the classification of tokens,
            sequences, images, videos or audio, or for regression; or a model of PEFT that contains one.
        micro_batches: `gradient_accumulation_steps` of the Trainer, which divides the loss by the number of labels in
            all micro-batches of a step. If an epoch has a rest of fewer micro-batches, give
            ``lambda: trainer.current_gradient_accumulation_steps``.
        average_tokens_across_devices: the argument of the Trainer with this name: whether that number of labels is the
            one of all processes.

    Raises:
        ValueError: the loss of this model is not known here.
    """
    if not callable(micro_batches):
        check_count("micro_batches", micro_batches)
    unwrap: Any = getattr(model, "get_base_model", None)  # of PEFT
    inner = model if unwrap is None else unwrap()
    loss, config = _loss_of(inner), getattr(inner, "config", None)
    if loss in _EACH_SAMPLE:
        problem = getattr(config, "problem_type", None)
        problem = problem or ("regression" if getattr(config, "num_labels", None) == 1 else None)
        return _OF_PROBLEM.get(str(problem), Categorical)()
    if loss not in _NEXT_TOKEN | _EACH_TOKEN:
        raise ValueError(
            f"the loss of {type(inner).__name__} ({loss}) is not known: pass TENGraD the likelihood= and output= of "
            "this loss, or fisher='empirical', which needs neither"
        )
    likelihood = Categorical(dim=-1, ignore_index=_IGNORED)
    hook = _Labels(likelihood, loss in _NEXT_TOKEN, micro_batches, average_tokens_across_devices)
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return likelihood


def _loss_of(model: nn.Module) -> str | None:
    """Return the name of a model's loss in transformers, which has none for older causal language models."""
    if type(model).__name__.endswith("LMHeadModel"):
        return "ForCausalLM"
    return getattr(model, "loss_type", None)


class _Labels:
    """A hook that sets the targets of a likelihood, and the weights of its samples, to those of the present batch."""

    def __init__(self, likelihood: Categorical, shifted: bool, micro_batches: MicroBatches, of_all: bool) -> None:
        self._likelihood, self._shifted, self._micro_batches = likelihood, shifted, micro_batches
        self._of_all = of_all

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = self._labels(kwargs)
        self._likelihood.target, self._likelihood.sample_weight = labels, None
        total = kwargs.get("num_items_in_batch")
        if labels is None or total is None:
            return
        # The likelihood's mean is over the labels of one forward, the loss's over those of all forwards of the step.
        steps = self._micro_batches() if callable(self._micro_batches) else self._micro_batches
        # With the labels of all processes, the Trainer multiplies the loss by their number.
        processes = dist.get_world_size() if self._of_all and dist.is_available() and dist.is_initialized() else 1
        share = (labels != _IGNORED).sum() * steps * processes / total
        self._likelihood.sample_weight = share.expand(len(labels))

    def _labels(self, kwargs: dict[str, Any]) -> Tensor | None:
        labels: Tensor | None = kwargs.get("labels")
        if not self._shifted or labels is None:
            return labels
        shifted: Tensor | None = kwargs.get("shift_labels")
        return F.pad(labels, (0, 1), value=_IGNORED)[..., 1:] if shifted is None else shifted


class ForTrainer:
    """Makes the `TENGraD` of a `Trainer`, which has no model yet where its arguments are written.

        Trainer(model, args, …, optimizer_cls_and_kwargs=(ForTrainer, {"lr": 0.03, "weight_decay": 0.01}))

    As in `Trainer`, the weight decay is for all parameters but biases and those of norms. The likelihood is
    `likelihood_of_labels` unless one is given. The arguments ``learning_rate`` and ``weight_decay`` of the Trainer have
    no effect: they are those of AdamW.
    """

    def __call__(
        self,
        model: nn.Module,
        micro_batches: MicroBatches = 1,
        average_tokens_across_devices: bool = True,
        **settings: Any,
    ) -> TENGraD:
        """Return the optimizer.

        Args:
            model: the model of the Trainer.
            micro_batches: see `likelihood_of_labels`.
            average_tokens_across_devices: see `likelihood_of_labels`.
            settings: of `TENGraD`.

        Raises:
            ValueError: the likelihood is not given, and the loss of this model is not known.
        """
        if "likelihood" not in settings and settings.get("fisher") != "empirical":
            settings["likelihood"] = likelihood_of_labels(
                model, micro_batches=micro_batches, average_tokens_across_devices=average_tokens_across_devices
            )
        if "params" not in settings:
            settings["params"] = _decay_groups(model, settings.get("weight_decay", 0.0))
        return TENGraD(model, **settings)


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    trained = [(name in decayed, p) for name, p in model.named_parameters() if p.requires_grad]
    of_groups = ((decay, [p for decays, p in trained if decays == bool(decay)]) for decay in (weight_decay, 0.0))
    if not weight_decay:
        return [{"params": [p for _, p in trained]}]
    return [{"params": params, "weight_decay": decay} for decay, params in of_groups if params]


class LogStats(TrainerCallback):  # type: ignore[misc] # of a package that need not be installed
    """Logs the stats of the optimizer as `Trainer.log` logs the loss: after every ``logging_steps``.

        trainer.add_callback(LogStats(trainer))

    Args:
        trainer: whose optimizer has stats.
        each: whether every block has its own curves: see `numbers_of`.
    """

    def __init__(self, trainer: Trainer, *, each: bool = False) -> None:
        self._trainer, self._each = trainer, each

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log:
            self._trainer.log(numbers_of(self._trainer.optimizer, each=self._each))
            control.should_log = True  # which a log resets: that of the loss is still to come

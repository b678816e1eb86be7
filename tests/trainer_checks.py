"""The oracle for a loop that is not ours: hooks on the optimizer compare each step with the dense solve.

Nothing of the loop is known here but what it does to the model and to the optimizer.
"""

import torch
from dense import blocks_of
from graph_rows import SETTINGS, assert_steps, cotangents_of, dense_steps, rows_of_graph, unseen

from tengrad_triton import Categorical, TENGraD


def noting(likelihood):
    """Return the likelihood, which keeps what it draws as its attribute ``drawn``."""
    draw, likelihood.drawn = likelihood.sample, []

    def sample(output, generator):
        likelihood.drawn.append(draw(output, generator))
        return likelihood.drawn[-1]

    likelihood.sample = sample
    return likelihood


class Watched:
    """A TENGraD whose every step has to be that of the dense solve with rows through the graph of other forwards.

    Args:
        model: a model of transformers without dropout, which the loop calls.
        fisher: which rows.
        likelihood: of the labels.
        share: what the loop multiplies the loss of each forward by.
        options: of the optimizer.

    Attributes:
        optimizer: to be given to the loop.
        checked: how many forwards each step had.
    """

    def __init__(self, model, fisher="sampled", likelihood=None, share=1.0, **options):
        self.model, self.fisher, self.share = model, fisher, share
        self.likelihood = noting(likelihood or Categorical())
        settings = {**SETTINGS, "lr": 0.1, **options}
        self.optimizer = TENGraD(model, fisher=fisher, likelihood=self.likelihood, **settings)
        self.checked, self._calls = [], []
        model.register_forward_pre_hook(self._note, with_kwargs=True)
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)

    def _note(self, model, args, kwargs):
        if torch.is_grad_enabled() and not self.optimizer._capture._flags.own.is_set:
            self._calls.append((args, dict(kwargs)))

    def _before(self, optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._note_grads()
            return None

        def noted():
            loss = closure()
            self._note_grads()
            return loss

        return args[:1], {"closure": noted}

    def _note_grads(self):
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self._old = {name: p.detach().clone() for name, p in trained}
        self._grads = {name: p.grad.clone() for name, p in trained if p.grad is not None}

    def _after(self, optimizer, args, kwargs):
        new = {name: self.model.get_parameter(name).detach().clone() for name in self._old}
        self._put(self._old)
        calls, self._calls = self._calls, []
        with unseen(optimizer), torch.enable_grad():
            rows = self._rows(calls)
        self._put(new)
        blocks = [[name for name in block if name in self._grads] for block in blocks_of(self.model)]
        steps = dense_steps(blocks, {name: rows[name] for name in self._grads}, self._grads)
        expected = {name: self._lr_of(name) * (step + self._decay_of(name)) for name, step in steps.items()}
        assert_steps(self.model, self._old, expected, f"step {len(self.checked)}")
        self.checked.append(len(calls))
        self.likelihood.drawn.clear()

    def _group_of(self, name):
        parameter = self.model.get_parameter(name)
        return next(g for g in self.optimizer.param_groups if any(p is parameter for p in g["params"]))

    def _lr_of(self, name):
        return self._group_of(name)["lr"]

    def _decay_of(self, name):
        return self._group_of(name)["weight_decay"] * self._old[name].flatten()

    @torch.no_grad()
    def _put(self, values):
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)

    def _rows(self, calls):
        """Return {name: rows}, all forwards of the step together, with their common number of samples."""
        total, parts = sum(len(kwargs["labels"]) for _, kwargs in calls), []
        for place, (args, kwargs) in enumerate(calls):
            output = self.model(*args, **kwargs)  # whose hooks tell the likelihood the labels
            seen = output.logits
            target = self.likelihood.drawn[place] if self.fisher == "sampled" else None
            cotangents = cotangents_of(self.fisher, [seen], output.loss, self.likelihood, target, total * self.share)
            parts.append(rows_of_graph(self.model, [seen], cotangents))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

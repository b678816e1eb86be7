"""A training loop from a drawn plan, where every step is compared with the dense solve (`random_oracle`)."""

import copy
import re
import warnings
from dataclasses import dataclass
from functools import partial

import dense
import torch
import torch.nn.functional as F
from random_models import CLASSES, DERIVING, WIDTH, ModelPlan, RandomModel
from random_oracle import DAMPING, InvalidModelError, Oracle, close, count, loss_of, synchronize, total_of
from torch import nn
from torch.func import functional_call

from tengrad_triton import TENGraD
from tengrad_triton.likelihoods import LIKELIHOODS

LR = 0.05
REFUSALS = (
    r"expects .*; the model returned",  # two outputs for a likelihood of one
    r"was modified in place between its forward and optimizer\.step\(\)",
)
WARNINGS = (r"^no exact rows for ", r"^no rule gave rows of ")
BESIDE = r"^a part of the gradient of .* does not come through the output that has rows"
OTHER_LOSS = r"^the loss is not that of the likelihood: .* times"


@dataclass(frozen=True)
class StepPlan:
    """One step: its micro-batches' sizes, how gradients are cleared, and what else happens in it."""

    sizes: tuple[int, ...] = (4,)
    together: bool = False  # one backward for all micro-batches
    clear: str = "optimizer"
    clears: str = "first"
    clips: bool = False
    skips: bool = False
    frozen: int = 0  # the number of the parameter that is frozen during this step, from 1
    freezes_layer: bool = False
    objective: str = "mean"  # or with a penalty, or with two backwards
    between: str = "nothing"  # before the step
    diagnosis: str = "nothing"  # between forward and backward


@dataclass(frozen=True)
class Plan:
    model: ModelPlan
    steps: tuple[StepPlan, ...] = (StepPlan(), StepPlan())
    fisher: str = "sampled"
    likelihood: str = "categorical"
    blocks: str = "layer"
    refresh_every: int = 1
    representation: str = "auto"


def clear(optimizer, model, how):
    params = list(model.parameters())
    if how == "optimizer":
        optimizer.zero_grad()
    elif how == "model":
        model.zero_grad()
    elif how == "to zeros":
        optimizer.zero_grad(set_to_none=False)
    elif how == "model to zeros":
        model.zero_grad(set_to_none=False)
    else:
        for p in params:
            p.grad = None


def derivatives(total, params):
    """Return the derivatives of what the model returned, None where there is none."""
    if not total.requires_grad:
        return [None]
    return torch.autograd.grad(total, list(params.values()), retain_graph=True, allow_unused=True)


class Loop:
    """The loop of a plan."""

    def __init__(self, plan):
        torch.manual_seed(0)
        self.plan, self.model = plan, RandomModel(plan.model).double()
        with torch.no_grad():  # no scale of 1, and no shift of 0
            for p in self.model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        self.model.train(not plan.model.eval_mode)
        self.derives = any(piece.kind in DERIVING for piece in plan.model.pieces)
        self.model.pieces[0].seen = 0
        self.model.pieces[0].register_forward_hook(count)
        self.plain, self.twin = copy.deepcopy(self.model), copy.deepcopy(self.model)
        self.likelihood = dense.Recording(LIKELIHOODS[plan.likelihood])
        if plan.fisher == "exact":
            self.likelihood.hessian_factor = LIKELIHOODS[plan.likelihood].hessian_factor
        output = {"dictionary": "logits", "first of two": 0, "beside a scalar": 1}.get(plan.model.output)
        self.optimizer = TENGraD(
            self.model, lr=LR, momentum=0.0, scaling="none", damping=DAMPING,
            fisher=plan.fisher, likelihood=self.likelihood, blocks=plan.blocks, refresh_every=plan.refresh_every,
            representation=plan.representation, output=output, seed=0,
        )  # fmt: skip
        self.oracle, self.age, self.warned = Oracle(plan), None, set()
        names = [name for name, _ in self.model.named_parameters()]
        self.blocks = dense.blocks_of(self.model) if plan.blocks == "layer" else [names]
        self.generator = torch.Generator().manual_seed(1)

    def batch(self, size):
        x = torch.randn(size, self.plan.model.tokens, WIDTH, generator=self.generator, dtype=torch.float64)
        labels = torch.randint(CLASSES, (size,), generator=self.generator)
        return x, labels if self.plan.likelihood == "categorical" else F.one_hot(labels, CLASSES).double()

    def run(self):
        for step in self.plan.steps:
            self.freeze(step)
            self.between(step)
            self.step(step)

    def freeze(self, step):
        named = dict(self.model.named_parameters())
        chosen = list(named)[step.frozen % (len(named) + 1) - 1] if step.frozen % (len(named) + 1) else None
        layer = chosen.rpartition(".")[0] if chosen else None
        for name, p in named.items():
            p.requires_grad_(not (name == chosen or (step.freezes_layer and name.rpartition(".")[0] == layer)))

    def between(self, step):
        modes = [(m, m.training) for m in self.model.modules()]
        x, target = self.batch(3)
        x.requires_grad_(step.between == "derivative of the input")
        self.plain_step(StepPlan(), x, target, 1, {})
        if step.between == "evaluation":
            self.model.eval()
            with torch.set_grad_enabled(self.derives):
                self.model(x)
        elif step.between == "forward only":
            self.model(x)
        elif step.between == "derivative of the input":
            output = self.model(x.clone())
            torch.autograd.grad(total_of(self.plan, output), x)
        elif step.between == "torch.func":
            self.transform(x)
        for m, mode in modes:
            m.training = mode

    def transform(self, x):
        self.model.eval()

        def total(parameters, model=self.model):
            return functional_call(model, parameters, (x.clone(),))[0].sum()

        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        is_checkpointed = any(piece.wrap == "checkpoint" for piece in self.plan.model.pieces)
        if self.plan.model.output in ("tensor", "tokens' mean") and not self.derives and not is_checkpointed:
            try:  # it derives by frozen parameters too, which no other pass of the plan may have done
                torch.func.grad(partial(total, model=synchronize(self.plain, self.model)))(parameters)
            except RuntimeError as error:
                raise InvalidModelError(str(error)) from error
            torch.func.grad(total)(parameters)

    def step(self, step):
        model, plan = self.model, self.plan
        due = self.age is None or self.age >= plan.refresh_every
        if step.clears == "first":
            clear(self.optimizer, model, step.clear)
        if due:
            self.oracle.rows = []
        gradients = self.backwards(step, due)
        actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected = {name: gradients.get(name, torch.zeros_like(g)) for name, g in actual.items()}
        assert gradients.keys() <= actual.keys()
        assert close(actual, expected), "gradients differ from those without the optimizer"
        if step.clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if not step.skips:
            self.compare(due)
        if step.clears != "first" or step.skips:
            clear(self.optimizer, model, step.clear)

    def backwards(self, step, due):
        """Run the forwards and backwards of a step; return the gradients as they are without the optimizer."""
        named = self.model.named_parameters()
        is_cleared = step.diagnosis == "clearing" and len(step.sizes) == 1  # after the forward
        gradients = {} if is_cleared else {name: p.grad.clone() for name, p in named if p.grad is not None}
        losses, total = [], sum(step.sizes)
        for size in step.sizes:
            x, target = self.batch(size)
            if step.diagnosis != "nothing" or step.objective == "input penalty":
                x.requires_grad_()
            plain, twin = self.plain, synchronize(self.twin, self.model)
            share = 1 / len(step.sizes)
            self.plain_step(step, x, target, share, gradients)
            output = self.model(x.clone())
            self.same_outputs(plain, output)
            self.diagnose(step, x, output)
            if is_cleared:
                clear(self.optimizer, self.model, step.clear)
            loss = self.objective(step, self.model, x, output, target) * share
            losses.append(loss)
            if not step.together:
                self.backward(step, loss)
            if due and not step.skips:
                scale = total * share * (2 if step.objective == "two backwards" else 1)
                self.oracle.add(twin, x.clone(), target, self.likelihood, scale)
        if step.together:
            self.backward(step, sum(losses))
        return gradients

    def diagnose(self, step, x, output):
        total = total_of(self.plan, output)
        if step.diagnosis == "derivative of the input":
            torch.autograd.grad(total, x, retain_graph=True, allow_unused=True)
        elif step.diagnosis == "derivative of the input, twice":
            torch.autograd.grad(total, x, create_graph=True, allow_unused=True)

    def objective(self, step, model, x, output, target):
        loss = loss_of(self.plan, output, target)
        if step.objective == "weight penalty":
            return loss + 0.1 * sum(p.square().sum() for p in model.parameters())
        if step.objective == "input penalty":
            (slope,) = torch.autograd.grad(total_of(self.plan, output), x, create_graph=True)
            return loss + slope.square().mean()
        return loss

    def backward(self, step, loss):
        if step.objective == "two backwards":
            loss.backward(retain_graph=True)
        loss.backward()

    def plain_step(self, step, x, target, share, gradients):
        """Add the gradients of a model that no optimizer knows."""
        plain = synchronize(self.plain, self.model)
        try:
            params = {name: p for name, p in plain.named_parameters() if p.requires_grad}
            output = plain(x.clone())
            uses = derivatives(total_of(self.plan, output), params)
            loss = self.objective(step, plain, x, output, target) * share
            loss = 2 * loss if step.objective == "two backwards" else loss
            inputs = [*params.values(), *([x] if x.requires_grad else [])]
            grads = torch.autograd.grad(loss, inputs, allow_unused=True)[: len(params)]
        except RuntimeError as error:
            raise InvalidModelError(str(error)) from error
        if all(grad is None for grad in uses):  # a forward like that does not count
            raise InvalidModelError("nothing that is trained has a part in this forward")
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                gradients[name] = gradients.get(name, 0) + grad

    def same_outputs(self, plain, output):
        assert self.model.forwards == plain.forwards, "the model's forward ran more often than without the optimizer"
        assert self.model.pieces[0].seen == plain.pieces[0].seen, "a hook of the user ran more often"

    def compare(self, due):
        """Take the step, and compare it with the dense solve."""
        params = dict(self.model.named_parameters())
        before = {name: p.detach().clone() for name, p in params.items()}
        present = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
        if not present:
            return
        self.optimizer.step()
        covered = {row.parameter for row in self.optimizer.summary().parameters if row.block != "-"}
        self.age = 1 if due else self.age + 1
        if due:
            self.oracle.refresh(self.blocks, covered)
        grads = {"present": present, "all": {n: present.get(n, torch.zeros_like(p)) for n, p in params.items()}}
        change = {name: (before[name] - params[name].detach()) / LR for name in params}
        expected = {name: torch.zeros_like(p) for name, p in params.items()} | self.oracle.change(grads)
        off = [name for name in params if not close({0: change[name]}, {0: expected[name]})]
        assert close(change, expected), f"steps differ: {off}"
        self.check_uncovered(present, covered)

    def check_uncovered(self, present, covered):
        """Whatever takes the SGD step was named in a warning."""
        said = " ".join(str(one.message) for one in self.warned)
        for name, grad in present.items():
            owner = re.sub(r"(\.parametrizations\..*|\.[^.]*)$", "", name)
            named = re.search(rf" ({re.escape(owner)}|{re.escape(name)})(,| \(| at )", said)
            assert name in covered or named or not grad.any(), f"{name} takes the SGD step silently"


def run(plan):
    """Run a loop; return "exact", or the first words of a documented error.

    Raises:
        InvalidModelError: the model cannot do this without the optimizer either.
        AssertionError: a step was another one than the dense solve, or a warning is not documented.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loop = Loop(plan)
        loop.warned = seen
        try:
            loop.run()
        except (ValueError, TypeError, RuntimeError) as error:
            error.add_note(f"in {plan!r}")
            found = [pattern for pattern in REFUSALS if re.search(pattern, str(error))]
            if not found:
                raise
            return f"refused: {found[0]}"
    ragged = any(len(set(step.sizes)) > 1 for step in plan.steps)
    others = {step.objective for step in plan.steps}
    allowed = [*WARNINGS, *([OTHER_LOSS] if ragged or "two backwards" in others else [])]
    allowed += [BESIDE] if others & {"weight penalty", "input penalty"} else []
    for one in seen:
        assert any(re.search(pattern, str(one.message)) for pattern in allowed), one.message
    return "exact, with a warning" if seen else "exact"

"""The Trainer of Hugging Face: its steps are those of the dense solve, and its checkpoints go on bit for bit."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from graph_rows import SETTINGS
from torch import nn
from trainer_checks import Watched
from trainer_models import MODELS, VOCABULARY, bert, flat, gpt2, sentences, texts, vit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from tengrad_triton import Bernoulli, Categorical, Gaussian, TENGraD
from tengrad_triton.integrations.transformers import ForTrainer, LogStats, likelihood_of_labels

# What other libraries warn of is theirs.
LOUD = pytest.mark.filterwarnings("default", "error:the loss is not that", "error:no exact rows")


@pytest.fixture(autouse=True)
def _quiet():
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trainer_of(folder, model, data, optimizer=None, batch=4, **arguments):
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    steady = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3, "eval_strategy": "no"}
    options = {**quiet, **steady, "per_device_train_batch_size": batch, **arguments}
    chosen = options.pop("chosen", None)
    arguments = TrainingArguments(str(folder), **options)
    return Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), optimizer_cls_and_kwargs=chosen)


STEPS = {"plain": {}, "clipped": {"max_grad_norm": 0.1}, "micro-batches": {"gradient_accumulation_steps": 2}}


def with_fisher(name, fisher):
    many = fisher == "exact" and MODELS[name][1] is texts  # a row for each token and each entry of the vocabulary
    return pytest.param(name, fisher, marks=pytest.mark.slow if many else ())


@LOUD
@pytest.mark.parametrize("way", STEPS)
@pytest.mark.parametrize(
    ("name", "fisher"), [with_fisher(name, fisher) for name in MODELS for fisher in ("sampled", "empirical", "exact")]
)
def test_steps_of_the_trainer_are_those_of_the_dense_solve(name, fisher, way, tmp_path):
    make, data = MODELS[name]
    model, count = make().double(), STEPS[way].get("gradient_accumulation_steps", 1)
    likelihood = likelihood_of_labels(model, micro_batches=count)
    share = 1 / count if name == "bert" else 1.0
    watched = Watched(model, fisher, likelihood, share)
    trainer = trainer_of(tmp_path, model, data(16), watched.optimizer, 4 // count, **STEPS[way])
    if name == "bert":  # which takes `num_items_in_batch`, but does not use it
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    assert watched.checked == [count] * 3


@LOUD
@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_micro_batches_make_the_fisher_matrix_of_the_whole_batch(name, tmp_path):
    """The exact rows depend on no drawn labels; the labels that count are not as many in each micro-batch."""
    matrices, ends = [], []
    for count in (1, 2):
        torch.manual_seed(0)
        model, data = (gpt2(), texts(8)) if name == "gpt2" else (vit(), MODELS["vit"][1](8))
        likelihood = likelihood_of_labels(model.double(), micro_batches=count)
        optimizer = TENGraD(model, fisher="exact", likelihood=likelihood, **SETTINGS)
        accumulates = {"gradient_accumulation_steps": count}
        trainer_of(tmp_path, model, data, optimizer, 4 // count, max_steps=1, **accumulates).train()
        block = "transformer.h.0.attn.c_attn" if name == "gpt2" else "vit.layers.0.attention.q_proj"
        matrices.append(optimizer.fisher_block(block))
        ends.append(flat(model))
    assert torch.allclose(*matrices, rtol=1e-9, atol=1e-9 * matrices[0].abs().max())
    assert torch.allclose(*ends, rtol=1e-9 if name == "vit" else 1e-5)  # the loss of GPT-2 is computed in float32


@LOUD
@pytest.mark.parametrize("told", [True, False])
def test_a_rest_of_fewer_micro_batches_is_asked_of_the_trainer(told, tmp_path):
    """The second step has one micro-batch; with the number of the others the loss would look like another one."""
    asked = {"micro_batches": (lambda: trainer.current_gradient_accumulation_steps) if told else 2}
    chosen = ForTrainer, {"verify": "always", **asked}
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    trainer = trainer_of(tmp_path, gpt2(), texts(6), chosen=chosen, batch=2, **options)
    if told:
        trainer.train()
    else:
        with pytest.raises(UserWarning, match=r"the derivative is 0\.5 times that of the mean"):
            trainer.train()


@LOUD
def test_the_trainer_does_not_divide_berts_loss_and_the_optimizer_says_so(tmp_path):
    model = bert()
    trainer = trainer_of(tmp_path, model, sentences(16), TENGraD(model), 2, gradient_accumulation_steps=2)
    with pytest.raises(UserWarning, match="the derivative is 2 times that of the mean"):
        trainer.train()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@LOUD
def test_a_checkpoint_goes_on_as_one_run(name, tmp_path):
    """With dropout, a falling rate and weight decay; the interruption is within an interval of the curvature."""
    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-4"):
        set_seed(0)
        make, data = MODELS[name]
        model = make(0.1)
        chosen = ForTrainer, {"refresh_every": 3, "seed": 0, "weight_decay": 0.1}
        saves = {"save_strategy": "steps", "save_steps": 4, "max_steps": 7, "lr_scheduler_type": "linear"}
        trainer = trainer_of(tmp_path, model, data(16), chosen=chosen, max_grad_norm=1.0, **saves)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.optimizer.optimizer.stats.steps == 7
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
@LOUD
def test_a_compiled_model_takes_the_same_steps(fisher, tmp_path):
    ends = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = gpt2()
        optimizer = TENGraD(model, fisher=fisher, likelihood=likelihood_of_labels(model), refresh_every=2, seed=0)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
        trainer_of(tmp_path, model, texts(16), optimizer, max_steps=5, **options).train()
        ends.append(flat(model))
    torch._dynamo.reset()
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@LOUD
def test_buffers_that_a_compiled_model_gives_away_are_explained(tmp_path):
    torch._dynamo.reset()
    model = bert()
    optimizer = TENGraD(model, refresh_every=2)
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 5}
    with pytest.raises(RuntimeError, match=r"donated_buffer = False before the first call"):
        trainer_of(tmp_path, model, sentences(16), optimizer, **compiled).train()
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        trainer_of(tmp_path, model, sentences(16), optimizer, **compiled).train()
    torch._dynamo.reset()


@LOUD
def test_the_factory_makes_the_groups_of_the_trainer(tmp_path):
    model = gpt2().double()
    twin = copy.deepcopy(model)
    chosen = ForTrainer, {"lr": 0.02, "weight_decay": 0.1, "seed": 0}
    trainer = trainer_of(tmp_path, model, texts(16), chosen=chosen)
    trainer.train()
    decayed = set(trainer.get_decay_parameter_names(twin))
    named = dict(twin.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name in decayed], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name not in decayed], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    optimizer = TENGraD(twin, groups, lr=0.02, likelihood=likelihood_of_labels(twin), seed=0)
    trainer_of(tmp_path, twin, texts(16), optimizer).train()
    assert torch.equal(flat(model), flat(twin))


@LOUD
def test_the_class_itself_is_refused_with_what_to_do(tmp_path):
    chosen = TENGraD, {"lr": 0.02}
    with pytest.raises(TypeError, match="ForTrainer"):
        trainer_of(tmp_path, bert(), sentences(8), chosen=chosen).train()


@LOUD
def test_stats_are_logged_beside_the_loss(tmp_path):
    model = bert()
    logs = {"logging_strategy": "steps", "logging_steps": 2, "max_steps": 4}
    trainer = trainer_of(tmp_path, model, sentences(16), TENGraD(model), **logs)
    trainer.add_callback(LogStats(trainer))
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4]
    assert [(entry["step"], entry["tengrad/steps"]) for entry in history if "tengrad/rows" in entry] == [(2, 2), (4, 4)]


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 6,
}
LIKELIHOODS = {
    "one of several": (bert, Categorical),
    "several": (lambda: _with_problem(3, "multi_label_classification"), Bernoulli),
    "regression": (lambda: _with_problem(3, "regression"), Gaussian),
    "one number": (lambda: _with_problem(1, None), Gaussian),
}


def _with_problem(labels, problem):
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=labels, problem_type=problem, **SMALL))


@pytest.mark.parametrize("case", LIKELIHOODS)
@LOUD
def test_the_likelihood_is_that_of_the_labels(case):
    """A loss that is not the likelihood's would be warned of, which is an error here."""
    make, kind = LIKELIHOODS[case]
    model = make().eval()
    likelihood = likelihood_of_labels(model)
    assert type(likelihood) is kind
    optimizer = TENGraD(model, likelihood=likelihood)
    tokens = torch.randint(VOCABULARY, (4, 6))
    labels = {
        "one of several": torch.tensor([0, 1, 2, 1]), "several": torch.randint(2, (4, 3)).float(),
        "regression": torch.randn(4, 3), "one number": torch.randn(4),
    }[case]  # fmt: skip
    if kind is Gaussian:
        likelihood.target = labels.view(4, -1)
    model(input_ids=tokens, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForTokenClassification])
@LOUD
def test_a_label_for_each_token_counts_unless_it_is_ignored(kind):
    model = kind(BertConfig(num_labels=3, **SMALL)).eval()
    likelihood = likelihood_of_labels(model)
    optimizer = TENGraD(model, likelihood=likelihood)
    labels = torch.randint(3, (4, 6))
    labels[0, :5] = -100
    model(input_ids=torch.randint(VOCABULARY, (4, 6)), labels=labels).loss.backward()
    assert torch.equal(likelihood.target, labels)
    optimizer.step()
    model(input_ids=torch.randint(VOCABULARY, (4, 6)))
    assert likelihood.target is None  # without labels no batch is left behind


@LOUD
def test_a_copy_of_the_model_tells_the_copy_of_its_likelihood():
    model = gpt2()
    optimizer = TENGraD(model, likelihood=likelihood_of_labels(model))
    twin, other = copy.deepcopy((model, optimizer))
    batch = {key: value[None] for key, value in texts(1)[0].items()}
    twin(**batch)
    assert optimizer._options.likelihood.target is None
    assert other._options.likelihood.target.shape == batch["labels"].shape


@LOUD
def test_a_loss_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match=r"BertForQuestionAnswering \(ForQuestionAnswering\) is not known: pass"):
        likelihood_of_labels(BertForQuestionAnswering(BertConfig(**SMALL)))
    with pytest.raises(ValueError, match=r"Linear \(None\) is not known"):
        likelihood_of_labels(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        likelihood_of_labels(bert(), micro_batches=0)

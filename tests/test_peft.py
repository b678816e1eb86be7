"""PEFT: adapters beside frozen weights take the steps of the dense solve, by the rules of their layers."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from trainer_checks import Watched
from trainer_models import MODELS

from tengrad_triton.integrations.transformers import likelihood_of_labels

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is theirs
TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj"]}
ADAPTERS = {
    "LoRA": {},
    "LoRA, rank-stabilized": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a bias too": {"bias": "lora_only"},
}


ROWS = [("sampled", 4), ("sampled", 16), ("empirical", 4), ("empirical", 16), ("exact", 4)]  # DoRA's identity has 16


@pytest.mark.parametrize(("fisher", "samples"), ROWS)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_train_and_by_the_dense_solve(name, adapter, fisher, samples):
    torch.manual_seed(0)
    make, data = MODELS[name]
    config = peft.LoraConfig(
        r=3, target_modules=TARGETS[name], init_lora_weights=False, fan_in_fan_out=name == "gpt2", **ADAPTERS[adapter]
    )
    model = peft.get_peft_model(make(), config).double()
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    watched = Watched(model, fisher, likelihood_of_labels(model))
    for batch in torch.utils.data.DataLoader(data(2 * samples), batch_size=samples):
        watched.optimizer.zero_grad()
        model(**batch).loss.backward()
        watched.optimizer.step()
    assert watched.checked == [1, 1]
    assert frozen
    assert all(torch.equal(p, model.get_parameter(key)) for key, p in frozen.items())
    if name != "llama":  # some of whose products are in float32, so that float64 rows come from the graph
        assert watched.optimizer._reports.apart == {}

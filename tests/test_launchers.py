"""Which launch configurations the launchers choose; nothing is launched."""

import pytest
import torch

from tengrad_triton import kernels


@pytest.fixture
def launched(monkeypatch):
    """The configurations that launchers start, in order."""
    configs = []
    monkeypatch.setattr(kernels.spec.Config, "start", lambda config, *_: configs.append(config))
    return configs


def _kernel_of(name):
    return next(spec.triton_impl for spec in kernels.SPECS if spec.name == name)


@pytest.mark.parametrize(("n", "rows"), [(8, 16), (16, 16), (17, 32), (33, 64), (128, 64)])
def test_gram_takes_a_tile_that_few_samples_fill(n, rows, launched):
    _kernel_of("gram_rows")([torch.ones(n, 1024)], [0], 1)
    assert [config.block("N") for config in launched if "PRECISION" in config.constants] == [rows]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factored_convolutions_are_copied_16_bytes_at_a_time(memory_format, launched):
    x, weight = torch.ones(3, 8, 6, 6), torch.ones(12, 8, 3, 3).to(memory_format=memory_format)
    x, g = x.to(memory_format=memory_format), torch.ones(3, 12, 4, 4)
    sizes = [1, 1, 0, 0, 1, 1, 1]
    _kernel_of("project_conv")([x], [g], [weight], sizes, [0], [1, 3])
    numbers = [torch.ones(3)], [torch.ones(())], [torch.ones(4)]
    _kernel_of("expand_conv_update_")([weight], [weight], [weight], [x], [g], sizes, *numbers, False)
    factored = [config for config in launched if "UNIT" in config.constants]
    assert [config.constants["UNIT"] for config in factored] == [4, 4]
    assert all(config.async_copies for config in factored)

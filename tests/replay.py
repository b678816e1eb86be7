"""A backend for `torch.compile` that does to tensors on a CPU what replaying a CUDA graph does to them on a GPU."""

from functools import partial

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext

UNCAPTURABLE = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class Replays:
    """The backend: under ``mode="reduce-overhead"`` every graph becomes a `Replay`, all of which are in ``graphs``."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs, *, mode=None):
        def compile_graph(graph, inputs):
            if mode is None:
                return make_boxed_func(graph.forward)
            self.graphs.append(Replay(graph, TracingContext.get().fw_metadata.static_input_indices))
            return make_boxed_func(self.graphs[-1])

        compiled = partial(aot_autograd, keep_inference_input_mutations=True)
        return compiled(fw_compiler=compile_graph, inference_compiler=compile_graph)(module, inputs)


class Replay:
    """One captured graph: what it reads in place must stay there, and what it handed out is gone at the next call."""

    def __init__(self, graph, static):
        self._graph, self._static = graph, set(static)
        self._addresses, self._handed_out = {}, []
        self.calls, self.copied = 0, {}  # the inputs that every call copies to where the graph reads them
        inputs = graph.graph.find_nodes(op="placeholder")
        changed = {node.args[0] for node in graph.graph.nodes if node.target is torch.ops.aten.copy_.default}
        moved = [node.name for at, node in enumerate(inputs) if node in changed and at not in self._static]
        assert not moved, f"written in place, and not promised to stay there: {moved}"
        for node in graph.graph.nodes:
            assert node.target not in UNCAPTURABLE, f"waits for the device: {node.stack_trace}"
            held = getattr(graph, node.target, None) if node.op == "get_attr" else None
            assert not torch.is_tensor(held), f"uploads a constant: {node.stack_trace}"

    def __call__(self, *inputs):
        addresses = {at: inputs[at].data_ptr() for at in self._static}
        assert addresses == (self._addresses or addresses), "a tensor that was promised to stay has moved"
        self._addresses = addresses
        for at, x in enumerate(inputs):
            if at not in self._static:
                self.copied.setdefault(at, x.clone()).copy_(x)
        for x in self._handed_out:
            x.fill_(torch.nan)
        self.calls += 1
        self._handed_out = [x.clone() for x in self._graph(*(self.copied.get(at, x) for at, x in enumerate(inputs)))]
        for x in self.copied.values():
            x.fill_(torch.nan if x.is_floating_point() else 0)
        return self._handed_out

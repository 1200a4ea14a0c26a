"""A base model with LoRA as ExecuTorch programs, for any device; no other module knows ExecuTorch.

A program is stateless: (ids (1, T), labels (1, T), one tensor per LoRA factor) → the summed loss,
and with `grad` one gradient per factor. The client owns the factors, the optimiser and the scaling,
so that one program serves every strategy. Base weights are constants: fp32 beside the program,
shared by both of its methods, or packed into it in 4 bits for forward passes alone.
"""

import contextlib
import importlib.metadata
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.func import functional_call

from corolla.data.encoding import IGNORE
from corolla.errors import ModelError
from corolla.models.lora import LoraModel

Say = Callable[[str], None]
Run = Callable[[str, Sequence[Tensor]], list[Tensor]]
"""(method, inputs) → outputs."""
GROUP = 32
"""Values of a weight that share a scale in 4 bits."""


class Lowered(NamedTuple):
    """Files of a program, and method → tokens → bytes of memory beside weights and adapter."""

    files: tuple[str, ...]
    arenas: dict[str, dict[int, int]]


class Graph(nn.Module):
    """The stateless computation: factors are inputs, in the order of their names, scaling is 1."""

    def __init__(self, adapter: LoraModel) -> None:
        super().__init__()
        self.model = adapter.model
        names = {id(tensor): name for name, tensor in self.model.named_parameters()}
        self.factors = {names[id(tensor)]: tensor for _, tensor in adapter.parameters()}

    def forward(self, ids: Tensor, labels: Tensor, *factors: Tensor) -> Tensor:
        """The sum of −log p over the targets; labels[0] is none. Scalar."""
        own = dict(zip(self.factors, factors, strict=True))
        logits = functional_call(self.model, own, (), {"input_ids": ids, "use_cache": False}).logits
        # Labels move instead of logits: no copy of (T, vocabulary), and no size T - 1, which
        # would be 1 at the shortest length and a case of its own to the exporter.
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
        )


def version() -> str:
    """Of ExecuTorch, as installed."""
    return importlib.metadata.version("executorch")


def lower_fp32(
    graph: Graph, length: int, inputs: Sequence[Tensor], folder: Path, say: Say
) -> Lowered:
    """Write fp32.pte (methods loss and grad) and base.ptd (the weights of both)."""
    with readable("fp32"), silence():
        from executorch.exir import to_edge
        from torch.export.experimental import _export_forward_backward

        say("fp32: capturing the forward pass")
        programs = {"loss": _capture(graph, inputs, length)}
        say("fp32: capturing the backward pass")
        factors = [tensor.clone().requires_grad_(True) for tensor in inputs[2:]]
        trained = (*inputs[:2], *factors)
        joint = export(graph, trained, dynamic_shapes=_shapes(trained, length), strict=False)
        programs["grad"] = _core_aten(_export_forward_backward(joint))
        say("fp32: translating both")
        edge = to_edge(programs)
        say("fp32: compiling both for XNNPACK; this takes minutes")
        edge = edge.to_backend(dict.fromkeys(programs, _partitioner()))
        say("fp32: planning memory")
        lowered = edge.to_executorch(_backend_config(external_constants=lambda node: "base"))
        lowered.save(str(folder / "fp32.pte"))
        lowered.write_tensor_data_to_file(str(folder))
    return Lowered(
        ("fp32.pte", "base.ptd"), arenas(lowered.executorch_program.execution_plan, length)
    )


def lower_q4(
    graph: Graph, length: int, inputs: Sequence[Tensor], folder: Path, say: Say
) -> Lowered:
    """Write q4.pte (method loss) of a graph that `quantize` has been called with."""
    with readable("q4"), silence():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        say("q4: capturing the forward pass")
        captured = _capture(graph, inputs, length)
        say("q4: compiling for XNNPACK; this takes minutes")
        edge = to_edge_transform_and_lower(
            {"loss": captured},
            partitioner=[_partitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),  # of torchao's operators
        )
        say("q4: planning memory")
        lowered = edge.to_executorch(_backend_config(do_quant_fusion_and_const_prop=True))
        lowered.save(str(folder / "q4.pte"))
    return Lowered(("q4.pte",), arenas(lowered.executorch_program.execution_plan, length))


def quantize(graph: Graph) -> None:
    """Round the base to 4 bits in place, in groups of 32: linear layers and input embeddings.

    Activations are rounded to 8 bits on their way (8da4w). Raises ModelError for a layer whose
    width is no multiple of 32.
    """
    embeddings = graph.model.get_input_embeddings()
    embeddings.padding_idx = None  # a hint for training it, and one that the compiler trips over
    modules = {name: m for name, m in graph.model.named_modules() if ".lora_" not in name}
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    for name, module in {**linear, "embeddings": embeddings}.items():
        if (width := module.weight.shape[1]) % GROUP:
            raise ModelError(
                f"4 bits need widths that are multiples of {GROUP}, {name} has {width}: "
                f"use --base fp32"
            )
    with silence():
        from torchao.quantization import (
            Int8DynamicActivationIntxWeightConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        group, bits = PerGroup(GROUP), torch.int4  # type: ignore[attr-defined]
        layers = Int8DynamicActivationIntxWeightConfig(bits, weight_granularity=group)
        quantize_(graph.model, layers, lambda module, name: name in linear)
        rows = IntxWeightOnlyConfig(bits, granularity=group)
        quantize_(graph.model, rows, lambda module, name: module is embeddings)


def load(program: Path, data: Path | None = None) -> Run:
    """Runs a method of a program in ExecuTorch's own Python runtime."""
    with silence():
        import executorch.kernels.quantized  # noqa: F401  (its import registers them)
        from executorch.runtime import Runtime

        loaded = Runtime.get().load_program(program, data_path=data)
        methods = {name: loaded.load_method(name) for name in loaded.method_names}

    def run(name: str, inputs: Sequence[Tensor]) -> list[Tensor]:
        # Copies: results lie in memory of the method, which its next call uses again.
        return [out.clone() for out in methods[name].execute(inputs)]

    return run


def _capture(graph: Graph, inputs: Sequence[Tensor], length: int) -> ExportedProgram:
    shapes = _shapes(inputs, length)
    with torch.no_grad():
        return export(graph, tuple(inputs), dynamic_shapes=shapes, strict=False)


def _shapes(inputs: Sequence[Tensor], length: int) -> tuple[Any, ...]:
    tokens = {1: Dim("T", min=2, max=length)}
    return (tokens, tokens, tuple({} for _ in inputs[2:]))


def _core_aten(joint: ExportedProgram) -> ExportedProgram:
    """The same graph in operators that ExecuTorch takes, which empty_permuted is not.

    SiLU's backward pass is full_like(empty_permuted(shape), 1): written as full(shape, 1).
    """
    graph = joint.graph
    for empty in graph.find_nodes(op="call_function", target=torch.ops.aten.empty_permuted.default):
        kept = {k: v for k, v in empty.kwargs.items() if k in ("dtype", "layout", "device")}
        for filled in list(empty.users):
            with graph.inserting_before(filled):
                full = graph.call_function(
                    torch.ops.aten.full.default, (empty.args[0], filled.args[1]), kept
                )
            full.meta = dict(filled.meta)
            filled.replace_all_uses_with(full)
            graph.erase_node(filled)
        graph.erase_node(empty)
    joint.graph_module.recompile()
    return joint


def _partitioner() -> Any:
    """XNNPACK for all that it takes, products with factors (no constants) included, but softmax.

    That fails where a backward pass needs its output.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    configs = [c for c in ALL_PARTITIONER_CONFIGS if "Softmax" not in c.__name__]
    return XnnpackPartitioner(configs=configs, force_non_static_weights_for_f32_linear=True)


def _backend_config(**more: Any) -> Any:
    """Inputs are given by pointer: the client keeps the factors in one vector of its own."""
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    planning = MemoryPlanningPass(alloc_graph_input=False)
    return ExecutorchBackendConfig(memory_planning_pass=planning, **more)


def arenas(plans: Iterable[Any], length: int) -> dict[str, dict[int, int]]:
    """Method → tokens → bytes of planned memory that is touched at that length.

    It is planned for the longest sequence. A shorter one leaves the ends of most tensors alone, but
    not of those whose size is another one's: a backward pass has turned copies of its weights.
    """
    return {
        plan.name: {tokens: _touched(plan, tokens / length) for tokens in lengths(length)}
        for plan in plans
    }


def lengths(longest: int) -> list[int]:
    """The powers of two from 16 up to it, and the longest itself."""
    powers = [1 << k for k in range(4, longest.bit_length())]
    return sorted({*(p for p in powers if p < longest), longest})


def _touched(plan: Any, share: float) -> int:
    """Bytes of the union of all planned tensors, those of dynamic size at `share` of the most."""
    from executorch.exir.schema import Tensor as Planned
    from executorch.exir.schema import TensorShapeDynamism
    from executorch.exir.tensor import get_scalar_type

    spans = []
    for value in plan.values:
        tensor = value.val
        if isinstance(tensor, Planned) and tensor.allocation_info is not None:
            where = tensor.allocation_info
            size = math.prod(tensor.sizes) * get_scalar_type(tensor.scalar_type).itemsize
            if tensor.shape_dynamism != TensorShapeDynamism.STATIC:
                size = math.ceil(size * share)
            spans.append((where.memory_id, where.memory_offset, where.memory_offset + size))
    total, arena, reached = 0, 0, 0
    for own, start, end in sorted(spans):
        if own != arena:
            arena, reached = own, 0
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


@contextlib.contextmanager
def readable(base: str) -> Iterator[None]:
    """The compiler's and the runtime's many kinds of errors as one line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise ModelError(
            f"ExecuTorch {version()} cannot run this model ({base}): "
            f"{type(error).__name__}: {lines[0][:200]}"
        ) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No advice of the libraries, which is for their authors: in Python, and in C++ on stderr."""
    before = logging.root.manager.disable
    kept = os.dup(2)
    with (
        tempfile.TemporaryFile("w+") as sink,
        warnings.catch_warnings(),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            logging.disable(before)

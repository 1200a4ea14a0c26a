"""Example-level differential privacy on the device: the gradients of DP-SGD.

Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, arXiv 1607.00133, algorithm 1:
the gradient of each example of a Poisson sample is clipped to a norm C, the sum gets Gaussian noise
of standard deviation z C and is divided by the expected size of the sample. What comes after that
(corrections of a strategy, the optimiser, what is sent) only processes what is private already.

An example is one record of a client, also where it became several sequences: these are clipped
together. Its loss is the mean over its own targets. With the usual mean over a batch, an example's
gradient would depend on the lengths of all others, and the sum could move by far more than C.

Where rows name users, all records of a user are one example: its gradient is the sum of those of
its records, and is clipped once.

A server chooses C and the weights that gradients are taken at, so no value of them may make the sum
tell more than the noise covers: sums are in fp64 and in units of C (Casacuberta et al., "Widespread
Underestimation of Sensitivity in Differentially Private Libraries", CCS 2022, arXiv 2207.10635, for
what rounding and overflow do otherwise), and an example with which something goes wrong adds zero.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from corolla.client.training.padding import blank, filled, padded
from corolla.data.encoding import IGNORE, Encoded, collate
from corolla.errors import DataError, ModelError
from corolla.evaluation.scoring import loss_sum, sequence_losses
from corolla.host import logs
from corolla.models.trainable import Differentiable
from corolla.privacy.example_level import ExampleLevel
from corolla.privacy.randomness import clip_factors
from corolla.types import Params

_RULES = (nn.Linear, nn.LayerNorm)
"""Layers whose gradients opacus tells apart by a formula of their own."""

_SLICE = 1 << 20
"""Values of a gradient whose norm is taken at a time: fp64 is twice as wide."""

_SYNTHETIC = 9
"""Tokens that synthetic examples are padded to: more than the longest has."""

_log = logs.logger("worker")

_tested: WeakKeyDictionary[nn.Module, set[tuple[frozenset[str], bool]]] = WeakKeyDictionary()
"""Model → (trained tensors, whether in batches) whose clipped gradients have been found right."""


class SelfTestError(ModelError):
    """A model that failed the comparison: found without any private data, so anybody may know."""


Example = Sequence[Encoded]
"""All sequences that one example became, those of a record one after another."""


def examples(data: Sequence[Encoded], counted: int) -> list[Example]:
    """The sequences of each of a client's `counted` examples; none where no target is left.

    Of a user those without a target stay: its rows are all computed, whatever is left of them.
    Raises DataError when there are more than were accounted for.
    """
    found: dict[int, list[Encoded]] = {}
    for i, sequence in enumerate(data):
        record = i if sequence.example is None else sequence.example
        own = found.setdefault(record if sequence.unit is None else sequence.unit, [])
        if sequence.targets or sequence.unit is not None:
            own.append(sequence)
    if len(found) > counted:
        raise DataError(f"privacy was accounted for {counted} examples, found {len(found)}")
    return [*found.values(), *([] for _ in range(counted - len(found)))]


def records(example: Example) -> list[Example]:
    """The sequences of each record of an example: of one, or of all of a user."""
    return [list(own) for _, own in groupby(example, lambda sequence: sequence.example)]


def shares(example: Example) -> list[float]:
    """1 / the targets of the record of each sequence: so weighted, losses are means of records."""
    return [
        1 / max(1, sum(sequence.targets for sequence in own))
        for own in records(example)
        for _ in own
    ]


def batches(private: ExampleLevel, known: Sequence[Example]) -> Iterator[list[Example]]:
    """The Poisson sample of each step of a round; where it is empty the step is still made."""
    for _ in range(private.steps):
        yield [known[i] for i in private.draw()]


class Clipper:
    """Clipped gradients of the trained tensors of one resident model.

    Where all of these are of linear layers or LayerNorms (LoRA, heads of classifiers, biases), and
    the model computes in fp32, `size` sequences go through it at a time and hooks of opacus tell
    their gradients apart, in `size` times the memory of one gradient. Anything else is trained by
    plain backpropagation of one sequence at a time: slower, in the memory of one gradient, and
    right for any model. In half precision, and with quantised weights, a sequence rounds otherwise
    beside others of other lengths, so much that one example could move the sum by more than C.

    With a `length`, the work of a step depends on the number of examples alone, or on that of the
    rows of each user.
    """

    def __init__(
        self,
        model: Differentiable,
        trained: Mapping[str, nn.Parameter],
        size: int,
        seen: Callable[[Params], Params] = lambda gradients: gradients,
        length: int | None = None,
    ) -> None:
        """`seen` maps gradients by name, (n, ...), to those of what is trained in their place.

        `length`: tokens that each sequence is padded to; None: as many as the longest beside it.
        """
        self._model = model
        self._length = length
        self.trained = trained
        self._seen = seen
        alone = not (_in_fp32(model.model) and _have_rules(model.model, trained.values()))
        self.size = 1 if alone else size

    @contextmanager
    def attached(self) -> Iterator["Clipper"]:
        """With hooks on the model where they are of use; nothing of them is left behind."""
        with _hooks(self._model.model) if self.size > 1 else nullcontext():
            yield self

    def __call__(self, batch: Sequence[Example], clip: float) -> dict[str, Tensor]:
        """Σ over examples of g / max(clip, |g|), |g| the joint L2 norm over all tensors, in fp64.

        It is in units of the clip. An example with anything that is not finite adds nothing, and a
        sequence that fails (memory that runs out, a length that was not planned for) has a gradient
        of zeros, also where it does not reach a tensor (an expert it was not routed to). An example
        without sequences costs what another costs.
        """
        nothing = {name: p.new_zeros(1, *p.shape) for name, p in self.trained.items()}
        total = {
            name: torch.zeros(t.shape[1:], dtype=torch.float64, device=_with_fp64(t.device))
            for name, t in self._seen(nothing).items()
        }
        nothing_left = blank(self._model)
        batch = [filled(example, nothing_left) for example in batch]
        for at in range(0, len(batch), self.size):
            part = batch[at : at + self.size]
            weights = [shares(example) for example in part]
            first = [example[0] for example in part], [own[0] for own in weights]
            gradients = self._answered(*first)
            # What follows of an example goes by itself: it is not to shift what others are beside.
            for k, (example, own) in enumerate(zip(part, weights, strict=True)):
                for i in range(1, len(example), self.size):
                    j = i + self.size
                    for name, tensor in self._answered(example[i:j], own[i:j]).items():
                        gradients[name][k] += tensor.sum(0)
            _add_clipped(total, gradients, clip)
        return total

    def _answered(self, part: Sequence[Encoded], weights: Sequence[float]) -> dict[str, Tensor]:
        """`gradients`, each sequence by itself where they fail together; zeros of one that fails.

        A failure may be due to a sequence, and an error would tell so: others are not to miss it.
        """
        try:
            return self.gradients(part, weights)
        except Exception as error:  # noqa: BLE001 - an error would tell of a row
            _cleared(self._model.model)
            if len(part) == 1:
                _log.error("a sequence adds nothing", why=type(error).__name__)
                nothing = {name: p.new_zeros(1, *p.shape) for name, p in self.trained.items()}
                return dict(self._seen(nothing))
        pairs = zip(part, weights, strict=True)
        alone = [self._answered([sequence], [weight]) for sequence, weight in pairs]
        return {name: torch.cat([own[name] for own in alone]) for name in alone[0]}

    def gradients(self, part: Sequence[Encoded], weights: Sequence[float]) -> dict[str, Tensor]:
        """Gradients of weight · summed loss, by sequence: name → (sequences, ...).

        Raises ModelError when gradients of a tensor cannot be told apart.
        """
        losses = sequence_losses(self._model.model, padded(self._model, part, self._length))
        (losses @ losses.new_tensor(weights)).backward()  # type: ignore[no-untyped-call]
        found: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            held: Any = parameter
            reached, held.grad = held.grad, None
            if reached is None:
                gradient = held.new_zeros(len(part), *held.shape)
            elif self.size > 1:
                gradient, held.grad_sample = held.grad_sample, None
            else:
                gradient = reached[None]
            if not isinstance(gradient, Tensor) or gradient.shape != (len(part), *held.shape):
                raise ModelError(_apart(name))
            found[name] = gradient
        return dict(self._seen(found))


def self_test(
    model: Differentiable,
    ready: Callable[[], Mapping[str, nn.Parameter]],
    names: Collection[str],
    size: int,
    fixed: bool = False,
) -> None:
    """`compare` synthetic examples, once for a model and a set of trained tensors in a process.

    `ready` makes the model train the tensors of these names, `size` sequences at a time, of one
    length where it is `fixed`. No private example is looked at, and no chance is in it: whether a
    model fails tells nothing of the data.
    """
    this, done = (frozenset(names), size > 1), _tested.setdefault(model.model, set())
    if this not in done:
        length = _SYNTHETIC if fixed else None
        compare(model, Clipper(model, ready(), size, length=length), synthetic(model))
        done.add(this)


def synthetic(model: Differentiable) -> list[Example]:
    """Four examples of random tokens, always the same: of ragged lengths, one of two sequences.

    One that is not of classes has a prompt that does not count.
    """
    draw = torch.Generator().manual_seed(0)
    config = model.base.model.config
    vocabulary, found = config.get_text_config().vocab_size, []
    for i, (example, length) in enumerate(((0, 8), (1, 5), (1, 3), (2, 7), (3, 4))):
        ids = torch.randint(vocabulary, (length,), generator=draw).tolist()
        labels = [IGNORE, IGNORE, *ids[2:]] if example == 2 else ids
        classes = model.base.task == "classify"
        found.append(Encoded(ids, i % config.num_labels if classes else labels, example))
    return examples(found, 4)


def compare(model: Differentiable, clipper: Clipper, batch: Sequence[Example]) -> None:
    """A clipped sum by hooks with one made by hand, example by example.

    Raises SelfTestError when they differ by more than rounding: a layer mixes the examples of a
    batch, or its tensors have more to do than hooks see. The clip is half the largest norm: what
    cancels in the gradient of an example that the model already fits is no difference. Costs a pass
    forward and back for each sequence, and those of a step; nothing where one sequence goes through
    the model at a time.
    """
    if clipper.size == 1:
        return
    with _NoDropout():
        gradients = [_by_hand(model, clipper.trained, example) for example in batch]
        norms = [_norm(own.values()) for own in gradients]
        clip = max((norm for norm in norms if 0 < norm < math.inf), default=2.0) / 2
        wanted = {name: torch.zeros_like(p) for name, p in clipper.trained.items()}
        for own, norm in zip(gradients, norms, strict=True):
            if 0 < norm < math.inf:
                for name, tensor in own.items():
                    wanted[name] += tensor * min(1.0, clip / norm)
        try:
            with clipper.attached():
                sequences = [sequence for example in batch for sequence in example]
                clipper.gradients(sequences, [1.0] * len(sequences))  # an error here is an error
                found = {name: clip * total.cpu() for name, total in clipper(batch, clip).items()}
        except ModelError as error:
            raise SelfTestError(str(error)) from error
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            raise SelfTestError(_apart(type(error).__name__)) from error
    scale = _norm(wanted.values())
    for name, tensor in wanted.items():
        if not _norm([found[name] - tensor.cpu()]) <= 1e-4 * max(_norm([tensor]), scale / 10):
            raise SelfTestError(
                "dp=example: in a batch, the gradients of examples are not what they are alone; "
                "the model mixes them, or hooks do not see all of it: use micro_batch_size=1"
            )


def lively(start: Params) -> Params:
    """Small random values in the form of `start`, always the same.

    Behind a factor of zeros all gradients are zero, and nothing can be compared; behind one that a
    server made huge, rounding alone would fail the comparison.
    """
    draw = torch.Generator().manual_seed(0)
    return {name: 0.02 * torch.randn(t.shape, generator=draw) for name, t in start.items()}


@contextmanager
def _hooks(model: nn.Module) -> Iterator[None]:
    """Tensors that need a gradient get `grad_sample` (n, ...) in each backward pass of n rows."""
    from opacus.grad_sample import GradSampleHooks  # takes a second to import

    hooks = GradSampleHooks(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():  # of a first layer, whose input needs no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()
        _cleared(model)


def _cleared(model: nn.Module) -> None:
    """Takes off a model what a pass that was broken off has left on it."""
    for module in model.modules():
        for left in ("activations", "max_batch_len"):
            module.__dict__.pop(left, None)
    for parameter in model.parameters():
        parameter.grad = None
        if getattr(parameter, "grad_sample", None) is not None:
            parameter.grad_sample = None  # type: ignore[attr-defined]


def _in_fp32(model: nn.Module) -> bool:
    """Returns whether all weights are fp32; weights of a quantised layer are whole numbers."""
    return all(parameter.dtype == torch.float32 for parameter in model.parameters())


def _have_rules(model: Any, trained: Collection[nn.Parameter]) -> bool:
    """Returns whether hooks see, in each layer, one row a sequence.

    The output layer of a model that generates does not: it is given only rows with a target.
    """
    wanted = {id(parameter) for parameter in trained}
    output = model.get_output_embeddings()
    return not any(
        type(module) not in _RULES or module is output
        for module in model.modules()
        if any(id(parameter) in wanted for parameter in module.parameters(recurse=False))
    )


def _add_clipped(total: Params, gradients: Params, clip: float) -> None:
    """Add Σ_i g_i / max(clip, |g_i|) to `total`, in fp64, with nothing of a g_i not finite."""
    of_each = torch.stack([_norms(tensor) for tensor in gradients.values()])
    norms = torch.linalg.vector_norm(of_each, dim=0)
    factors = clip_factors(norms / clip, 1.0) / clip  # of fp32 and a clip in range: never infinite
    for name, tensor in gradients.items():
        sums = total[name].view(-1)
        rows, own = _flat(tensor).to(sums.device), factors.to(sums.device)
        for part, summed in zip(
            *(torch.split(t, _SLICE, dim=-1) for t in (rows, sums)), strict=True
        ):
            summed += own @ part.double().nan_to_num_(0, 0, 0)  # 0 · inf is no 0


def _by_hand(
    model: Differentiable, trained: Mapping[str, nn.Parameter], example: Example
) -> dict[str, Tensor]:
    """The gradient of an example's loss by plain backpropagation, in fp32."""
    targets = sum(sequence.targets for sequence in example)
    for sequence in example:
        batch = collate([sequence], model.base.pad_id, model.device)
        (loss_sum(model.model, batch) / targets).backward()  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {}
    for name, parameter in trained.items():
        found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
    return found


def _norms(rows: Tensor) -> Tensor:
    """The L2 norm of each of (n, ...), in fp64 on the CPU: (n,).

    A sum of squares in fp32 loses percents where there are many values.
    """
    flat = _flat(rows)
    parts = [
        torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
        for part in torch.split(flat.to(_with_fp64(flat.device)), _SLICE, dim=1)
    ]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms.cpu()


def _flat(rows: Tensor) -> Tensor:
    """(n, ...) as (n, values)."""
    return rows.detach().unsqueeze(-1).flatten(1)


def _with_fp64(device: torch.device) -> torch.device:
    """The device itself, or the CPU where it has no fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def _norm(tensors: Collection[Tensor]) -> float:
    """The joint L2 norm of all tensors."""
    return float(torch.linalg.vector_norm(torch.cat([_norms(own[None]) for own in tensors])))


def _apart(what: str) -> str:
    return (
        f"dp=example needs the gradient of each example, and the model does not tell them apart "
        f"({what}): use micro_batch_size=1"
    )


class _NoDropout(TorchFunctionMode):
    """Training without dropout, which would be another in each pass."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.dropout:
            return args[0] if args else (kwargs or {})["input"]
        if func is functional.scaled_dot_product_attention and kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))

"""First-order local training: backpropagation to the trained tensors, all others frozen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from corolla.client.training import hardest
from corolla.client.training.gradients import Gradients, PlainGradients, PrivateGradients
from corolla.client.training.optimiser import Optimiser
from corolla.client.training.trained import Trained
from corolla.config import schedule
from corolla.config.run import RunConfig
from corolla.data.encoding import Encoded
from corolla.errors import DataError, DivergedError
from corolla.models import layers
from corolla.models.trainable import Differentiable
from corolla.privacy.example_level import ExampleLevel
from corolla.types import Correct, Fit, LoraSpec, Metrics, Params


@dataclass
class FirstOrder:
    """AdamW or SGD over the trainable tensors of one client in one round.

    The optimiser is fresh in each round, as in the papers; the learning rate runs through its
    warm-up and decay over all rounds. Peak memory: base model, activations of one micro-batch,
    and 16 bytes per trained value (value, gradient, two moments).
    """

    model: Differentiable
    lora: LoraSpec
    data: Sequence[Encoded]
    config: RunConfig
    seed: int
    round: int
    on_step: Callable[[int], None] | None = None
    private: ExampleLevel | None = None
    """The sampling and noise of steps under example-level differential privacy (see dpsgd.py)."""

    def init(self, seed: int) -> Params:
        return self.model.init(self.lora, seed)

    def fit(
        self,
        start: Params,
        *,
        frozen: Sequence[Params] = (),
        train: Callable[[str], bool] = lambda name: True,
        correct: Correct | None = None,
        strength: float = 1.0,
    ) -> Fit:
        if not (self.data or self.private):
            raise DataError("client has no example with a target left")
        spec = replace(self.lora, alpha=self.lora.alpha * strength)
        blocks = layers.trained(start, self.config.layers)
        trained = Trained(
            self.model, start, spec, frozen, lambda name: name in blocks and train(name)
        )
        gradients = self._gradients(trained)
        steps, distance = 0, 0.0
        with gradients.attach(trained) as taken:
            stepped = trained.stepped
            optimiser = Optimiser(list(stepped.values()), self.config)
            for tokens in taken:
                self._correct(stepped, correct)
                lr = self.config.lr * schedule.rate(self.config, self.round, gradients.steps, steps)
                optimiser.step(lr, gradients.clip_norm)
                trained.push()
                distance += lr
                steps += 1
                if self.on_step:
                    self.on_step(tokens)
        params = trained.finish()
        if not all(bool(torch.isfinite(t).all()) for t in params.values()):
            if not self.private:
                raise DivergedError("weights are not finite after local training: lower lr")
            params = dict(start)  # there is an answer whatever the noise has made of the weights
        return gradients.outcome(params, steps, distance)

    def _gradients(self, trained: Trained) -> Gradients:
        if self.private:
            return PrivateGradients(self.model, self.data, self.config, self.private)
        if self.config.keep_hardest is None:
            return PlainGradients(self.model, self.data, self.config, self.seed)
        trained.write(trained.written())
        kept = hardest.kept(self.model, self.data, self.config, self.seed)
        config = self.config.model_copy(update={"keep_hardest": None})  # the rest is left out
        told: Metrics = {}
        if scored := schedule.scored(self.config, len(self.data)):
            told = {"scored_sequences": float(scored), "kept_sequences": float(len(kept))}
        return PlainGradients(self.model, kept, config, self.seed, told)

    def _correct(self, trained: dict[str, nn.Parameter], correct: Correct | None) -> None:
        if correct is None:
            return
        gradients = {n: p.grad for n, p in trained.items() if p.grad is not None}
        weights = {n: p.detach() for n, p in trained.items() if n in gradients}
        for name, gradient in correct(gradients, weights).items():
            trained[name].grad = gradient

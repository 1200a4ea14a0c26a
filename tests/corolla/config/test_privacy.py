from pathlib import Path

import pytest

from corolla.config import load as config
from tests.corolla.config.configs import load, refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (["epsilon=8"], "epsilon=8.0 is for dp=example or dp=client, found dp=none: add it"),
        (["clip=2"], "clip=2.0 is for dp=example or dp=client"),
        (["delta=1e-6"], "delta=1e-06 is for dp=example or dp=client"),
        (["noise-multiplier=1"], "noise-multiplier=1.0 is for dp=example or dp=client"),
        (["participations=3"], "participations=3 is for dp=example or dp=client"),
        (["separation=3"], "separation=3 is for dp=client, found dp=none"),
        (["dp=client"], "dp=client needs epsilon"),
        (
            ["dp=client", "noise-multiplier=1e-9"],
            "expected a number from 0.001 to 1e+06, or null, found 1e-09",
        ),
        (["dp=example"], "dp=example needs epsilon"),
        (["dp=client", "epsilon=8", "noise-multiplier=1"], "give one of them"),
        (
            ["dp=example", "epsilon=8", "dp-sampling=poisson"],
            "dp-sampling=poisson is for dp=client",
        ),
        (["dp=example", "epsilon=8", "dp-mechanism=banded"], "is for dp=client, found dp=example"),
        (["dp=example", "epsilon=8", "clip-quantile=0.5"], "clip-quantile=0.5 is for dp=client"),
        (["dp=example", "epsilon=8", "parameters=prompt"], "use parameters=lora"),
        (["dp=example", "epsilon=8", "parameters=ia3"], "use parameters=lora"),
        (
            ["dp=example", "epsilon=8", 'target-modules=["q_proj","model.embed_tokens"]'],
            "leave model.embed_tokens out of target-modules",
        ),
        (["dp=client", "epsilon=8", "robust=median"], "leave robust out"),
        (["dp=client", "epsilon=8", "buffer=2"], "leave buffer out"),
        (["dp=client", "epsilon=8", "max-norm=2"], "leave max-norm out"),
        (["dp=client", "epsilon=8", "selection=weighted"], "use selection=uniform"),
        (["dp=client", "epsilon=8", "dp-mechanism=banded"], "set separation to 2 or more"),
        (
            ["dp=client", "epsilon=8", "dp-sampling=poisson", "participations=2"],
            "use dp-sampling=fixed",
        ),
        (
            ["dp=client", "epsilon=8", "dp-mechanism=banded", "separation=2", "clip-quantile=0.5"],
            "leave clip-quantile out",
        ),
    ],
)
def test_settings_of_privacy_that_do_not_go_together_are_refused(
    tmp_path: Path, settings: list[str], why: str
) -> None:
    assert why in refused(tmp_path, settings=settings)


def test_noisy_gradients_are_not_clipped_again_unless_told(tmp_path: Path) -> None:
    assert load(tmp_path).clip_norm == 1.0
    assert load(tmp_path, settings=["dp=client", "epsilon=8"]).clip_norm == 1.0
    private = load(tmp_path, settings=["dp=example", "epsilon=8"])
    assert private.clip_norm is None
    assert config.validate(private.model_dump()) == private
    told = load(tmp_path, settings=["dp=example", "epsilon=8", "clip-norm=0.5"])
    assert told.clip_norm == 0.5

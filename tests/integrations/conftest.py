"""What the tests of FLUX share: a tiny pipeline, its dense latents, and a policy applied for one test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from diffusers import FluxPipeline
from torch import Tensor

from chipmunk_kernels.delta.policy import Policy
from chipmunk_kernels.integrations.diffusers import Handle, apply_chipmunk, remove_chipmunk
from tests.integrations.helpers import EMPTY
from tests.integrations.models import flux_latents, flux_pipeline, flux_transformer

Apply = Callable[[Policy], Handle]
SMALL = (128, 192)
"""Pixels that make 8 × 12 image tokens."""


@pytest.fixture
def pipe() -> FluxPipeline:
    return flux_pipeline(flux_transformer())


@pytest.fixture(scope="module")
def dense() -> Tensor:
    return flux_latents(flux_pipeline(flux_transformer()), size=SMALL)


@pytest.fixture
def applied(pipe: FluxPipeline) -> Iterator[Apply]:
    yield lambda plan: apply_chipmunk(pipe, plan, EMPTY)
    remove_chipmunk(pipe)

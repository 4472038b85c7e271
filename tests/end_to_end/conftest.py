"""Pipelines small enough to run whole in a test: random ones, and a complete FLUX folder on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FluxPipeline folder with every part: text encoders, tokenizers, VAE, scheduler, two blocks.

    An untrained transformer returns zeros (modulations start there), and dense would equal sparse for that
    reason alone: so its weights are drawn anew.
    """
    from suites.flux_shapes.folder import write_folder
    from suites.flux_shapes.models import MINIATURE, build

    parts = build(MINIATURE, "cpu", seed=0)
    torch.manual_seed(1)
    for module in parts.denoiser.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    write_folder(parts.pipeline(), folder)
    return folder


@pytest.fixture
def chipmunk_run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: (exit code, stdout, stderr)."""
    from suites.end_to_end.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

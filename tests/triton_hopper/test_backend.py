"""The Gluon backend as dispatch sees it: availability, what it takes, and a Triton that cannot compile it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.compiler.errors import CompilationError

from chipmunk_kernels.backends import triton as portable
from chipmunk_kernels.backends import triton_hopper as backend
from chipmunk_kernels.registry import BuildError
from tests.factories import attention_inputs, scattered_columns

if reason := backend.without_gluon():
    pytest.skip(reason, allow_module_level=True)
from chipmunk_kernels.backends.triton_hopper import sparse_attention as file

CUDA = torch.device("cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has all that the kernels ask for."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.6.0+git1")


@pytest.mark.usefixtures("hopper")
def test_says_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.unavailable(CUDA) is None
    assert "NVIDIA GPU" in (backend.unavailable(torch.device("cpu")) or "")

    def no_gluon() -> None:
        raise ImportError("cannot import name 'warpgroup_mma'")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "kernels", no_gluon)
        assert "another Gluon than these kernels know (cannot import" in (backend.unavailable(CUDA) or "")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "3.4.1")
        assert "need triton 3.6 or newer, this is 3.4.1" in (backend.unavailable(CUDA) or "")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "B200")
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert "B200 has 10.0; use backend='triton'" in (backend.unavailable(CUDA) or "")
    with monkeypatch.context() as patch:
        patch.setattr(portable, "unavailable", lambda device: "triton is not installed")
        assert backend.unavailable(CUDA) == "triton is not installed"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "no interpreter" in (backend.unavailable(CUDA) or "")


def test_what_it_takes() -> None:
    kernel = backend.kernels()["sparse_attention"]
    assert (kernel.backend, kernel.settings) == ("triton_hopper", file.SparseAttentionSettings)
    assert kernel.unsupported(torch.bfloat16, 128) is None
    assert kernel.unsupported(torch.float16, 64) is None
    assert "float32" in (kernel.unsupported(torch.float32, 64) or "")
    assert "head dimensions 64 and 128; got 96" in (kernel.unsupported(torch.float16, 96) or "")


@pytest.mark.parametrize(
    ("group_size", "consumers"), [(1, 1), (64, 1), (65, 2), (128, 2), (192, 3), (256, 2), (384, 3), (640, 2)]
)
def test_warpgroups_for_a_group(group_size: int, consumers: int) -> None:
    assert file.warpgroups(group_size) == consumers


Launch = tuple[int, tuple[Any, ...], tuple[int, ...], tuple[float, ...], dict[str, int], dict[str, int]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What is launched, instead of a launch."""
    seen: list[Launch] = []
    monkeypatch.setattr(file, "_launch", lambda *arguments: seen.append(arguments))
    return seen


def test_tidy_tensors_are_read_where_they_are(launched: list[Launch]) -> None:
    """Slices of a fused projection too; and the output lies as the queries do."""
    fused = torch.randn(2, 300, 3, 4, 64, dtype=torch.float16)
    q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    columns = scattered_columns(2, 4, 300, 300, 128)
    out, lse = file.sparse_attention(q, k, v, columns, None, 1, 0.125, file.SparseAttentionSettings())
    programs, tensors, integers, _, constants, _ = launched[0]
    assert tensors[:3] == (q, k, v) and tensors[-2:] == (out, lse)
    assert out.shape == q.shape and out.stride() == (300 * 4 * 64, 64, 4 * 64, 1) and lse.shape == (2, 4, 300)
    assert programs == 1  # the stand-in for a GPU has one multiprocessor
    kernel = file.sparse_attention_kernel
    named = dict(zip(kernel.arg_names[8:], (*integers, 0.0, 0.0, *constants.values()), strict=True))
    assert (named["q_b"], named["q_h"], named["q_n"]) == q.stride()[:3]
    assert (named["k_b"], named["v_h"], named["K_N"], named["V_N"]) == (300 * 768, 64, 768, 768)
    assert (named["out_n"], named["base_n"], named["heads"], named["rows"]) == (4 * 64, 0, 4, 300)
    assert (named["groups"], named["tiles"], named["units"]) == (3, 1, 24)
    assert list(constants) == kernel.arg_names[-len(constants) :]


def test_others_are_copied_first(launched: list[Launch]) -> None:
    """Strides of 136 values are no multiples of 16, and an address one value on is none of 16 bytes."""
    q, k, v = (torch.randn(1, 2, 300, 136, dtype=torch.float16)[..., 1:129] for _ in range(3))
    columns = scattered_columns(1, 2, 300, 300, 128)
    base = torch.randn(1, 2, 300, 128)
    file.sparse_attention(q, k, v, columns, base, -1, -0.125, file.SparseAttentionSettings())
    _, tensors, integers, floats, _, _ = launched[0]
    for given, expected in zip((*tensors[:3], tensors[5]), (-q, k, v, base.half()), strict=True):
        assert torch.equal(given, expected) and given.data_ptr() % 16 == 0
    assert not any(step % 16 for step in integers[:13])
    assert floats == pytest.approx((0.125 * 1.4426950408889634, -1.0))


@pytest.mark.parametrize(
    "error", [CompilationError("", None, "no such layout"), RuntimeError("no such layout, pass failed")]
)
def test_a_triton_that_cannot_compile_it_hands_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(file, "_launch", fail)
    q, k, v = attention_inputs(1, 1, 256, 256, 64, dtype=torch.float16)
    with pytest.raises(BuildError, match=r"triton 3\.\d+\.\d+: \s*no such layout"):
        file.sparse_attention(
            q, k, v, scattered_columns(1, 1, 256, 256), None, 1, 1.0, file.SparseAttentionSettings()
        )


def test_a_launch_that_fails_is_no_failed_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next kernel would fail alike, and its message would hide this one."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(file, "_launch", fail)
    q, k, v = attention_inputs(1, 1, 256, 256, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="illegal memory access") as raised:
        file.sparse_attention(
            q, k, v, scattered_columns(1, 1, 256, 256), None, 1, 1.0, file.SparseAttentionSettings()
        )
    assert raised.type is RuntimeError


def test_what_it_offers_is_known_without_it() -> None:
    assert set(backend.OPERATIONS) == set(backend.kernels())

"""Which kernel is chosen, with which settings, and what is said when the first choice cannot run."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

import chipmunk_kernels as ck
from chipmunk_kernels import dispatch, profiles, registry
from chipmunk_kernels.backends.torch.attention import DenseSettings, SparseSettings
from chipmunk_kernels.problem import Problem
from chipmunk_kernels.profiles import Entry, Profile
from chipmunk_kernels.registry import BuildError, Kernel, UnsuitableInputError
from chipmunk_kernels.settings import LaunchSettings, choice
from tests.factories import attention_inputs, scattered_columns

PROBLEM = Problem("sparse_attention", rows=256, columns=256, width=64, density=0.25)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class OtherSettings(LaunchSettings):
    tile: int = choice(64, 32, 64)

    def misfit(self, problem: Problem, shared_memory_bytes: int | None = None) -> str | None:
        return "tile too wide" if self.tile > problem.rows else None


class OtherBackend:
    """Stands in for the cupy backend: one kernel, available until told otherwise."""

    reason: str | None = None
    refuses: str | None = None
    broken: str | None = None
    unsuitable: str | None = None

    def unavailable(self, device: torch.device) -> str | None:
        return self.reason

    def kernels(self) -> Mapping[str, Kernel]:
        run = registry.kernel("sparse_attention", "torch").run

        def through_torch(*arguments: object) -> object:
            if self.broken:
                raise BuildError(self.broken)
            if self.unsuitable:
                raise UnsuitableInputError(self.unsuitable)
            return run(*arguments[:-1], SparseSettings())

        return {
            "sparse_attention": Kernel(
                "sparse_attention", "cupy", through_torch, OtherSettings, lambda dtype, width: self.refuses
            )
        }


@pytest.fixture(autouse=True)
def _fresh_caches() -> Iterator[None]:
    def forget() -> None:
        dispatch._select.cache_clear()
        dispatch._resolve.cache_clear()
        dispatch._told.clear()
        dispatch._broken.clear()
        registry.kernels.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> OtherBackend:
    backend = OtherBackend()
    package = registry._package
    monkeypatch.setattr(registry, "_package", lambda name: backend if name == "cupy" else package(name))
    return backend


def tuned(backend: str = "cupy", crossover: float | None = None, **settings: int) -> Profile:
    return Profile(entries=(Entry(PROBLEM, backend, settings, {}, crossover),))


def test_a_cpu_runs_the_torch_backend_with_its_defaults() -> None:
    kernel, settings = dispatch.select(PROBLEM, "cpu", profile=Profile.empty())
    assert (kernel.backend, kernel.operation) == ("torch", "sparse_attention")
    assert settings == SparseSettings()


def test_the_profile_chooses_backend_and_settings(other: OtherBackend) -> None:
    kernel, settings = dispatch.select(PROBLEM, CPU, profile=tuned(tile=32))
    assert kernel.backend == "cupy" and settings == OtherSettings(tile=32)
    nearby = replace(PROBLEM, rows=300)
    assert dispatch.select(nearby, CPU, profile=tuned(tile=32))[1] == OtherSettings(tile=32)
    unlike = replace(PROBLEM, width=128)
    assert dispatch.select(unlike, CPU, profile=tuned(tile=32))[0].backend == "torch"


def test_settings_of_a_neighbour_that_do_not_fit_give_way_to_the_defaults(other: OtherBackend) -> None:
    small = replace(PROBLEM, rows=40)
    assert dispatch.select(small, CPU, profile=tuned(tile=64))[1] == OtherSettings()


def test_settings_that_no_longer_exist_are_left_out_with_one_warning(other: OtherBackend) -> None:
    with pytest.warns(RuntimeWarning, match="unknown settings.*tune again"):
        assert dispatch.select(PROBLEM, CPU, profile=tuned(tiles=32))[1] == OtherSettings()


def test_an_explicit_backend_takes_the_profile_s_settings_for_it(other: OtherBackend) -> None:
    assert dispatch.select(PROBLEM, CPU, backend="cupy", profile=tuned(tile=32))[1] == OtherSettings(tile=32)
    assert dispatch.select(PROBLEM, CPU, backend="torch", profile=tuned(tile=32))[1] == SparseSettings()


def test_the_profile_also_has_settings_for_whoever_cannot_run_its_winner(other: OtherBackend) -> None:
    """A machine without the winner's backend gets the tuned settings of its own, not the defaults."""
    name = next(iter(SparseSettings.space()))
    value = next(v for v in SparseSettings.space()[name] if v != getattr(SparseSettings(), name))
    best = {"torch": {name: value}}
    profile = Profile(entries=(Entry(PROBLEM, "cupy", {"tile": 32}, other_backends=best),))
    expected = SparseSettings(**{name: value})
    assert dispatch.select(PROBLEM, CPU, backend="torch", profile=profile)[1] == expected
    other.reason = "CuPy is not installed"
    dispatch._select.cache_clear()
    with pytest.warns(RuntimeWarning, match="using the torch backend"):
        assert dispatch.select(PROBLEM, CPU, profile=profile)[1] == expected


def test_explicit_settings_win(other: OtherBackend) -> None:
    kernel, settings = dispatch.select(PROBLEM, CPU, settings=OtherSettings(32), profile=Profile.empty())
    assert kernel.backend == "cupy" and settings == OtherSettings(32)
    with pytest.raises(ValueError, match=r"expected SparseSettings.*got DenseSettings"):
        dispatch.select(PROBLEM, CPU, backend="torch", settings=DenseSettings())
    with pytest.raises(ValueError, match="no kernel of sparse_attention"):
        dispatch.select(PROBLEM, CPU, settings=DenseSettings())


def test_a_backend_that_cannot_serve_is_passed_over_with_one_warning(other: OtherBackend) -> None:
    other.reason = "CuPy is not installed; pip install chipmunk-kernels[cuda12]"
    with pytest.warns(RuntimeWarning, match="using the torch backend.*CuPy is not installed") as caught:
        for rows in (256, 300, 400):
            kernel, _ = dispatch.select(replace(PROBLEM, rows=rows), CPU, profile=tuned(tile=32))
            assert kernel.backend == "torch"
    assert len(caught) == 1


def test_a_kernel_that_cannot_run_these_tensors_is_passed_over(other: OtherBackend) -> None:
    other.refuses = "bfloat16 is not supported"
    with pytest.warns(RuntimeWarning, match="bfloat16 is not supported"):
        assert dispatch.select(PROBLEM, CPU, profile=tuned())[0].backend == "torch"


def test_an_explicit_backend_that_cannot_serve_is_refused_with_the_reason(other: OtherBackend) -> None:
    other.reason = "CuPy is not installed"
    with pytest.raises(RuntimeError, match=r"cupy backend cannot run this.*CuPy is not installed.*torch"):
        dispatch.select(PROBLEM, CPU, backend="cupy")
    other.reason = None
    dense = Problem("dense_attention", rows=8, columns=8, width=64)
    with pytest.raises(RuntimeError, match="it has no dense_attention kernel"):
        dispatch.select(dense, CPU, backend="cupy")


def test_an_unknown_backend_is_a_value_error() -> None:
    with pytest.raises(
        ValueError, match="expected one of torch, triton, triton_hopper, cupy, cupy_hopper; got 'cuda'"
    ):
        dispatch.select(PROBLEM, CPU, backend="cuda")


@pytest.mark.parametrize(("density", "better"), [(0.2, False), (0.5, False), (0.51, True), (1.0, True)])
def test_dense_wins_above_the_crossover(density: float, better: bool) -> None:
    problem = replace(PROBLEM, density=density)
    assert dispatch.dense_is_better(problem, CPU, tuned(crossover=0.5)) is better
    assert not dispatch.dense_is_better(problem, CPU, tuned(crossover=None))
    assert not dispatch.dense_is_better(problem, CPU, Profile.empty())


def test_an_operation_follows_the_profile_in_the_environment(
    other: OtherBackend, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: a profile on disk, found by the ladder, steers a plain call."""
    q, k, v = attention_inputs(1, 1, 256, 256)
    columns = scattered_columns(1, 1, 256, 256)
    expected = ck.sparse_attention(q, k, v, columns, backend="torch")
    path = f"{tmp_path}/profile.yaml"
    problem = "{rows: 256, columns: 256, width: 64, dtype: float32}"
    with open(path, "w") as file:
        file.write(
            "schema: 1\ndevice: {name: any, kind: cpu}\nkernels:\n"
            f"- {{operation: sparse_attention, problem: {problem}, backend: cupy, settings: {{tile: 32}}}}\n"
        )
    used: list[LaunchSettings] = []
    kernel = other.kernels()["sparse_attention"]

    def noting(*arguments: object) -> object:
        used.append(arguments[-1])  # type: ignore[arg-type]
        return kernel.run(*arguments)

    monkeypatch.setattr(other, "kernels", lambda: {"sparse_attention": replace(kernel, run=noting)})
    monkeypatch.setenv("CHIPMUNK_PROFILE", path)
    profiles.forget()
    found = ck.sparse_attention(q, k, v, columns)
    monkeypatch.delenv("CHIPMUNK_PROFILE")
    assert used == [OtherSettings(tile=32)]
    assert isinstance(found, torch.Tensor) and torch.equal(found, expected)


def test_a_kernel_that_does_not_build_gives_way_with_one_warning(
    other: OtherBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = attention_inputs(1, 1, 256, 256)
    columns = scattered_columns(1, 1, 256, 256)
    expected = ck.sparse_attention(q, k, v, columns, backend="torch")
    entry = Entry(replace(PROBLEM, dtype="float32"), "cupy", {"tile": 32}, {}, None)
    monkeypatch.setattr(dispatch, "_profile", lambda device: Profile(entries=(entry,)))
    other.broken = "sparse_attention.cu: error: expected a ';'"
    with pytest.warns(
        RuntimeWarning, match=r"using the torch backend.*does not build.*expected a ';'"
    ) as said:
        for _ in range(3):
            assert torch.equal(ck.sparse_attention(q, k, v, columns), expected)
    assert len(said) == 1
    with pytest.raises(RuntimeError, match=r"cupy backend cannot run this.*does not build"):
        ck.sparse_attention(q, k, v, columns, backend="cupy")


def test_tensors_that_a_chosen_kernel_cannot_take_go_to_the_next(
    other: OtherBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = attention_inputs(1, 1, 256, 256)
    columns = scattered_columns(1, 1, 256, 256)
    expected = ck.sparse_attention(q, k, v, columns, backend="torch")
    entry = Entry(replace(PROBLEM, dtype="float32"), "cupy", {"tile": 32}, {}, None)
    profile = Profile(entries=(entry,))
    monkeypatch.setattr(dispatch, "_profile", lambda device: profile)
    other.unsuitable = "rows of whole 16 bytes, please"
    with pytest.warns(RuntimeWarning, match="using the torch backend on cpu: rows of whole 16 bytes") as said:
        for _ in range(3):
            assert torch.equal(ck.sparse_attention(q, k, v, columns), expected)
    assert len(said) == 1
    with pytest.raises(ValueError, match="rows of whole 16 bytes"):
        ck.sparse_attention(q, k, v, columns, backend="cupy")
    assert dispatch.select(entry.problem, CPU)[0].backend == "cupy"  # other tensors may suit it


def test_an_explicit_backend_that_does_not_build_raises(other: OtherBackend) -> None:
    q, k, v = attention_inputs(1, 1, 256, 256)
    other.broken = "NVRTC is missing"
    with pytest.raises(BuildError, match="NVRTC is missing"):
        ck.sparse_attention(q, k, v, scattered_columns(1, 1, 256, 256), backend="cupy")


def test_asking_again_costs_microseconds() -> None:
    dispatch.select(PROBLEM, CPU)
    start = time.thread_time()
    for _ in range(1000):
        dispatch.select(PROBLEM, CPU)
    assert time.thread_time() - start < 0.1  # 3 µs a call, measured


@pytest.mark.gpu
def test_a_gpu_runs_the_first_backend_of_its_order_that_can() -> None:
    device = torch.device("cuda")
    order = dispatch.DEFAULT_ORDER[dispatch._kind(device)]
    able = [name for name in order if registry.unavailable(name, device) is None]
    assert dispatch.select(PROBLEM, device, profile=Profile.empty())[0].backend == able[0]


def test_hopper_without_cupy_says_so_once_and_runs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Hopper GPU is asked, and answers, without one."""
    reasons = {"cupy_hopper": "cupy is not installed", "triton": None}
    kernels = registry.kernels
    gluon = {"sparse_attention": replace(kernels("triton")["sparse_attention"], backend="triton_hopper")}
    monkeypatch.setattr(registry, "kernels", lambda name: gluon if name == "triton_hopper" else kernels(name))
    monkeypatch.setattr(dispatch, "_kind", lambda device: "hopper")
    monkeypatch.setattr(registry, "unavailable", lambda name, device: reasons.get(name, "not here"))
    with pytest.warns(
        RuntimeWarning, match="using the triton backend on cuda: cupy_hopper cannot: cupy is not"
    ):
        assert dispatch.select(PROBLEM, "cuda", profile=Profile.empty())[0].backend == "triton"
    reasons["triton_hopper"] = None
    dispatch._select.cache_clear()
    with pytest.warns(RuntimeWarning, match="using the triton_hopper backend on cuda: cupy_hopper cannot"):
        assert dispatch.select(PROBLEM, "cuda", profile=Profile.empty())[0].backend == "triton_hopper"
    reasons["cupy_hopper"] = None
    dispatch._select.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select(PROBLEM, "cuda", profile=Profile.empty())[0].backend == "cupy_hopper"
        mean = Problem("group_mean", rows=8, columns=8, width=8)
        assert dispatch.select(mean, "cuda", profile=Profile.empty())[0].backend == "triton"

    def older_gluon(name: str) -> Mapping[str, Kernel]:
        if name == "triton_hopper":
            raise ImportError("cannot import name 'warpgroup_mma'")
        return kernels(name)

    dispatch._select.cache_clear()
    with monkeypatch.context() as patch, warnings.catch_warnings():
        patch.setattr(registry, "kernels", older_gluon)
        patch.setitem(reasons, "triton_hopper", "needs triton 3.6")
        warnings.simplefilter("error")  # nothing is lost of what that backend never had
        assert dispatch.select(mean, "cuda", profile=Profile.empty())[0].backend == "triton"
    reasons["cupy"] = None
    selection = Problem("topk_columns", rows=8, columns=8, width=1)
    assert dispatch.select(selection, "cuda", profile=Profile.empty())[0].backend == "cupy"


@pytest.mark.parametrize(("capability", "kind"), [((9, 0), "hopper"), ((8, 0), "cuda"), ((10, 0), "cuda")])
def test_the_kind_of_a_device(
    capability: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch._kind.__wrapped__(torch.device("cuda:0")) == kind
    assert dispatch._kind.__wrapped__(CPU) == "cpu"


def test_a_gpu_without_triton_falls_back_to_torch_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order for CUDA devices, told here by a stand-in: no GPU is touched."""
    unavailable = registry.unavailable
    monkeypatch.setattr(
        registry,
        "unavailable",
        lambda name, device: "Triton is not installed" if name == "triton" else unavailable(name, device),
    )
    with pytest.warns(RuntimeWarning, match="using the torch backend on cuda: triton cannot: Triton is not"):
        kernel, _ = dispatch.select(PROBLEM, "cuda", profile=Profile.empty())
    assert kernel.backend == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = Problem("group_mean", rows=8, columns=8, width=8)
        assert dispatch.select(other, "cuda", profile=Profile.empty())[0].backend == "torch"

"""Which runner computes a model, by what is asked for and what is there."""

import pytest
import torch

from pensar.base.errors import ConfigError, RunError
from pensar.infer import runners
from pensar.infer.native.library import available
from pensar.infer.native.runner import NativeRunner
from pensar.infer.runners import runner_for
from pensar.infer.torch_runner import TorchRunner
from tests.infer.native_work import build

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler builds the native kernels here")


@needs_compiler
def test_native_kernels_take_what_was_asked_for() -> None:
    runner = runner_for(build(), "int8", cache="bfloat16", threads=2)
    assert isinstance(runner, NativeRunner)
    assert (runner.weights, runner.cache) == ("int8", "bfloat16")
    assert "2 threads" in runner.describe()
    assert runner.page_bytes() * 2 == runner_for(build()).page_bytes()


@needs_compiler
def test_without_a_number_of_threads_those_are_taken_that_are_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(runners, "take_fastest", lambda runner, pin: asked.append((runner, pin)))
    runner = runner_for(build(), threads=None, pin=True)
    assert asked == [(runner, True)]


def test_no_threads_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="threads is 0; give 1 or more"):
        runner_for(build(), threads=0)


@pytest.mark.parametrize("asked", [{"weights": "int8"}, {"cache": "int8"}])
def test_fewer_bits_without_native_kernels_are_refused_and_say_why(monkeypatch, asked) -> None:
    def absent(*_: object, **__: object) -> NativeRunner:
        raise RunError("no C++ compiler is on the path")

    monkeypatch.setattr(runners, "NativeRunner", absent)
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler is on the path; leave both at as_is"):
        runner_for(build(), **asked)
    assert isinstance(runner_for(build()), TorchRunner)


def test_types_that_native_kernels_do_not_take_are_computed_by_torch() -> None:
    assert isinstance(runner_for(build(dtype=torch.float64)), TorchRunner)
    with pytest.raises(ConfigError, match="float8 is for a GPU"):
        runner_for(build(), "float8")

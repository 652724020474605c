"""The C++ library is built once, by whoever comes first, for any processor; without a compiler the engine goes on."""

import logging
import subprocess
import sys

import pytest
import torch

from pensar.base import native
from pensar.base.errors import RunError
from pensar.infer.native import library as page
from pensar.infer.native import pack, runner
from tests.infer.native_work import SHAPES, build, logits_of, reference, text

BUILDS = {
    "avx2": ("-mno-avx512f", "-mno-avx512vnni"),
    "avx512 without vnni": ("-mno-avx512vnni",),
    "portable": ("-DPENSAR_GENERIC",),
}


@pytest.mark.slow
def test_processes_that_start_together_build_one_whole_file(tmp_path):
    program = (
        "import sys; from pathlib import Path; from pensar.infer.native.library import built, opened;"
        "print(opened(built(Path(sys.argv[1]), ('-O1',))).pensar_columns())"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in both}
    assert said == {str(page.library().pensar_columns())}
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]


def test_without_a_compiler_it_says_so_once(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    monkeypatch.setattr(page, "library", lambda: page.opened(page.built(tmp_path)))
    page._absence.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not page.available()
            assert not page.available()
        assert "no C++ compiler" in page.describe()
        assert len(caplog.records) == 1
    finally:
        page._absence.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="no_such_file"):
        page.built(tmp_path, ("-include", "no_such_file.h"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_other_processors_code_computes_the_same(monkeypatch, tmp_path, name):
    if sys.platform != "linux" or "avx" not in page.describe():
        pytest.skip("the variants are those of x86-64")
    other = page.opened(page.built(tmp_path, BUILDS[name]))
    native = {kind: runner.NativeRunner(build(), kind) for kind in ("float32", "int8", "int4")}
    expected = {kind: logits_of(found, text(70)) for kind, found in native.items()}
    for module in (pack, runner):
        monkeypatch.setattr(module, "library", lambda: other)
    for kind, scores in expected.items():
        found = logits_of(runner.NativeRunner(build(), kind), text(70))
        # Integer sums are exact; rounding to bytes may fall the other way after float sums of another width.
        most = 1e-5 if kind == "float32" else 0.02
        assert (found - scores).norm() <= most * scores.norm()
    for shape in ("mixture", "wide-heads"):
        exact = reference(build(dtype=torch.float64, **SHAPES[shape]), text(70))
        found = logits_of(runner.NativeRunner(build(**SHAPES[shape])), text(70)).double()
        assert (found - exact).abs().max() <= 5e-6 * exact.abs().max()

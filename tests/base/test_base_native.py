"""A library is built once for its sources, flags and headers, and once more when any of them changes."""

import ctypes
import os
from pathlib import Path

import pytest

from pensar.base.errors import RunError
from pensar.base.native import built, cache_folder, opened

SOURCE = '#include "number.h"\nextern "C" long long number() { return NUMBER + MORE; }\n'


@pytest.fixture
def source(tmp_path):
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "number.h").write_text("#define NUMBER 40\n", encoding="utf-8")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "number.cpp").write_text(SOURCE, encoding="utf-8")
    return tmp_path / "source" / "number.cpp"


def number(path):
    return opened(path, {"number": (ctypes.c_int64, [])}).number()


def test_a_build_is_kept_until_a_source_a_header_or_a_flag_changes(source, tmp_path):
    cache, headers = tmp_path / "cache", source.parents[1] / "headers"

    def build(more):
        return built(source, cache, includes=(headers,), extra=(f"-DMORE={more}",))

    first = build(2)
    made = first.stat().st_mtime_ns
    assert build(2) == first
    assert first.stat().st_mtime_ns == made
    assert number(first) == 42
    assert number(build(3)) == 43
    (headers / "number.h").write_text("#define NUMBER 50\n", encoding="utf-8")
    assert number(build(2)) == 52
    source.write_text(SOURCE.replace("+", "-"), encoding="utf-8")
    assert number(build(2)) == 48
    assert len(list(cache.iterdir())) == 4


def test_what_the_compiler_says_is_quoted_and_nothing_is_left(source, tmp_path):
    with pytest.raises(RunError, match=r"number\.h"):
        built(source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_compiler_that_does_nothing_is_quoted(source, tmp_path, monkeypatch):
    (tmp_path / "c++").write_text("#!/bin/sh\necho install the tools first >&2\nexit 1\n", encoding="utf-8")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(RunError, match="install the tools first"):
        built(source, tmp_path / "cache")


def test_without_a_home_it_says_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RunError, match="set XDG_CACHE_HOME"):
        cache_folder()

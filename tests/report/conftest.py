"""Fixtures of the report's tests: a made-up run that is complete, and one that holds hostile text."""

from pathlib import Path

import pytest
from report_run import make_run

HOSTILE = "</script><script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(2)>&amp;\x00\x1b\u202e"


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "tiny")


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("hostile") / "tiny", hostile=HOSTILE)

"""Two ranks that live as long as the tests of this room."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pensar.base.ranks import Crew


@pytest.fixture(scope="session")
def pair() -> Iterator[Crew]:
    """A crew of two; its workers can import the pages beside this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        with Crew(ranks=2, threads=1) as crew:
            yield crew

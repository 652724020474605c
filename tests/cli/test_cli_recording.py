"""What a run is asked to record beside its artifacts: profiles and trackers, none of it part of what is made."""

from pathlib import Path

import msgspec
import pytest

from pensar import recipe as recipes
from pensar.base.errors import ConfigError
from pensar.base.identity import fingerprint
from pensar.base.metrics import Recording
from pensar.cli.options import MachineOptions, open_runtime, steps_to_profile

TINY = Path(__file__).parents[2] / "recipes" / "tiny.yaml"


def test_steps_to_profile_are_a_first_one_and_how_many() -> None:
    assert steps_to_profile("100:3") == (100, 3)
    assert steps_to_profile("7") == (7, 1)
    for wrong in ("", "x", "3:", ":3", "3:0", "-1:2", "1:2:3"):
        with pytest.raises(ConfigError, match=f"--profile {wrong}: give the first step and how many"):
            steps_to_profile(wrong)


def test_the_command_line_comes_before_the_recipe(tmp_path: Path) -> None:
    asked = Recording(trackers=(), profile=(1, 2))
    with open_runtime(MachineOptions(quiet=True), tmp_path, 1, 1, recording=asked) as runtime:
        assert runtime.recording == asked
    with open_runtime(MachineOptions(quiet=True, profile="5"), tmp_path, 1, 1, recording=asked) as runtime:
        assert runtime.recording == Recording(trackers=(), profile=(5, 1))
    with open_runtime(None, tmp_path, 1, 1) as runtime:
        assert runtime.recording == Recording(trackers=("tensorboard",))


def test_what_is_recorded_beside_is_no_part_of_what_is_made() -> None:
    plain = recipes.load(TINY)
    asked = recipes.load(TINY, ["runtime.trackers=[]", "runtime.profile_steps=[3, 2]"])
    assert asked.runtime.profile_steps == (3, 2)
    for one, other in zip(recipes.stages(plain), recipes.stages(asked), strict=True):
        assert fingerprint(one, {}) == fingerprint(other, {})


def test_intervals_are_part_of_what_is_made_where_they_are_set() -> None:
    (general,) = (stage for stage in recipes.stages(recipes.load(TINY)) if stage.name == "pretrain-general")
    config = msgspec.structs.replace(general.config, observe_every=50, losses_every=7)
    assert (config.loop().observe_every, config.loop().losses_every) == (50, 7)


def test_a_recipe_with_a_wrong_recording_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime.profile_steps \[-1, 2\]: a first step and a number"):
        recipes.load(TINY, ["runtime.profile_steps=[-1, 2]"])
    with pytest.raises(ConfigError, match="'tensorbord' is no tracker; did you mean"):
        recipes.load(TINY, ["runtime.trackers=[tensorbord]"])

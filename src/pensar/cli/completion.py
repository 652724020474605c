"""`pensar completion`: the script that teaches a shell the verbs and options."""

from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish"], /) -> None:
    """Print the completion script for a shell.

    Parameters
    ----------
    shell
        The shell that shall complete.
    """
    from pensar.cli import build_app

    print(build_app().generate_completion(shell=shell, prog_name="pensar"))

"""A process that opens a model directory and answers one token: `python -m benchmarks.engine_first_token FOLDER`."""

import sys
from pathlib import Path

from pensar.infer.engine import Engine, Request, SamplingParams
from pensar.model.weights import load_model
from pensar.text.tokenizer import Tokenizer


def main(folder: Path) -> None:
    engine = Engine(load_model(folder), Tokenizer.load(folder), slots=4)
    (done,) = engine.run([Request("first", [1, 2, 3], SamplingParams(max_tokens=1))])
    assert len(done.tokens) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))

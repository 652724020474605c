"""The inference engine against transformers, llama.cpp, OpenVINO GenAI and TRL on one thread, and what it costs itself.

    python -m benchmarks.engine [--quick] [--only NAME ...] [--openvino PYTHON]

Speeds are tokens per CPU-second of interleaved rounds (ours, theirs, ours, theirs), each contender in a process of its
own with one thread to compute in; time of all threads of a process counts. `ours` and `peer` are medians, `ratio` the
median over the rounds. `limit` is what reading weights and cache at the rate of this machine, or the products alone,
would allow, whichever is less; for what is better small it is the least that there could be. `target` is for the ratio
where there is one, else for `ours`, and `reached` says whether it is met. A peer that is not installed is named as such
and has no figure: `pip install transformers xllamacpp`, and `openvino-genai` here or in the environment of PYTHON.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.engine_budgets import budgets
from benchmarks.engine_costs import memory, overhead, startup, sync
from benchmarks.engine_mismatch import mismatch
from benchmarks.engine_rollouts import rollouts
from benchmarks.engine_soak import soak
from benchmarks.engine_speculation import speculation
from benchmarks.engine_speeds import speeds
from benchmarks.engine_spill import spill

Line = dict[str, Any]
METRICS: Mapping[str, Callable[[bool], Iterator[Line]]] = {
    "rollouts": rollouts,
    "overhead": overhead,
    "startup": startup,
    "memory": memory,
    "sync": sync,
    "spill": spill,
    "mismatch": mismatch,
    "soak": soak,
    "budgets": budgets,
    "speculation": speculation,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ["speeds", *METRICS]
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--openvino", default=sys.executable, metavar="PYTHON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        found = speeds(options.quick, options.openvino) if name == "speeds" else METRICS[name](options.quick)
        for row in found:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

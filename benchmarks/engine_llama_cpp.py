"""llama.cpp as a contender, through xllamacpp: `python -m benchmarks.engine_llama_cpp FILE.gguf SLOTS`.

Its server runs in this process, so its threads' time is this process's. One request carries all prompts, which share
the slots; the greedy sampler takes the place of the usual chain, and nothing of a prompt is kept for the next.
"""

import json
import sys
import urllib.request
from typing import Any

from benchmarks.engine_serve import Generate, serve

CONTEXT = 512
"""Positions of a slot."""


def generator(path: str, slots: int) -> Generate:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_parallel, params.n_ctx, params.n_batch = slots, slots * CONTEXT, 2_048
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_prompt, params.cache_ram_mib, params.warmup = False, 0, False
    server = xllamacpp.Server(params)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        body = {"prompt": prompts, "n_predict": new, "temperature": 0.0, "samplers": ["temperature"]}
        body |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            found: Any = json.load(reply)
        # A single prompt is answered without a list; several may come back in any order.
        replies = sorted(found, key=lambda one: one["index"]) if isinstance(found, list) else [found]
        return [one["tokens"] for one in replies]

    return generate


if __name__ == "__main__":
    serve(generator(sys.argv[1], int(sys.argv[2])))

"""OpenVINO GenAI as a contender: `python -m benchmarks.engine_openvino FILE.gguf`, in an environment that has it."""

import sys

from benchmarks.engine_serve import Generate, serve

CACHE_GIB = 1


def generator(path: str, slots: int) -> Generate:
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = slots
    scheduler.max_num_batched_tokens = 2_048
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    pipeline = genai.ContinuousBatchingPipeline(path, scheduler, "CPU", settings)

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        config.apply_chat_template = False
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(tensors, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate


if __name__ == "__main__":
    serve(generator(sys.argv[1], int(sys.argv[2])))

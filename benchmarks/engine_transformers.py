"""transformers' generate in float32 as a contender: `python -m benchmarks.engine_transformers FOLDER`."""

import sys

from benchmarks.engine_serve import Generate, serve


def generator(folder: str) -> Generate:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
        model.generation_config = config  # that of the folder would add stop tokens
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

    return generate


if __name__ == "__main__":
    serve(generator(sys.argv[1]))

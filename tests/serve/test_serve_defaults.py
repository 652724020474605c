"""How a served model is sampled where the request says nothing: as its own directory says."""

import json
import shutil
from pathlib import Path

from pensar.infer.engine import SamplingParams
from pensar.infer.generation import DIRECT_DEFAULTS, Generation
from pensar.serve.app import open_service
from pensar.serve.sampling import chat_params, completion_params, conversation_of
from pensar.serve.service import ServeConfig
from pensar.serve.wire import ChatRequest, CompletionRequest, SentMessage


def params(generation: Generation, **fields: object) -> SamplingParams:
    request = ChatRequest(messages=[SentMessage(role="user", content="What is 2+3?")], **fields)
    (found,) = chat_params(request, conversation_of(request), 10, 100, generation)
    return found


def test_a_served_model_is_sampled_as_its_directory_says(model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "model")
    said = {"temperature": 0.3, "top_k": 5, "min_p": 0.1, "eos_token_id": [7, 9]}
    (folder / "generation_config.json").write_text(json.dumps(said))
    generation = open_service(folder, ServeConfig(model_name="tiny")).generation
    found = params(generation)
    assert (found.temperature, found.top_k, found.top_p, found.min_p) == (0.3, 5, 0.95, 0.1)
    assert found.stop_ids == (7, 9)
    assert params(generation, temperature=0.0, top_k=1).temperature == 0.0
    assert params(generation, enable_thinking=False).temperature == DIRECT_DEFAULTS.temperature
    # A text that is merely continued is not an answer: only the ends hold there.
    (raw,) = completion_params(CompletionRequest(prompt="Two"), 10, 100, generation)
    assert (raw.temperature, raw.top_k, raw.stop_ids) == (1.0, 0, (7, 9))

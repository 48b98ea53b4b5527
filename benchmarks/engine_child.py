"""Runs in the environment of an engine: python engine_child.py ENGINE FOLDER_OR_FILE PROMPTS.json OUT.json

PROMPTS is a list of lists of token ids. OUT: for each, the log-probability of every prompt token but the
first, the likeliest token at every position, and TOKENS greedy tokens that follow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TOKENS = 64


def transformers(folder: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [torch_answer(model, torch.tensor([ids])) for ids in prompts]


def torch_answer(model: Any, ids: Any) -> dict[str, Any]:
    """What a transformers model says to int64 ids [1, T]."""
    import torch

    with torch.no_grad():
        logits = model(ids).logits[0].float()
        more = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, eos_token_id=[]
        )
    chosen = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    first, second = logits[:-1].topk(2).values.unbind(-1)
    return {
        "logprobs": chosen.tolist(),
        "lead": (first - second).tolist(),
        "top": logits[:-1].argmax(-1).tolist(),
        "greedy": more[0, ids.shape[1] :].tolist(),
    }


def llama_cpp(file: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    import numpy as np
    from llama_cpp import Llama

    model = Llama(file, n_ctx=1024, logits_all=True, verbose=False)
    answers = []
    for ids in prompts:
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids)], dtype=np.float64)
        top = logits.max(-1, keepdims=True)
        normed = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        greedy = [int(logits[-1].argmax())]
        while len(greedy) < TOKENS:
            model.eval([greedy[-1]])
            greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        answers.append(
            {
                "logprobs": [float(normed[i, t]) for i, t in enumerate(ids[1:])],
                "top": logits[:-1].argmax(-1).tolist(),
                "greedy": greedy,
            }
        )
    return answers


if __name__ == "__main__":
    engine, model_path, questions, out = sys.argv[1:]
    answer = {"transformers": transformers, "llama.cpp": llama_cpp}[engine]
    found = answer(model_path, json.loads(Path(questions).read_text()))
    Path(out).write_text(json.dumps(found))

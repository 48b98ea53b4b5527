"""Load a quantized checkpoint through plain transformers, in this fresh process, and generate text.

usage: python tools/reload.py FOLDER PROMPT

zq is not imported: the compressed-tensors package does the loading, as it would on a user's server.
"""

import logging
import os
import sys

logging.disable(logging.INFO)
os.environ.setdefault("TQDM_DISABLE", "1")


def main(folder: str, prompt: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    left = {key: names for key, names in info.items() if names}
    if left:
        sys.exit(f"transformers could not load everything: {left}")
    if "zq" in sys.modules:
        sys.exit("zq was imported, so this proves nothing about plain transformers")
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    method = model.config.quantization_config.quant_method
    print(f"reloaded by transformers ({getattr(method, 'value', method)}), no missing or unexpected tensors")
    print(f"> {prompt}\n{answer}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

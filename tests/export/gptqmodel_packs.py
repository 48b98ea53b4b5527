"""Runs in an environment with gptqmodel: python gptqmodel_packs.py CASES.json IN.safetensors OUT.safetensors

CASES: a list of {"name", "awq", "bits", "group", "version"}. IN holds, for each name, `weight` [N, K] and
`scales`, `zeros` [N, G] float32; OUT the qweight, qzeros and scales that gptqmodel's own layers pack.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file, save_file


def main(cases: str, given: str, made: str) -> None:
    with open(cases) as file:
        listed = json.load(file)
    tensors, packed = load_file(given), {}
    for case in listed:
        name, bits = case["name"], case["bits"]
        weight, scales, zeros = (tensors[f"{name}.{part}"] for part in ("weight", "scales", "zeros"))
        n, k = weight.shape
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = weight
        kind = AwqTorchLinear if case["awq"] else TorchLinear
        layer = kind(bits, case["group"], case["version"] == "gptq", False, k, n, register_buffers=True)
        if case["awq"]:
            layer.pack(linear, scales, zeros)
        else:
            layer.pack_original(linear, scales, zeros)
        if case["version"] == "gptq":
            convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        for part in ("qweight", "qzeros", "scales"):
            packed[f"{name}.{part}"] = getattr(layer, part).contiguous()
    save_file(packed, made)


if __name__ == "__main__":
    main(*sys.argv[1:])

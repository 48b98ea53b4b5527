"""What a server's shard of a layer holds; no server is needed."""

from __future__ import annotations

import pytest
import torch

from zq.errors import ZqError
from zq.export import compressed_tensors, native
from zq.numerics.qtensor import QTensor, quantize
from zq.plugins.sharding import Shard, assemble, parts
from zq.spec import Scheme, TensorSpec

STORES = {"zq": native, "compressed-tensors": compressed_tensors}


def shard(
    sizes: tuple[int, ...] = (32,), k: int = 128, whole_n: int | None = None, whole_k: int | None = None
) -> Shard:
    whole_n, whole_k = whole_n or sum(sizes), whole_k or k
    return Shard(name="a.0.x", sizes=sizes, k=k, whole_n=whole_n, whole_k=whole_k)


def weight(text: str, n: int = 32, k: int = 128, seed: int = 0) -> QTensor:
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    return quantize(x.bfloat16(), TensorSpec.parse(text), "mse")


ALL = (
    *("int2:g32", "int3:g64:asym", "int4:g32", "int4:g64:two-level", "int4:channel", "int5:g64"),
    *(
        "int6:channel",
        "int7:g128:asym",
        "int8:channel",
        "int8:g64:asym",
        "int4:g96",
        "int4:channel:asym",
        "e4m3fn:channel",
    ),
    *("e4m3fn:g32", "e2m1fn:g32", "nf4:g64", "int4:g64:center", "int4:g64:s=fp32", "int4:g64:narrow"),
)


def packed(text: str) -> bool:
    """Whether compressed-tensors has such a weight in its packed format."""
    scheme = Scheme.parse(text)
    held = compressed_tensors.refuse(scheme, (32, 128), False, torch.bfloat16) is None
    return held and compressed_tensors.format_of(scheme) == "pack-quantized"


CASES = [(text, "zq") for text in ALL] + [(text, "compressed-tensors") for text in ALL if packed(text)]


@pytest.mark.parametrize(("text", "storage"), CASES)
def test_a_whole_layer_comes_back(text: str, storage: str) -> None:
    q = weight(text)
    stored = {k.removeprefix("x."): v for k, v in STORES[storage].pack("x", q, Scheme(q.spec)).items()}
    listed = parts(q.spec, shard(), storage)
    assert {part.name for part in listed} == set(stored)
    tensors = {}
    for part in listed:
        assert part.shape == tuple(stored[part.name].shape)
        tensors[part.name] = torch.zeros(part.shape, dtype=part.dtype).copy_(stored[part.name])
        assert torch.equal(tensors[part.name].double(), stored[part.name].double())
    back = assemble(q.spec, shard(), storage, tensors)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_one_scale_per_weight_becomes_one_per_row() -> None:
    both = [weight("int8:tensor", 32, seed=1), weight("int8:tensor", 16, seed=2)]
    listed = parts(both[0].spec, shard((32, 16)), "zq")
    assert [part.shape for part in listed] == [(48, 32), (2,)]
    packed = [native.pack("x", q, Scheme(q.spec)) for q in both]
    tensors = {
        "weight_packed": torch.cat([p["x.weight_packed"] for p in packed]),
        "weight_scale": torch.cat([p["x.weight_scale"] for p in packed]).float(),
    }
    back = assemble(both[0].spec, shard((32, 16)), "zq", tensors)
    assert str(back.spec) == "int8:channel"
    assert torch.equal(back.dequantize(), torch.cat([q.dequantize() for q in both]))


def test_two_levels_are_found_in_group_scales() -> None:
    q = weight("int4:g64:two-level")
    stored = compressed_tensors.pack("x", q, Scheme(q.spec))
    tensors = {name.removeprefix("x."): value for name, value in stored.items()}
    tensors["weight_scale"] = tensors["weight_scale"].float()
    plain = TensorSpec.parse("int4:g64")
    back = assemble(plain, shard(), "compressed-tensors", tensors)
    assert back.spec.two_level
    assert torch.equal(back.dequantize(), q.dequantize())
    tensors["weight_scale"][3, 1] *= 1.1
    back = assemble(plain, shard(), "compressed-tensors", tensors)
    assert not back.spec.two_level


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int4:g64:lorc=8", "lorc=8"),
        ("int4:g64:keep=4", "keep=4"),
        ("int4:g64:pow2=16", "pow2=16"),
        ("kmeans4:g64", "estimated values"),
        ("int4:b64", "layout 'b64'"),
        ("int4:rank1", "layout 'rank1'"),
    ],
)
def test_what_is_not_served_is_named_with_a_remedy(text: str, words: str) -> None:
    with pytest.raises(ZqError, match=f"'a.0.x' is {text}.*{words}.*quantize again"):
        parts(TensorSpec.parse(text), shard(), "zq")


@pytest.mark.parametrize(
    ("text", "k", "whole_k", "words"),
    [
        ("int4:g64", 96, 192, "192 inputs in groups of 64 cannot be split into 2 shards of 96"),
        ("int3:channel", 48, 96, "a shard of 48 inputs of 3 bits ends inside a 32-bit word"),
        ("int4:channel", 60, 120, "ends inside a 32-bit word"),
    ],
)
@pytest.mark.parametrize("storage", STORES)
def test_a_shard_that_cuts_is_refused(text: str, k: int, whole_k: int, words: str, storage: str) -> None:
    spec = TensorSpec.parse(text)
    with pytest.raises(ZqError, match=words):
        parts(spec, shard(k=k, whole_k=whole_k), storage)
    parts(spec, shard(k=k), storage)  # the same size is no problem where it is the whole


def test_zero_points_packed_along_the_outputs() -> None:
    spec = TensorSpec.parse("int4:g32:asym")
    with pytest.raises(ZqError, match="zero points of 12 outputs of 4 bits"):
        parts(spec, shard((32, 12)), "compressed-tensors")
    with pytest.raises(ZqError, match="zero points of 12 outputs"):
        parts(spec, shard((12,), whole_n=24), "compressed-tensors")
    parts(spec, shard((12,)), "compressed-tensors")
    parts(spec, shard((32, 12)), "zq")  # one byte each: nothing is packed

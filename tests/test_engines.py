"""What each engine does with each scheme; the facts are those of docs/serving.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from zq.engines import Heads, Layer, Target, judge, parse
from zq.engines.served import held
from zq.errors import ZqError
from zq.spec import Scheme


def layer(
    text: str | None, shape: tuple[int, int] = (4096, 4096), name: str = "a.0.o", site: str = "out"
) -> Layer:
    return Layer(name=name, shape=shape, scheme=Scheme.parse(text) if text else None, site=(0, site))


@pytest.mark.parametrize(
    ("text", "target", "back"),
    [
        ("vllm", Target(engine="vllm", version="0.33"), "vllm:0.33:sm90"),
        ("vllm:0.33:sm80:tp=4", Target(engine="vllm", version="0.33", sm=80, tp=4), "vllm:0.33:sm80:tp=4"),
        ("vllm:cpu", Target(engine="vllm", version="0.33", sm=0), "vllm:0.33:cpu"),
        ("sglang:0.5.23:sm_90a", Target(engine="sglang", version="0.5.23"), "sglang:0.5.23:sm90"),
        ("llama.cpp", Target(engine="llama.cpp", version=""), "llama.cpp"),
        ("vllm:zq:cpu", Target(engine="vllm", version="0.33", sm=0, plugin=True), "vllm:0.33:cpu:zq"),
        ("transformers:5.23", Target(engine="transformers", version="5.23"), "transformers:5.23"),
    ],
)
def test_targets(text: str, target: Target, back: str) -> None:
    assert parse(text) == target
    assert str(target) == back
    assert parse(back) == target


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tgi", "engine 'tgi'"),
        ("vllm:new", "'new' in 'vllm:new'"),
        ("vllm:tp=0", "'tp=0'"),
        ("sglang:zq", "'zq'"),
        ("vllm:0.33:0.32", "'0.32' in 'vllm:0.33:0.32' says the version a second time"),
        ("vllm:sm90:cpu", "the device a second time"),
        ("transformers:tp=2", r"'tp=2' .* write transformers\[:VERSION\]"),
        ("llama.cpp:b1234", "'b1234'"),
        ("vllm:sm999", "'sm999' in 'vllm:sm999' is no device that zq knows; allowed: cpu, sm70, sm72, sm75"),
        ("sglang:sm10", "no device that zq knows"),
    ],
)
def test_targets_that_do_not_exist(text: str, words: str) -> None:
    with pytest.raises(ZqError, match=words):
        parse(text)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "transformers", "llama.cpp"])
def test_the_example_is_of_the_engine_that_was_meant(engine: str) -> None:
    with pytest.raises(ZqError) as caught:
        parse(f"{engine}:typo")
    assert f"for example {engine}" in str(caught.value)
    assert "vllm" not in str(caught.value).replace(engine, "")


CT = "compressed-tensors"
TILES = "e4m3fn:128x128 @ e4m3fn:g128"
WIDE = "e4m3fn:128x128:s=fp32 @ e4m3fn:g128"
ROUNDED = "rounds its float32 scales to the dtype of the model when it loads them"


@pytest.mark.parametrize(
    ("target", "format", "scheme", "kernel"),
    [
        ("vllm:sm90", CT, "int4:g128", "INT4 weights (Machete)"),
        ("vllm:sm90", CT, "int4:g32", "INT4 weights (humming)"),
        ("vllm:sm80", CT, "int4:g32", "INT4 weights (Marlin)"),
        ("vllm:sm80", CT, "int3:g64", "INT3 weights (humming)"),
        ("vllm:sm90", CT, "int8:channel @ int8:token", "INT8 (CUTLASS or Triton)"),
        ("vllm:cpu", CT, "int8:channel @ int8:token", "INT8 (oneDNN)"),
        ("vllm:sm90", CT, "e4m3fn:channel @ e4m3fn:token", "FP8 (CUTLASS)"),
        ("sglang", CT, TILES, "FP8 in tiles"),
        ("sglang", "fp8", WIDE, "FP8 in tiles"),
        ("vllm:sm80", CT, "e4m3fn:128x128", "FP8 weights (Marlin)"),
        ("vllm:sm90", CT, "int3:g64 @ int8:token", "INT3 x INT8 (humming)"),
        ("vllm:sm90", CT, "int4:g32 @ int8:token", "INT4 x INT8 (humming)"),
        ("vllm:sm80", CT, "int4:g16 @ int8:token", "INT4 x INT8 (humming)"),
        ("vllm:sm90", "gptq", "int4:g64", "INT4 weights (Machete)"),
        ("sglang", CT, "int4:g128", "INT4 weights (Marlin)"),
        ("llama.cpp", "gguf", "int4:g64", "INT4 blocks, activations rounded to INT8"),
        ("transformers", "gptq", "int4:g64", "gptqmodel's, which must be installed"),
        ("vllm:zq", CT, "int4:g128 @ int8:token", "zq's kernel w4a8_int8_group"),
        ("vllm:cpu:zq", CT, "int4:g64:asym @ int8:token", "INT4 x INT8, exact integers (zq)"),
        ("vllm:cpu:zq", CT, "int3:g64 @ int8:token", "INT3 x INT8, exact integers (zq)"),
        ("vllm:sm80:zq", "zq", "int4:g64:two-level @ int8:token", "zq's kernel w4a8_int8"),
        ("vllm:sm89:zq", "zq", "e4m3fn:channel @ e4m3fn:token", "zq's kernel w8a8_fp8"),
        ("vllm:cpu:zq", "zq", "int5:g64:asym @ int8:token", "INT5 x INT8, exact integers (zq)"),
        # float32 scales are kept
        ("vllm:sm90", CT, "int8:channel:s=fp32 @ int8:token", "INT8 (CUTLASS or Triton)"),
        ("vllm:sm90", CT, "e4m3fn:channel:s=fp32 @ e4m3fn:token", "FP8 (CUTLASS)"),
        ("sglang", CT, "e4m3fn:channel:s=fp32 @ e4m3fn:token", "FP8"),
        ("vllm:sm80:zq", CT, "int4:g64:s=fp32 @ int8:token", "zq's kernel w4a8_int8_group"),
        # what is not W4A8 stays vLLM's
        ("vllm:zq", CT, "int4:g128", "INT4 weights (Machete)"),
        ("vllm:sm90:zq", CT, "int3:g64 @ int8:token", "INT3 x INT8 (humming)"),
        ("vllm:cpu:zq", CT, "int8:channel @ int8:token", "INT8 (oneDNN)"),
    ],
)
def test_what_runs_as_it_says(target: str, format: str, scheme: str, kernel: str) -> None:
    verdict = judge(parse(target), format, [layer(scheme)])
    assert verdict.kernels == {scheme: kernel}
    assert verdict.problems == verdict.warnings == []


@pytest.mark.parametrize(
    ("target", "format", "scheme", "words"),
    [
        ("vllm:sm90", CT, "int4:g128 @ int8:token", "or add `--linear-backend humming`"),
        ("vllm:sm80", CT, "int4:g64 @ int8:token", "16-bit activations; for real INT8 install zq beside it"),
        ("vllm:zq", CT, "int4:g64:asym @ int8:token", "16-bit activations"),
        ("vllm:sm75:zq", CT, "int4:g64 @ int8:token", "16-bit activations"),
        ("vllm:zq", "zq", "int3:g64", "takes the memory of 16-bit weights"),
        ("vllm:zq", "zq", "int4:g64:s=fp32", "dequantizes layers whose scales bfloat16 would round"),
        ("vllm:cpu:zq", "zq", "int4:g64", "takes the memory of 16-bit weights"),
        ("vllm:cpu", CT, "int4:g64 @ int8:token", "16-bit activations"),
        ("vllm:cpu", "awq", "int4:g64:asym", "on a CPU with AMX vLLM rounds activations to INT8"),
        ("vllm:sm80", CT, "e4m3fn:channel @ e4m3fn:token", "before sm89"),
        ("vllm:cpu", CT, "e4m3fn:channel @ e4m3fn:token", "minutes for a token"),
        ("vllm:sm90", CT, TILES, "VLLM_USE_DEEP_GEMM_E8M0=0 keeps them"),
        ("vllm:sm90", "fp8", WIDE, "VLLM_USE_DEEP_GEMM_E8M0=0 keeps them"),
        ("transformers", "fp8", WIDE, "before sm89 and on a CPU transformers dequantizes it and leaves"),
        ("transformers", CT, WIDE, "rounds its float32 scales to the dtype of the model unless"),
        ("vllm:sm90", CT, "int4:g128:s=fp32", ROUNDED),
        ("vllm:cpu", CT, "int4:g32:s=fp32", ROUNDED),
        ("vllm:sm90", CT, "int4:g128:s=fp32 @ int8:token", ROUNDED),
        ("vllm:sm90", CT, "e4m3fn:channel:s=fp32", ROUNDED),
        ("vllm:sm80", "fp8", WIDE, ROUNDED),
        ("sglang", CT, "int8:channel:s=fp32", ROUNDED),
        ("sglang:sm80", CT, "e4m3fn:channel:s=fp32 @ e4m3fn:token", ROUNDED),
        ("transformers", CT, "int8:channel:s=fp32 @ int8:token", "rounds its float32 scales to the dtype"),
        ("vllm:sm89", CT, TILES, "16-bit activations; `--linear-backend triton` rounds them"),
        ("vllm:sm80", CT, TILES, "before sm89 there is no FP8 arithmetic, so vLLM computes it with 16-bit"),
        (
            "vllm:sm89",
            CT,
            TILES,
            "before sm90 vLLM takes Marlin for FP8 in tiles and computes it with 16-bit",
        ),
        ("vllm:cpu", CT, TILES, "16-bit activations, and does not load it where the CPU has no AMX"),
        ("vllm:sm90", CT, "int4:g128 @ e4m3fn:token", "rounds its group scales to FP8"),
        ("vllm:0.40", CT, "int4:g128", "what zq knows of vllm 0.33, the nearest version; 0.40 may"),
        ("transformers", "zq", "int4:b64", "import zq"),
        ("transformers", CT, "int4:g64:asym", "cannot load packed zero points"),
        ("sentence-transformers", CT, "int8:channel @ int8:token", "goes around the call that unpacks"),
        ("sentence-transformers", "zq", "int8:channel", "must come before SentenceTransformer"),
    ],
)
def test_what_is_not_as_it_says(target: str, format: str, scheme: str, words: str) -> None:
    verdict = judge(parse(target), format, [layer(scheme), layer(scheme)])
    assert verdict.problems == []
    assert len(verdict.warnings) == 1
    assert words in verdict.warnings[0]


@pytest.mark.parametrize(
    ("target", "format", "scheme", "words"),
    [
        ("vllm", "zq", "int4:b64", "vllm reads compressed-tensors, gptq, awq, fp8, not zq's own format"),
        ("vllm:zq", "zq", "int4:b64", "layout 'b64'; quantize again in groups"),
        ("vllm:zq", "zq", TILES, "layout '128x128'; quantize again in groups"),
        ("vllm", CT, "e4m3fn:64x64 @ e4m3fn:g64", "of 128x128 only"),
        ("vllm:cpu", CT, "e4m3fn:128x128", "with FP8 activations"),
        ("sglang:sm80", CT, TILES, "from sm89 on"),
        ("sglang", CT, "e4m3fn:64x64 @ e4m3fn:g64", "of 128x128"),
        ("vllm:zq", "zq", "int4:g64:lorc=8", "'lorc=8'; quantize again without the step lorc"),
        ("vllm", "gguf", "int4:g64", "not GGUF"),
        ("vllm:sm70", CT, "int4:g64", "sm75"),
        ("vllm", "gptq", "int4:g64:asym", "symmetric bits only"),
        ("vllm", "gptq", "int3:g64", "4 or 8"),
        ("vllm", CT, "int8:g64 @ int8:token", "group scales"),
        ("vllm:sm80", CT, "int4:g128 @ e4m3fn:token", "sm90 only"),
        ("vllm:sm90", CT, "int4:g64 @ e4m3fn:token", "groups of 128"),
        ("vllm:cpu", CT, "int8:channel", "INT4 weights only"),
        ("vllm:cpu", CT, "e4m3fn:channel", "on a CPU"),
        ("vllm:cpu", CT, "int3:g64 @ int8:token", "INT4 weights only"),
        ("vllm", CT, "int8:channel @ e4m3fn:token", "zq knows no kernel"),
        ("vllm", CT, "e2m1fn:g32", "zq knows no kernel"),
        ("sglang", CT, "int3:g64", "zq knows no kernel"),
        ("sglang", CT, "int8:g64 @ int8:token", "zq knows no kernel"),
        ("sglang:cpu", CT, "int4:g64", "on this device"),
        ("sglang", CT, "int4:g64 @ int8:token", "no dense kernel"),
        ("sglang", "zq", "int4:b64", "not zq's own format"),
        ("llama.cpp", CT, "int4:g64", "reads GGUF, not compressed-tensors"),
        ("llama.cpp", "gguf", "int3:g64", "no int3 blocks"),
        ("transformers", "gguf", "int4:g64", "not GGUF"),
    ],
)
def test_what_does_not_load(target: str, format: str, scheme: str, words: str) -> None:
    verdict = judge(parse(target), format, [layer(scheme)])
    assert len(verdict.problems) == 1
    assert words in verdict.problems[0]


def test_layers_that_are_fused_need_one_scheme() -> None:
    q, k = (layer(s, name=n, site="qkv") for n, s in (("a.0.q", "int4:g64"), ("a.0.k", "int8:g64")))
    found = judge(parse("vllm"), CT, [q, k]).problems
    assert found == ["a.0.q, a.0.k are fused into one layer and need one scheme, not int4:g64 and int8:g64"]
    skipped = layer(None, name="a.0.k", site="qkv")
    assert "as it is and int4:g64" in judge(parse("sglang"), CT, [q, skipped]).problems[0]
    assert judge(parse("transformers"), CT, [q, k]).problems == []


def test_tensor_parallelism() -> None:
    down = layer("int4:g128", (512, 1536), "a.0.down", "down")
    assert judge(parse("vllm:tp=4"), CT, [down]).problems == []
    assert (
        "groups of 128 cannot be split between 8 devices" in judge(parse("vllm:tp=8"), CT, [down]).problems[0]
    )
    assert judge(parse("vllm:tp=4"), CT, [down], Heads(query=9)).problems == [
        "9 attention heads cannot be split between 4 devices"
    ]
    up = layer("int8:channel", (577, 512), "a.0.up", "up")
    assert "577 outputs" in judge(parse("vllm:tp=2"), CT, [up]).problems[0]
    assert judge(parse("vllm"), CT, [up]).problems == []
    thin = layer("int3:channel", (512, 80), "a.0.down", "down")
    assert judge(parse("vllm:tp=2"), CT, [thin]).problems == [
        "'a.0.down': 40 inputs of 3 bits end inside a packed 32-bit word"
    ]


def test_a_quantized_head_in_zqs_own_format() -> None:
    head = Layer(name="lm_head", shape=(160, 64), scheme=Scheme.parse("int4:g64"))
    assert "'lm_head' is outside the blocks" in judge(parse("vllm:zq"), "zq", [head]).problems[0]
    assert judge(parse("vllm:zq"), CT, [head]).problems == []


# (sm, scheme, [N, K], kernel) of packed weights: answers of vLLM 0.33 itself (benchmarks/vllm_choice.py).
CHOSEN = [
    (75, "int4:g128", (4096, 4096), "Marlin"),
    (80, "int4:g128", (48, 128), "Marlin"),
    (80, "int4:g64:asym", (576, 576), "Marlin"),
    (80, "int8:g64", (96, 576), "Marlin"),
    (80, "int8:g64:asym", (4096, 4096), "humming"),
    (89, "int8:channel:asym", (512, 512), "humming"),
    (89, "int4:g16", (512, 512), "humming"),
    (80, "int4:g96", (64, 96), "Triton"),
    (80, "int4:g96", (4096, 192), "humming"),
    (100, "int4:g256", (512, 512), "Triton"),
    (100, "int3:g128", (4096, 4096), "humming"),
    (120, "int4:channel", (64, 96), "Marlin"),
    (90, "int4:g128", (4096, 4096), "Machete"),
    (90, "int8:g64:asym", (512, 512), "Machete"),
    (90, "int4:channel", (1536, 192), "Machete"),
    (90, "int4:g64", (576, 576), "humming"),
    (90, "int4:g32", (4096, 4096), "humming"),
    (90, "int4:g256", (4096, 4096), "humming"),
    (90, "int4:channel", (512, 96), "humming"),
]


@pytest.mark.parametrize(("sm", "scheme", "shape", "kernel"), CHOSEN)
def test_the_kernels_that_vllm_chooses(sm: int, scheme: str, shape: tuple[int, int], kernel: str) -> None:
    found = judge(parse(f"vllm:sm{sm}"), CT, [layer(scheme, shape)])
    bits = scheme[3]
    assert found.kernels == {scheme: f"INT{bits} weights ({kernel})"}


def block(scheme: str, *sizes: int, hidden: int = 576, number: int = 0) -> list[Layer]:
    """q, k and v of these sizes."""
    names = [f"a.{number}.{name}" for name in ("q", "k", "v")]
    return [
        Layer(name=name, shape=(n, hidden), scheme=Scheme.parse(scheme), site=(number, "qkv"))
        for name, n in zip(names, sizes, strict=True)
    ]


def test_kernels_are_those_of_fused_layers() -> None:
    """Machete wants rows in multiples of 128: q, k and v of SmolLM2 have 960 together."""
    qkv = block("int4:g64", 576, 192, 192)
    assert judge(parse("vllm"), CT, qkv).kernels == {"int4:g64": "INT4 weights (humming)"}
    thin = [layer("int4:g64", (192, 576), f"a.0.{name}", "up") for name in ("gate", "up")]
    assert judge(parse("vllm"), CT, thin).kernels == {"int4:g64": "INT4 weights (Machete)"}
    assert judge(parse("vllm"), CT, thin[:1]).kernels == {"int4:g64": "INT4 weights (humming)"}


def test_kernels_that_differ_by_shape_are_named() -> None:
    blocks = [each for number in range(3) for each in block("int4:g64", 576, 192, 192, number=number)]
    more = [
        layer("int4:g64", (1536, 576), f"a.{number}.{name}", "up")
        for number in range(3)
        for name in ("gate", "up")
    ]
    more = [replace(each, site=(int(each.name[2]), "up")) for each in more]
    downs = [
        replace(layer("int4:g64", (1024, 1536), f"a.{number}.down"), site=(number, "down"))
        for number in range(3)
    ]
    found = judge(parse("vllm"), CT, [*blocks, *more, *downs])
    assert found.kernels == {
        "int4:g64": "INT4 weights (Machete); "
        "INT4 weights (humming) for 3 layers, first 'a.0.q+k+v' [960, 576]"
    }


def test_kernels_are_those_of_a_devices_part() -> None:
    """Machete needs 128 rows and 64 inputs, FP8 activations 128 of both, zq's kernels 16 inputs."""
    down = layer("int4:channel", (4096, 11008), "a.0.down", "down")  # 11008 / 8 = 1376 = 43 x 32
    assert judge(parse("vllm"), CT, [down]).kernels == {"int4:channel": "INT4 weights (Machete)"}
    assert judge(parse("vllm:tp=8"), CT, [down]).kernels == {"int4:channel": "INT4 weights (humming)"}
    fp8 = layer("int4:g128 @ e4m3fn:token", (1024, 1024), "a.0.up", "up")
    assert judge(parse("vllm:tp=8"), CT, [fp8]).problems == []
    assert "multiples of 128" in judge(parse("vllm:tp=16"), CT, [fp8]).problems[0]
    w4a8 = layer("int4:channel @ int8:token", (64, 272), "a.0.down", "down")
    assert "zq's kernel" in judge(parse("vllm:zq:tp=1"), CT, [w4a8]).kernels["int4:channel @ int8:token"]
    assert "dequantized" in judge(parse("vllm:zq:tp=2"), CT, [w4a8]).kernels["int4:channel @ int8:token"]


def test_heads_of_keys_and_values() -> None:
    """With fewer of them than devices, several devices hold the same one."""
    qkv = block("int4:g64", 4096, 1024, 1024, hidden=4096)
    heads = Heads(query=32, kv=8)
    for tp, rows in ((1, 6144), (8, 768), (16, 512)):
        assert [each.shape for each in held(qkv, tp, heads)] == [(rows, 4096)]
        assert judge(parse(f"vllm:tp={tp}"), CT, qkv, heads).problems == []
    found = judge(parse("vllm:tp=4"), CT, block("int4:g64", 768, 192, 192), Heads(query=12, kv=3)).problems
    assert found == ["3 heads of keys and values cannot be split between 4 devices"]


def test_words_that_a_fused_layer_or_a_device_would_cut() -> None:
    """Zero points are packed along the outputs; GPTQ and AWQ pack them for symmetric weights too."""
    odd = block("int4:g64:asym", 576, 196, 196)
    assert "'a.0.k': the zero points of 196 outputs of 4 bits" in judge(parse("vllm"), CT, odd).problems[0]
    assert judge(parse("vllm"), CT, block("int4:g64", 576, 196, 196)).problems == []
    assert judge(parse("vllm:zq"), "zq", odd).problems == []
    for format in ("gptq", "awq"):
        assert len(judge(parse("vllm"), format, block("int4:g64", 576, 196, 196)).problems) == 1
    out = layer("int8:channel", (512, 1028), "a.0.out", "out")
    assert judge(parse("vllm:tp=2"), CT, [out]).problems == [
        "'a.0.out': 514 inputs of 8 bits end inside a packed 32-bit word"
    ]
    whole = layer("int8:channel @ int8:token", (512, 1028), "a.0.out", "out")
    assert judge(parse("vllm:tp=2"), CT, [whole]).problems == []


def test_tiles_that_a_fused_layer_or_a_device_would_cut() -> None:
    """The last of fused layers may end inside a tile, on one device."""
    for engine in ("vllm", "sglang"):
        odd = judge(parse(engine), CT, block(TILES, 576, 192, 192, hidden=640)).problems
        assert odd == [
            "'a.0.q': 576 outputs, fused with others, end inside a tile of 128; use FP8 with a scale per "
            "channel (--fp8)"
        ]
    assert judge(parse("vllm"), CT, block(TILES, 640, 128, 192, hidden=640)).problems == []
    split = block(TILES, 512, 256, 256, hidden=512)
    assert judge(parse("vllm:tp=2"), CT, split, Heads(query=8, kv=4)).problems == []
    assert judge(parse("vllm:tp=4"), CT, split, Heads(query=8, kv=4)).problems == [
        "'a.0.k': the 64 outputs of a device end inside a tile of 128"
    ]
    down = layer(TILES, (512, 768), "a.0.down", "down")
    assert judge(parse("vllm:tp=2"), CT, [down]).problems == []
    assert judge(parse("vllm:tp=4"), CT, [down]).problems == [
        "'a.0.down': 768 inputs in tiles of 128 cannot be split between 4 devices"
    ]
    assert judge(parse("vllm"), CT, [layer(TILES, (500, 768), "a.0.down", "down")]).kernels == {
        TILES: "FP8 in tiles (CUTLASS)"
    }
    ragged = judge(parse("vllm"), CT, [layer(TILES, (512, 200), "a.0.up", "up")]).problems
    assert ragged == [
        "'a.0.up': tiles of 128 do not divide its 200 inputs; use FP8 with a scale per channel (--fp8)"
    ]
    # zq's own format has a shorter last group, and its plug-in serves that where nothing is split
    assert judge(parse("vllm:zq:cpu"), "zq", [layer("int4:g64", (512, 200))]).problems == []


def test_heads_come_first() -> None:
    """Before the odd sizes that splitting them would give."""
    layers = [*block("int4:g64", 576, 192, 192), layer("int4:g64", (576, 576))]
    found = judge(parse("vllm:cpu:tp=2"), CT, layers, Heads(query=9, kv=3))
    assert found.problems[0] == "9 attention heads cannot be split between 2 devices"
    assert len(found.problems) > 1
    assert found.advice == "choose another tensor parallel size: 1 or 3"
    more = len(found.problems) - 1
    assert found.refusal == f"{found.problems[0]} (and {more} more); {found.advice}"


@pytest.mark.parametrize(
    ("target", "scheme", "end"),
    [
        ("vllm:cpu", "int8:channel", "not int8; take another scheme or engine"),
        ("vllm:sm70", "int4:g64", "not sm70; take such a device"),
        ("sglang", "int4:g64 @ int8:token", "8-bit activations; use --w4a16"),
    ],
)
def test_a_refusal_always_says_what_to_do(target: str, scheme: str, end: str) -> None:
    found = judge(parse(target), CT, [layer(scheme)])
    assert found.advice == ""
    assert found.refusal.endswith(end)


def holding(*formats: str) -> Callable[[str], list[Layer]]:
    """What a checkpoint of int4 weights becomes in these formats; others refuse it."""

    def restate(format: str) -> list[Layer]:
        if format not in formats:
            raise ZqError(f"{format} holds no such thing")
        return [layer("int4:g64:asym" if format == "awq" else "int4:g64")]

    return restate


@pytest.mark.parametrize(
    ("target", "format", "scheme", "formats", "advice"),
    [
        ("llama.cpp", CT, "int4:g64", ("gguf",), "use zq export --to gguf"),
        ("llama.cpp", CT, "int4:g64", (), "gguf holds no such thing"),
        ("vllm", "zq", "int4:g64", (), "install zq beside it (vllm:zq)"),
        ("vllm", "zq", "int4:b64", (), "compressed-tensors holds no such thing"),
        ("vllm", "zq", "int4:b64", ("awq",), "use zq export --to awq"),
        ("vllm", "zq", "int4:g64", (CT,), f"install zq beside it (vllm:zq), or use zq export --to {CT}"),
        ("vllm:zq", "zq", "int4:b64", (CT,), f"use zq export --to {CT}"),
        ("vllm", "gptq", "int4:g64:asym", (CT, "awq"), f"use zq export --to {CT}"),
        ("sglang", "gptq", "int4:g64:asym", (), ""),
        ("sglang:cpu", "zq", "int4:g64", (CT, "gptq", "awq"), ""),  # no format helps there
        ("vllm:sm70", CT, "int4:g64", ("gptq", "awq"), ""),
    ],
)
def test_what_helps_has_been_tried(
    target: str, format: str, scheme: str, formats: tuple[str, ...], advice: str
) -> None:
    found = judge(parse(target), format, [layer(scheme)], restate=holding(*formats), command="zq export")
    assert found.problems
    assert found.advice == advice

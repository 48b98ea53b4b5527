"""text.cu itself, compiled for the CPU (tests/kernels/host), against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from tests.kernels.inputs import BF16, FP8, FP16
from tests.kernels.inputs_kv import text_args
from tests.kernels.near_kv import worst_text
from tests.kernels.on_cpu import Sources, aligned, into
from zq.errors import ZqError
from zq.kernels import checks_kv, launch_kv, reference
from zq.kernels.table import UNITS

RUN = """
extern "C" void run(const Args *a, int entry, int x, int y, int z, int threads, int backwards, int cluster) {
  for (int rank = 0; rank < 8; ++rank) memset(words_of_blocks[rank], 0xFF, sizeof words_of_blocks[rank]);
  run_grid({x, y, z}, threads, [=] { entry == 64 ? text_64(*a) : text_128(*a); }, backwards, cluster);
}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return Sources(tmp_path_factory.mktemp("host"))


@pytest.fixture
def device(sources, monkeypatch):
    """Operators launch on the CPU; `device.backwards` may be set, `.launches` are what was."""

    class Device:
        backwards = False

        def __init__(self) -> None:
            self.launches: list[tuple] = []

    it = Device()

    def launch(call):
        grid, threads, shared, cluster, _ = call.options
        assert shared <= 229376
        it.launches.append((grid, threads, cluster))
        library = sources.compile(UNITS[call.unit], RUN, {}, 90, "-O1")
        entry = int(call.entry.rpartition("_")[2])
        library.run(ctypes.byref(call.arguments), entry, *grid, threads, it.backwards, cluster)

    monkeypatch.setattr(
        launch_kv.cuda, "describe", lambda index: launch_kv.cuda.Device(0, "sm_90a", 90, 132, 232448, None)
    )
    monkeypatch.setattr(launch_kv.Launch, "__call__", launch)
    return it


def whole(name: str, args: tuple) -> list[Tensor]:
    """Into memory full of NaN; q, k and v are aligned as on a GPU."""
    q, k, v, *rest = args
    every = aligned(torch.cat((q, k, v), 2))
    args = *every.split([x.shape[2] for x in (q, k, v)], 2), *rest
    made = [aligned(torch.zeros(shape, dtype=dtype)) for shape, dtype in getattr(checks_kv, name)(*args)]
    for out in made:
        out.view(torch.uint8).fill_(0xFF)
    into(name, args, made)
    return made


SHAPES = [
    (2, 4, 4, 37, 64),
    (1, 8, 2, 130, 128),
    (3, 6, 1, 65, 80),
    (2, 3, 3, 200, 32),
    (1, 2, 1, 64, 96),
    (1, 1, 1, 1, 16),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, masked, causal, device):
    args = text_args(shape, BF16, causal, masked and shape[0] > 1, kept=True)
    (found,) = whole("attend_text", args)
    assert worst_text(found, args) <= 1
    _are_kept(args)


def _are_kept(args: tuple) -> None:
    tokens = args[0].shape[1]
    for x, kept in zip(args[1:3], args[4:6], strict=True):
        assert torch.equal(kept[:, :, :tokens], x.transpose(1, 2))
        assert kept[:, :, tokens:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_sizes(dtype, size, device):
    """Even scores, and ones of thousands, whose float32 has few places behind the point; with masks and both
    ways round."""
    args = text_args((3, 4, 2, 150, 64), dtype, True, True, size=size, seed=3)
    first = whole("attend_text", args)[0]
    assert worst_text(first, args, sums=1e-5 if size < 1 else 2e-3) <= 1
    device.backwards = True
    assert torch.equal(whole("attend_text", args)[0], first)


@pytest.mark.parametrize("to", [torch.int8, FP8])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 12, 12, 70, 64), BF16),
        ((3, 16, 4, 20, 128), FP16),
        ((1, 9, 3, 129, 48), BF16),
        ((1, 5, 5, 64, 64), FP16),
        ((1, 1, 1, 66, 96), BF16),
    ],
    ids=str,
)
def test_codes_are_those_of_its_rows(shape, dtype, causal, to, device):
    """To the bit, by the heads of one block and of a cluster of up to eight; a whole token is zeros."""
    args = text_args(shape, dtype, causal, shape[0] > 1, kept=True)
    args[2][:, :1] = 0  # the first sees itself only, where that is all
    rows = whole("attend_text", args)[0]
    wanted = reference.codes(rows, to)
    for device.backwards in (False, True):
        found = whole("attend_text_codes", (*args, to))
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a.float(), b.float())
    heads = shape[1]
    blocks = heads if heads <= 8 else -(-heads // 2)
    grid = (blocks, -(-shape[3] // 64), shape[0])
    assert device.launches[-1] == (grid, 128 * (1 + (heads > 8)), blocks)
    _are_kept(args)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_how_low_a_mask_must_be_to_hide(dtype, device):
    """What lies above is added."""
    q, k, v, _, *rest = text_args((2, 2, 2, 40, 32), dtype, causal=False)
    mask = torch.zeros(2, 40, dtype=dtype)
    mask[:, 3], mask[1] = -61000, mask[1] - 59000
    args = q, k, v, mask, *rest
    (found,) = whole("attend_text", args)
    assert worst_text(found, args, sums=2e-2) <= 1
    assert worst_text(found, (q, k, v, None, *rest), sums=2e-2) > 1


@pytest.mark.parametrize(
    ("arch", "heads", "channels", "codes", "fits"),
    [
        (90, 16, 128, True, True),
        (90, 17, 64, True, False),
        (90, 17, 64, False, True),
        (89, 12, 64, True, False),
        (89, 12, 128, False, True),
        (120, 8, 64, True, True),
        (120, 16, 64, True, True),
        (120, 16, 128, True, False),
        (120, 12, 128, False, True),
    ],
)
def test_where_it_fits(arch, heads, channels, codes, fits):
    """sm_89 has no clusters, sm_120 less shared memory."""
    shared = 232448 if arch == 90 else 101376
    there = launch_kv.cuda.Device(0, f"sm_{arch}", arch, 132, shared, None)
    assert (launch_kv.text_shape(there, heads, channels, codes) is not None) == fits


def test_where_it_does_not_fit_it_says_so(device, monkeypatch):
    there = launch_kv.cuda.Device(0, "sm_89", 89, 132, 101376, None)
    monkeypatch.setattr(launch_kv.cuda, "describe", lambda index: there)
    args = text_args((1, 2, 2, 9, 32))
    with pytest.raises(ZqError, match=r"attend_text_codes does not fit sm_89, .* use attend_text"):
        whole("attend_text_codes", (*args, torch.int8))


def test_what_is_no_number_stays_one(device):
    args = text_args((1, 2, 2, 70, 64), BF16)
    args[0][0, 66, 1, 3] = torch.nan
    rows = whole("attend_text", args)[0]
    assert rows[66, 64:].isnan().all()
    assert rows.isnan().sum() == 64
    _, steps, _ = whole("attend_text_codes", (*args, torch.int8))
    assert steps.isnan().nonzero().flatten().tolist() == [66]

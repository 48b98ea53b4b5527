"""A bundle runs when it was made from these sources and is unchanged; else never, unless told to."""

from __future__ import annotations

import hashlib
import json

import pytest

from zq.errors import ZqError
from zq.kernels import bundle, nvrtc
from zq.kernels import cache as cubin_cache
from zq.kernels.table import UNITS

UNIT, OTHER = UNITS["plain_int8_fp32"], UNITS["plain_fp8_fp32"]
PAIRS = [(UNIT, "sm_80"), (UNIT, "sm_90a"), (OTHER, "sm_90a")]


@pytest.fixture
def out(cache, tmp_path, monkeypatch):
    """A checkpoint folder with a bundle; no bundle is in use afterwards."""
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bundle, "_used", [])
    bundle.write(tmp_path, PAIRS)
    return tmp_path


def manifest(out):
    return json.loads((out / "kernels" / "manifest.json").read_text())


def edit(out, **changes):
    found = manifest(out)
    for entry in found["cubins"]:
        entry |= {key: value for key, value in changes.items() if key in entry}
    (out / "kernels" / "manifest.json").write_text(json.dumps(found | changes))


def test_what_is_written(out):
    files = {
        path.relative_to(out / "kernels").as_posix()
        for path in (out / "kernels").rglob("*")
        if path.is_file()
    }
    cubins = {f"{unit.name}.{arch}.cubin" for unit, arch in PAIRS}
    assert files == cubins | {"manifest.json", *(f"src/{name}" for name in nvrtc.texts("quant.cu"))}
    for entry in manifest(out)["cubins"]:
        data = (out / "kernels" / f"{entry['unit']}.{entry['arch']}.cubin").read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["key"] == nvrtc.key(UNITS[entry["unit"]], entry["arch"], entry["nvrtc"])
    assert (out / "kernels" / "src" / "quant.cu").read_text() == nvrtc.texts("quant.cu")["quant.cu"]


def test_a_recognised_cubin_needs_no_compiler(out, monkeypatch):
    wanted = cubin_cache.compiled(UNIT, "sm_90a")
    monkeypatch.setattr(nvrtc, "is_installed", lambda: False)
    with pytest.raises(ZqError, match=r"is in no bundle in use .* pip install"):
        bundle.cubin(UNIT, "sm_90a")
    assert bundle.use(out)
    assert bundle.cubin(UNIT, "sm_90a") == wanted
    with pytest.raises(ZqError, match="is in no bundle in use"):
        bundle.cubin(OTHER, "sm_89")


def test_other_sources_are_not_recognised(out, monkeypatch):
    path = out / "kernels" / f"{UNIT.name}.sm_90a.cubin"
    path.write_bytes(b"foreign")
    edit(out, key="0" * 64, sha256=hashlib.sha256(b"foreign").hexdigest())
    bundle.use(out)
    assert bundle.cubin(UNIT, "sm_90a") == cubin_cache.compiled(UNIT, "sm_90a")
    bundle.use(out, trust=True)
    assert bundle.cubin(UNIT, "sm_90a") == b"foreign"
    bundle.use(out)
    assert bundle.cubin(UNIT, "sm_90a") != b"foreign"


def test_newer_sources_of_zq_are_not_those_of_the_bundle(out, monkeypatch):
    monkeypatch.setattr(nvrtc, "is_installed", lambda: False)
    bundle.use(out)
    assert bundle.cubin(UNIT, "sm_90a")
    texts = nvrtc.texts("quant.cu")
    monkeypatch.setattr(nvrtc, "texts", lambda source: texts | {"common.cuh": "// changed"})
    with pytest.raises(ZqError, match="is in no bundle in use"):
        bundle.cubin(UNIT, "sm_90a")


@pytest.mark.parametrize("trust", [False, True])
def test_a_changed_cubin_is_refused(out, trust):
    path = out / "kernels" / f"{UNIT.name}.sm_90a.cubin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    bundle.use(out, trust=trust)
    with pytest.raises(ZqError, match=r"sm_90a.cubin is not the file that manifest.json describes"):
        bundle.cubin(UNIT, "sm_90a")


def test_a_missing_cubin(out):
    (out / "kernels" / f"{UNIT.name}.sm_90a.cubin").unlink()
    bundle.use(out)
    with pytest.raises(ZqError, match="cannot be read"):
        bundle.cubin(UNIT, "sm_90a")


def test_a_manifest_that_is_none(out):
    path = out / "kernels" / "manifest.json"
    for text in ("{", "[]", '{"format": 1, "cubins": [{}]}', '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ZqError, match="cannot be read"):
            bundle.use(out)
    path.write_text('{"format": 2, "cubins": []}')
    with pytest.raises(ZqError, match="has format 2, this zq reads 1"):
        bundle.use(out)


def test_a_folder_without_a_bundle(tmp_path):
    assert bundle.use(tmp_path) is None


def test_a_bundle_is_replaced_and_never_half_there(out, monkeypatch):
    bundle.write(out, PAIRS[:1])
    assert [entry["arch"] for entry in manifest(out)["cubins"]] == ["sm_80"]
    assert len(list((out / "kernels").glob("*.cubin"))) == 1
    real = cubin_cache.write

    def stop(path, data):
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(cubin_cache, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(out, PAIRS)
    assert bundle.use(out) is None


def test_pairs():
    assert bundle.pairs([UNIT, OTHER], ("sm_80", "sm_90a")) == PAIRS
    with pytest.raises(ZqError, match="no kernel exists for sm_80"):
        bundle.pairs([OTHER], ("sm_80",))

"""Bundles: the cubins that a checkpoint needs, beside its weights, for machines without a compiler.

    OUT/kernels/manifest.json           what is there, and what it was made of
    OUT/kernels/NAME.ARCH.cubin
    OUT/kernels/src/...                 the sources

A cubin of a bundle is recognised when the manifest says that it was made from exactly the sources, options
and architecture that this zq would compile (`nvrtc.key`), and its own hash is the one in the manifest. Others
are passed over, or run with `trust=True` only. A bundle is a program all the same: nothing in it proves who
wrote it, so `use` is called for checkpoints that the user chose, never for what lies around.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zq.errors import ZqError
from zq.kernels import cache, nvrtc
from zq.kernels.unit import Unit

FOLDER = "kernels"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """A bundle in use: its folder, {(unit, arch): entry of the manifest}, whether others may run."""

    folder: Path
    entries: dict[tuple[str, str], dict[str, Any]]
    trust: bool

    def cubin(self, unit: Unit, arch: str) -> bytes | None:
        """The cubin of a unit, or None when it is not there or not recognised. Raises ZqError when it was
        changed since the manifest was written."""
        entry = self.entries.get((unit.name, arch))
        if entry is None or not (self.trust or entry["key"] == nvrtc.key(unit, arch, entry["nvrtc"])):
            return None
        path = self.folder / f"{unit.name}.{arch}.cubin"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ZqError(
                f"{path} cannot be read ({error.strerror or error}); write the bundle again"
            ) from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ZqError(
                f"{path} is not the file that {MANIFEST} describes; write the bundle again, or delete it"
            )
        return data


_used: list[Bundle] = []


def use(checkpoint: Path, *, trust: bool = False) -> Bundle | None:
    """Look into the bundle of a checkpoint from now on, before the cache; None when it has none.

    trust: run its cubins although they were made from other sources than those of this zq.
    Raises ZqError for a manifest that cannot be read.
    """
    found = read(checkpoint, trust=trust)
    if found is not None:
        _used[:] = [found, *(bundle for bundle in _used if bundle.folder != found.folder)]
    return found


def cubin(unit: Unit, arch: str) -> bytes:
    """A cubin from the bundles in use, the last one first, else from the cache, else compiled now.

    Raises ZqError when it is nowhere and cannot be compiled.
    """
    bundled = (bundle.cubin(unit, arch) for bundle in _used)
    found = next((data for data in bundled if data is not None), None)
    if found is not None:
        return found
    if not nvrtc.is_installed():
        raise ZqError(
            f"kernel {unit.name} for {arch} is in no bundle in use (zq kernels bundle), and NVRTC is not "
            f"installed to compile it; {nvrtc.INSTALL}"
        )
    return cache.compiled(unit, arch)


def read(checkpoint: Path, *, trust: bool = False) -> Bundle | None:
    """The bundle of a checkpoint, or None when it has none. Raises ZqError for an unreadable manifest."""
    folder = checkpoint / FOLDER
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = [
            {key: str(entry[key]) for key in ("unit", "arch", "key", "sha256", "nvrtc")}
            for entry in manifest["cubins"]
        ]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZqError(
            f"{folder / MANIFEST} cannot be read ({error}); write the bundle again, or delete it"
        ) from None
    if version != FORMAT:
        raise ZqError(
            f"{folder / MANIFEST} has format {version}, this zq reads {FORMAT}; write the bundle again"
        )
    return Bundle(folder, {(entry["unit"], entry["arch"]): entry for entry in listed}, trust)


def pairs(units: Iterable[Unit], archs: Iterable[str]) -> list[tuple[Unit, str]]:
    """What is to be compiled: every unit for every architecture that it exists for. Raises ZqError when
    there is none."""
    found = [(unit, arch) for arch in archs for unit in units if arch in unit.archs]
    if not found:
        raise ZqError(f"no kernel exists for {', '.join(archs)} and these layers; choose other architectures")
    return found


def write(
    checkpoint: Path,
    todo: Iterable[tuple[Unit, str]],
    progress: Callable[[Unit, str], None] = lambda unit, arch: None,
) -> dict[str, Any]:
    """Compile what is not in the cache and write the bundle, in place of one that is there. Returns its
    manifest.

    The old manifest goes first and the new one comes last, so a bundle that is not whole is none.
    Raises ZqError when something does not compile or cannot be written.
    """
    from zq import __version__

    folder, version = checkpoint / FOLDER, nvrtc.version()
    made = []
    for unit, arch in todo:
        made.append((unit, arch, cache.compiled(unit, arch)))
        progress(unit, arch)
    _clear(folder)
    cubins = []
    for unit, arch, data in made:
        cache.write(folder / f"{unit.name}.{arch}.cubin", data)
        for name, text in nvrtc.texts(unit.source).items():
            cache.write(folder / "src" / name, text.encode())
        hashes = {"key": nvrtc.key(unit, arch, version), "sha256": hashlib.sha256(data).hexdigest()}
        cubins.append({"unit": unit.name, "arch": arch, "nvrtc": version, **hashes})
    manifest = {"format": FORMAT, "zq": __version__, "cubins": cubins}
    cache.write(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _clear(folder: Path) -> None:
    try:
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in folder.glob("*.cubin"):
            path.unlink()
    except OSError as error:
        raise ZqError(
            f"{folder} cannot be changed: {error.strerror or error}; choose another folder"
        ) from None

"""zq kernels: list, compile and bundle the CUDA kernels. None of it needs a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zq.cli.console import command, err, listing, note, out, print_json, size

if TYPE_CHECKING:
    from zq.kernels.unit import Unit
    from zq.plan import Plan

app = typer.Typer(help="List, compile and bundle the CUDA kernels; no GPU and no toolkit is needed.")
ARCH = "Architectures: sm_80, sm_89, sm_90a, sm_100a, sm_120, separated by commas, or all."


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Without a subcommand: list."""
    if context.invoked_subcommand is None:
        list_kernels()


@app.command("list")
def list_kernels(
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Every kernel: the operators that it serves, for which architectures, and which of them are compiled."""
    with command(json):
        from zq.kernels import cache, nvrtc
        from zq.kernels.table import UNITS

        can = nvrtc.is_installed()
        rows = [
            {
                "kernel": unit.name,
                "source": unit.source,
                "operators": list(unit.ops),
                "archs": list(unit.archs),
                "compiled": [arch for arch in unit.archs if can and cache.place(unit, arch).exists()],
            }
            for unit in UNITS.values()
        ]
        where = str(cache.folder())
        if json:
            return print_json({"nvrtc": nvrtc.version() if can else None, "cache": where, "kernels": rows})
        listing(
            ("kernel", "operators", "architectures", "compiled"),
            [
                [row["kernel"], *(" ".join(row[key]) or "-" for key in ("operators", "archs", "compiled"))]
                for row in rows
            ],
        )
        state = f"NVRTC {nvrtc.version()}" if can else f"NVRTC is not installed; {nvrtc.INSTALL}"
        out.print(f"{len(rows)} kernels; {state}; compiled: {where}", soft_wrap=True)


@app.command("build")
def build(
    arch: Annotated[str, typer.Option("--arch", help=ARCH)] = "all",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the cubins. Default: only the cache.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compile every kernel, on any machine.

    zq kernels build --arch sm_90a -o cubins
    """
    with command(json):
        from zq.kernels import bundle, cache
        from zq.kernels.table import UNITS
        from zq.kernels.unit import parse_archs

        todo = bundle.pairs(UNITS.values(), parse_archs(arch))
        if output is not None:
            cache.make_folder(output)
        begun = time.monotonic()
        made = compile_all(todo, quiet=json)
        if output is not None:
            for (unit, name), data in zip(todo, made, strict=True):
                cache.write(output / f"{unit.name}.{name}.cubin", data)
        found = {
            "cubins": len(made),
            "bytes": sum(map(len, made)),
            "seconds": round(time.monotonic() - begun, 1),
        }
        if json:
            return print_json({"output": str(output or cache.folder()), **found})
        where = output or cache.folder()
        out.print(
            f"{found['cubins']} cubins, {size(found['bytes'])}, {found['seconds']} s, in {where}",
            soft_wrap=True,
        )


@app.command("bundle")
def bundle_command(
    output: Annotated[str, typer.Argument(metavar="OUT", help="A checkpoint folder that zq wrote.")],
    arch: Annotated[str, typer.Option("--arch", help=ARCH)] = "sm_90a",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Put the kernels that a checkpoint needs beside its weights, for machines without a compiler.

    zq kernels bundle smol-w4a8 --arch sm_80,sm_90a

    OUT/kernels holds the cubins, their sources, hashes and a manifest. A bundle that is there is replaced.
    """
    with command(json):
        from zq.kernels import bundle
        from zq.kernels.unit import parse_archs
        from zq.source import resolve

        archs = parse_archs(arch)
        folder = resolve(output, note)
        written = write_bundle(folder, needed(folder), archs, quiet=json)
        if json:
            return print_json({"output": str(folder / bundle.FOLDER), **written})
        out.print(bundle_line(folder, written), soft_wrap=True)


def planned(plan: Plan, archs: tuple[str, ...], quiet: bool) -> list[Unit]:
    """The kernels that the output of a plan will need, compiled into the cache. Raises ZqError."""
    from zq.errors import ZqError
    from zq.kernels import bundle
    from zq.kernels.select import units_for

    schemes = dict.fromkeys(plan.assigned.values())
    units = units_for(schemes, short_dtype(plan.dtype), decoder=not plan.skeleton.arch.encoder)
    if not units:
        raise ZqError(f"--kernels: no kernel of zq computes {', '.join(map(str, schemes))}; drop --kernels")
    compile_all(bundle.pairs(units, archs), quiet)
    return units


def needed(folder: Path) -> list[Unit]:
    """The kernels that the layers of a quantized checkpoint need. Raises ZqError when no kernel serves
    any."""
    from zq.checkpoint.index import main_dtype, read_index
    from zq.cli.inspect import describe
    from zq.errors import ZqError
    from zq.kernels.select import units_for
    from zq.models.find import find_family
    from zq.spec import Scheme

    schemes = describe(folder)["schemes"]
    dtype = short_dtype(main_dtype(read_index(folder), ()))
    units = units_for(map(Scheme.parse, schemes), dtype, decoder=not find_family(folder).encoder)
    if not units:
        what = f"its schemes are {', '.join(schemes)}" if schemes else "it is not quantized"
        raise ZqError(f"{folder} needs no kernels of zq: {what}; see `zq kernels list`")
    return units


def short_dtype(dtype: Any) -> str:
    """torch.bfloat16 -> bf16"""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(dtype), "fp32")


def compile_all(todo: list[tuple[Unit, str]], quiet: bool) -> list[bytes]:
    """Cubins of all pairs, several at a time, with one line each on standard error."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    from zq.kernels import cache, nvrtc

    nvrtc.version()  # a missing compiler is one error, not one of each thread
    show = _progress(len(todo), quiet)

    def one(pair: tuple[Unit, str]) -> bytes:
        data = cache.compiled(*pair)
        show(*pair)
        return data

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(one, pair) for pair in todo]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_bundle(folder: Path, units: list[Unit], archs: tuple[str, ...], quiet: bool) -> dict[str, Any]:
    """Compile and write OUT/kernels; what was written, in numbers."""
    from zq.kernels import bundle

    todo = bundle.pairs(units, archs)
    made = compile_all(todo, quiet)
    bundle.write(folder, todo)
    return {"cubins": len(made), "bytes": sum(map(len, made)), "archs": list(archs)}


def bundle_line(folder: Path, written: dict[str, Any]) -> str:
    where, archs = folder / "kernels", ", ".join(written["archs"])
    return f"{written['cubins']} cubins for {archs}, {size(written['bytes'])}, in {where}"


def _progress(count: int, quiet: bool) -> Callable[[Unit, str], None]:
    begun, done = time.monotonic(), 0

    def show(unit: Unit, arch: str) -> None:
        nonlocal done
        done += 1
        spent = time.monotonic() - begun
        if not quiet:
            left = spent / done * (count - done)
            err.print(
                f"{done}/{count}  {arch:<8}  {unit.name}  [dim]{spent:.1f} s, ETA {left:.0f} s[/]",
                soft_wrap=True,
            )

    return show

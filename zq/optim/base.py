"""What AdamW and SGD share: which state of which parameter is stored how, saving, loading, overriding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.optim import checks, fused
from zq.optim.config import FLOAT, States, states
from zq.optim.saved import document, loaded
from zq.optim.storage import Factored, Full, Quantized, State, fill, new, packed

Given = Mapping[str, Any] | str | Path | None


class StoredOptimizer(torch.optim.Optimizer, ABC):
    """`bits` and `states` can differ between parameter groups, and `bits` between parameters (`override`, or
    the attribute `optim_bits` of a parameter). `state` holds "step" and Full, Quantized or Factored.

    fused: with zq's CUDA kernel where it can (None), never (False), or a ZqError where it cannot (True).
    What torch's options say of how to compute a step (`checks.HOW`) changes nothing, or is refused.
    unfused: why parameters of the last step went without the kernel, and how many.
    """

    names: tuple[str, ...]
    update_name: str  # of the kernel

    def __init__(self, params: Any, defaults: dict[str, Any], fused: bool | None = None) -> None:
        if fused not in (None, True, False):
            raise ZqError(f"fused={fused!r} is not allowed; allowed: None, True, False")
        self._overrides: dict[Tensor, int] = {}
        self._entries: dict[Tensor, fused.Entry] = {}
        self.fused, self.unfused = fused, {}
        optional = {"bits", "states", "maximize", *checks.HOW, *checks.UNDONE}
        self._options = set(defaults) - optional  # what a file must have
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ZqError for options, `bits` or `states` that cannot be."""
        if isinstance(param_group, dict):  # else torch says what is wrong
            group = {**self.defaults, **param_group}
            checks.options(group)
            states(group["bits"], group["states"], self.names)
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("_overrides", "_options", "fused", "unfused")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._entries = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss again, as in torch."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise ZqError(
                "an optimizer step cannot be captured into a CUDA graph, which would repeat the rate and "
                "number of this step; capture forward and backward passes, and call step() after each replay"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [(*each, group) for group in self.param_groups for each in _given(group)]
        todo = [(param, grad, self._state(param, grad, group), group) for param, grad, group in given]
        self.unfused = {}
        entries = [self._entry(*each) for each in todo]
        if todo:
            torch._foreach_add_([state["step"] for _, _, state, _ in todo], 1)  # type: ignore[attr-defined]
        batches: dict[Any, fused.Batch] = {}
        for (param, grad, state, group), entry in zip(todo, entries, strict=True):
            if isinstance(entry, str):
                self.unfused[entry] = self.unfused.get(entry, 0) + 1
                self._entries.pop(param, None)  # the states may come to lie elsewhere
                self.update(param, grad, state, group)
                continue
            number = int(state["step"].item())
            key = (entry.alike, grad.dtype, id(group), number)
            if key not in batches:
                batches[key] = fused.Batch(self.numbers(group, number), [])
            batches[key].entries.append((entry, grad))
        for batch in batches.values():
            fused.run(batch)
        return loss

    @abstractmethod
    def update(self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of one parameter, whose states are there, in torch operations."""

    @abstractmethod
    def numbers(self, group: dict[str, Any], step: int) -> dict[str, float]:
        """What the kernel has to know of a group (Numbers of optim.cu)."""

    def _state(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Of a parameter; zeros at first."""
        checks.gradient(param, grad)
        state = self.state[param]
        state.setdefault("step", torch.zeros(()))
        for name in self.wanted(group):
            if name not in state:  # also where momentum was given later
                state[name] = self._new(param, group, name)
        return state

    def _entry(
        self, param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> fused.Entry | str:
        """For the kernel, or why not. Raises ZqError where there must not be a reason."""
        if self.fused is False:
            return "fused=False"
        kept = tuple([state[name] for name in self.wanted(group)])
        found: fused.Entry | str | None = self._entries.get(param)
        if found is None or not found.holds(param, kept):
            found = fused.entry(self.update_name, param, kept) if kept else "there is no state"
            if not isinstance(found, str):
                self._entries[param] = found
        if not isinstance(found, str):
            found = fused.refused(grad) or found
        if self.fused and isinstance(found, str):
            raise ZqError(f"fused=True is not possible: {found}; give fused=None")
        return found

    def wanted(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the states that a group needs."""
        return self.names

    def generator(self, param: Tensor, group: dict[str, Any], step: int) -> torch.Generator | None:
        """For stochastic rounding: depends on the seed, the parameter's place and the step only."""
        how = self._how(param, group)
        if how.rounding == "nearest":
            return None
        every = chain.from_iterable(g["params"] for g in self.param_groups)
        place = next(i for i, p in enumerate(every) if p is param)
        return torch.Generator(param.device).manual_seed(
            ((how.seed << 20) + place << 32) + step & (1 << 62) - 1
        )

    def override(self, module: nn.Module, name: str, bits: int) -> None:
        """Keep the states of the parameter `name` of `module` in so many bits from now on; states that are
        there already are converted. Raises ZqError when it is none of this optimizer's parameters."""
        states(bits, None, self.names)
        param = getattr(module, name, None)
        groups = [g for g in self.param_groups if any(p is param for p in g["params"])]
        if not groups:
            raise ZqError(
                f"'{name}' of {type(module).__name__} is no parameter of this optimizer; give another name"
            )
        assert isinstance(param, Tensor)
        self._overrides[param] = bits
        self._settle(param, groups[0])

    @property
    def state_bytes(self) -> int:
        """Bytes of all states in memory, scales included, the step counts not."""
        every = chain.from_iterable(state.values() for state in self.state.values())
        return sum(t.nbytes for s in every if not isinstance(s, Tensor) for t in s.tensors().values())

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, text and lists. With 32 bits it is what torch's optimizer of that name gives."""
        saved = super().state_dict()
        saved["state"] = {
            key: {
                name: value if isinstance(value, Tensor) else packed(value) for name, value in state.items()
            }
            for key, state in saved["state"].items()
        }
        for group in saved["param_groups"]:
            del group["bits"], group["states"]
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From any width, zq's or torch's, into the widths of this optimizer: equal ones bit for bit. Raises
        ZqError before anything has changed when what was saved does not fit."""
        document(state_dict, self.param_groups, self._options, type(self).__name__)
        keys = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        places = [(param, group) for group in self.param_groups for param in group["params"]]
        found = {
            param: loaded(param, saved, self.names, self._how(param, group))
            for key, (param, group) in zip(keys, places, strict=True)
            if (saved := state_dict["state"].get(key))
        }
        own = ("bits", "states", *checks.HOW)  # not those of the file; what a file lacks stays, too
        merged = [
            {**group, **saved, **{name: group[name] for name in own if name in group}}
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        super().load_state_dict({"state": {}, "param_groups": merged})
        for group in self.param_groups:
            for param in group["params"]:
                if param in found:
                    self.state[param] = found[param]
                    self._settle(param, group)

    def _bits(self, param: Tensor, group: dict[str, Any]) -> int:
        return self._overrides.get(param) or getattr(param, "optim_bits", None) or group["bits"]

    def _how(self, param: Tensor, group: dict[str, Any]) -> States:
        bits = self._bits(param, group)
        return states(bits, group["states"] if bits == group["bits"] else None, self.names)

    def _new(self, param: Tensor, group: dict[str, Any], name: str) -> State:
        how = self._how(param, group)
        return new(param, FLOAT if param.numel() <= how.threshold else getattr(how, name), how)

    def _settle(self, param: Tensor, group: dict[str, Any]) -> None:
        """Convert the states of a parameter to how they are to be stored."""
        state = self.state.get(param, {})
        for name in self.names:
            if name not in state:
                continue
            target = self._new(param, group, name)
            if target.spec != state[name].spec:
                fill(target, _padded(state[name]), param.numel())
                state[name] = target


def _given(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Parameters with their gradients, which are turned round where the objective is to grow."""
    both = [(param, param.grad) for param in group["params"]]
    grows = group.get("maximize")  # which an older pickle has not
    return [(param, -grad if grows else grad) for param, grad in both if grad is not None]


def _padded(state: State) -> Callable[[int, int], Tensor]:
    """`read` for ranges that begin or end inside a unit of the state."""

    def read(start: int, stop: int) -> Tensor:
        first = start // state.unit * state.unit
        last = -(-stop // state.unit) * state.unit
        count = state.values.numel() if isinstance(state, Full) else _numel(state)
        return state.read(first, min(last, count))[start - first : stop - first]

    return read


def _numel(state: Quantized | Factored) -> int:
    count = 1
    for length in state.shape:
        count *= length
    return count

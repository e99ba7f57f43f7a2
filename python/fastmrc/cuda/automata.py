"""Constraints on the device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastmrc import _C
from fastmrc.cuda.runtime import call_on, current, kernels, stream_of
from fastmrc.encoders.batches import to_device

__all__ = ["DeviceAutomata", "single_automaton"]


class DeviceAutomata:
    """The automata of a batch, laid end to end on the device; equal objects are kept once.

    Parameters
    ----------
    automata
        One per item of the batch, or None.
    device
        Where the kernels will read them.

    Attributes
    ----------
    native
        What the kernels take; None if there is no automaton.
    automaton_of
        int32 [items] on the device, which one belongs to each, -1: none; None if there is no
        automaton.
    all_constrained
        Whether every item has one.
    """

    def __init__(self, automata: Sequence[_C.Automaton | None], device: torch.device) -> None:
        places: dict[int, int] = {}
        distinct: list[_C.Automaton] = []
        numbers = []
        for automaton in automata:
            if automaton is not None and id(automaton) not in places:
                places[id(automaton)] = len(distinct)
                distinct.append(automaton)
            numbers.append(-1 if automaton is None else places[id(automaton)])
        self.all_constrained = -1 not in numbers
        self.native: Any = None
        self.automaton_of: torch.Tensor | None = None
        if not distinct:
            return
        packed = [to_device(array, device) for array in _C.pack_automata(distinct)]
        edge_begin, edge_token, edge_target, final_flags, first_state, first_edge = packed
        with current(device):
            self.native = kernels().Automata(
                states=len(final_flags),
                edges=len(edge_token),
                count=len(distinct),
                edge_begin=edge_begin,
                edge_token=edge_token,
                edge_target=edge_target,
                final_flags=final_flags,
                first_state=first_state,
                first_edge=first_edge,
            )
        self.automaton_of = to_device(np.array(numbers, dtype=np.int32), device)

    @classmethod
    def of(cls, automata: Sequence[_C.Automaton | None], device: torch.device) -> DeviceAutomata:
        """Return those of a batch; one for all items is packed once per device and kept."""
        first = automata[0] if automata else None
        if first is None or any(automaton is not first for automaton in automata):
            return cls(automata, device)
        kept = single_automaton(first, device)
        batch = cls([], device)
        batch.native = kept.native
        batch.automaton_of = torch.zeros(len(automata), dtype=torch.int32, device=device)
        return batch

    def advance(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Follow one token from each state of the first automaton; int32 [n]."""
        states, tokens = _int32("states", states), _int32("tokens", tokens)
        if states.shape != tokens.shape:
            raise ValueError(f"tokens: expected one per state, {len(states)}, got {tokens.numel()}")
        out = torch.empty_like(states)
        with call_on(states.device) as faults:
            self.native.advance(
                n=len(states),
                automaton_of=None,
                states=states,
                tokens=tokens,
                out=out,
                fault=faults.new(states.device, "states"),
                stream=stream_of(states.device),
            )
        return out

    def allowed(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """List the tokens that may follow each state of the first automaton.

        Waits for the device, as the number of tokens is not known before.
        """
        states = _int32("states", states)
        device, stream = states.device, stream_of(states.device)
        counts = torch.empty(len(states), dtype=torch.int64, device=device)
        offsets = torch.zeros(len(states) + 1, dtype=torch.int64, device=device)
        with call_on(states.device) as faults:
            fault = faults.new(device, "states")
            common = {"n": len(states), "automaton_of": None, "states": states, "fault": fault}
            self.native.count_allowed(counts=counts, stream=stream, **common)
            torch.cumsum(counts, 0, out=offsets[1:])
            tokens = torch.empty(int(offsets[-1]), dtype=torch.int32, device=device)
            self.native.write_allowed(
                total=len(tokens), offsets=offsets, tokens=tokens, stream=stream, **common
            )
        return offsets, tokens

    def is_final(self, states: torch.Tensor) -> torch.Tensor:
        """Tell whether a sequence may end in each state of the first automaton; bool [n]."""
        states = _int32("states", states)
        out = torch.empty(len(states), dtype=torch.bool, device=states.device)
        with call_on(states.device) as faults:
            self.native.final_flags(
                n=len(states),
                automaton_of=None,
                states=states,
                out=out,
                fault=faults.new(states.device, "states"),
                stream=stream_of(states.device),
            )
        return out


# By device and object; the automaton is kept, so its number is not given to another.
_kept: dict[tuple[str, int], tuple[_C.Automaton, DeviceAutomata]] = {}
_MOST_KEPT = 16
_lock = threading.Lock()


def single_automaton(automaton: _C.Automaton, device: torch.device) -> DeviceAutomata:
    """Return an automaton on the device; those used last are kept there."""
    key = (str(device), id(automaton))
    with _lock:
        found = _kept.pop(key, None)
        if found is None:
            found = (automaton, DeviceAutomata([automaton], device))
            if device.type == "cuda":  # other streams may read it
                torch.cuda.current_stream(device).synchronize()
            while len(_kept) >= _MOST_KEPT:
                _kept.pop(next(iter(_kept)))
        _kept[key] = found
    return found[1]


def _int32(name: str, values: Any) -> torch.Tensor:
    if values.dtype.is_floating_point or values.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name}: expected 1 dimension, got {values.ndim}")
    result: torch.Tensor = values.to(torch.int32).contiguous()
    return result

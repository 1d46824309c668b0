"""What torch.distributed.checkpoint leaves of a state_dict, and how the rest travels along.

`get_optimizer_state_dict` keeps "state", whose numbers become names of parameters, and "param_groups". What an
optimizer has beside them is its header, of which a copy therefore lies in the state of the first parameter: as the
bytes of its JSON in a tensor, because flattened state_dicts may hold tensors and numbers alone, and of a length that
does not depend on how far training is, because it is read into the tensor that a new optimizer has.

`set_optimizer_state_dict` makes the state of a new optimizer by a step without a closure, whose learning rates and
gradients are all zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from expfam_poco.closures.shards import local
from expfam_poco.errors import CheckpointError

KEY = "header"
PAGE = 4096


def packed(header: Mapping[str, Any], room: int) -> Tensor:
    """A header as bytes, padded with blanks to whole pages.

    Args:
        header: of numbers, strings, lists and dictionaries; tensors are left out.
        room: bytes that it may need in the course of training; the same for every optimizer that is made alike.
    """
    words = json.dumps({key: value for key, value in header.items() if not isinstance(value, Tensor)}).encode()
    size = -(-max(room, len(words)) // PAGE) * PAGE
    return torch.frombuffer(bytearray(words.ljust(size)), dtype=torch.uint8)


def unpacked(words: Any) -> dict[str, Any]:
    """The inverse of `packed`.

    Raises:
        CheckpointError: for what is no header.
    """
    try:
        header = json.loads(bytes(words.cpu().numpy()))
        if not isinstance(header, dict):
            raise TypeError(type(header).__name__)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"state_dict['state']: the header in its first entry is damaged ({type(error).__name__}); use another file."
        ) from None
    return header


def with_header(state_dict: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A state_dict that has lost its header with the one that its states hold."""
    states = state_dict.get("state")
    if key in state_dict or not isinstance(states, Mapping):
        return state_dict
    found = [s[KEY] for s in states.values() if isinstance(s, Mapping) and isinstance(s.get(KEY), Tensor)]
    return {**state_dict, key: unpacked(found[0])} if found else state_dict


def numbered(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state_dict whose parameters have names, in numbers as torch's optimizers have them."""
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(states, Mapping):
        return state_dict
    names = [p for group in groups if isinstance(group, Mapping) for p in group.get("params", ())]
    if not names or not all(isinstance(name, str) for name in names):
        return state_dict
    number = {name: place for place, name in enumerate(names)}
    return {
        **state_dict,
        "state": {number.get(name, name): state for name, state in states.items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }


def only_makes_state(closure: Any, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a step is the one by which torch.distributed.checkpoint makes an optimizer's state."""
    if closure is not None or any(group.get("lr") != 0.0 for group in groups):
        return False
    params = [p for group in groups for p in group["params"] if p.requires_grad]
    return bool(params) and all(p.grad is not None and not bool(local(p.grad).any()) for p in params)

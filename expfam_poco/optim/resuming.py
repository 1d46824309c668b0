"""Checkpoints of an optimizer: its whole state in plain types, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from expfam_poco.family import fields
from expfam_poco.optim import checkpoint
from expfam_poco.optim.base import Shell


class Resuming(Shell):
    """`state_dict` and `load_state_dict` of a `PosteriorCorrected`; mixed into it."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a run continues from, bit for bit, in plain types (`torch.load(weights_only=True)`)."""
        for block in self._blocks:
            self.state.get(block.params[0], {})["drawn"] = block.drawn
        plain: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        plain["state"] = {key: checkpoint.encode_state(value) for key, value in plain["state"].items()}
        plain["param_groups"] = [checkpoint.encode_group(group) for group in plain["param_groups"]]
        plain["poco"] = {
            "format": checkpoint.FORMAT,
            "settings": self._settings(),
            "seed": self.seed,
            "clock": dict(self._clock),
            "meter": self._meter.state(),
            "anchor_hessian": self._anchor.hessian,
        }
        return plain

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. The model's weights are the model's checkpoint's business.

        Raises:
            CheckpointError: if it belongs to another model, family, setting or version; nothing is changed.
        """
        checkpoint.check_header(state_dict.get("poco"), self._settings())
        checkpoint.check_groups(self.param_groups, state_dict.get("param_groups"))
        states = checkpoint.decode_states(self._blocks, self.param_groups, state_dict)
        decoded = checkpoint.decode_groups(self.param_groups, state_dict["param_groups"])
        for group, values in zip(self.param_groups, decoded, strict=True):
            group.update(values)
        self.state.clear()
        for block in self._blocks:
            if block.name in states:
                self.state[block.params[0]] = states[block.name]
                block.forget_weights()
                block.drawn = self._state(block)["drawn"]
        self._anchor.reset()
        header = state_dict["poco"]
        self.seed = header["seed"]
        self._clock = dict(header["clock"])
        self._meter.load(header["meter"])
        self._anchor.hessian = header["anchor_hessian"]

    @torch.no_grad()
    def next_task(self) -> None:
        """Make the present posterior the prior: training goes on with another task's data (as in BayesBiNN §5).

        λ₀ ← λ for every family and parameter, frozen ones too; q stays where it is. Momentum and q_out, which belong to
        the old task, are forgotten.
        `weight_decay` has no further part; ess·∇̃KL now pulls towards the old task's posterior.
        """
        self._trainable()
        for group in self.param_groups:
            blocks = [block for block in self._blocks if block.group is group]
            old = group["prior"]
            known = dict(old) if isinstance(old, dict) else {b.name: old for b in blocks if old is not None}
            for block in blocks:
                own = self.state.get(block.params[0])
                if own:  # a parameter that was always frozen has no posterior, and keeps its prior
                    known[block.name] = fields.map_fields(torch.clone, own["posterior"])
                    own.update(outer=None, refresh=0, in_mega=False, momentum=(), step=0)
            group["prior"] = known
        self._anchor.reset()

    def _settings(self) -> dict[str, Any]:
        return {
            "noise": self.noise,
            "mc_samples": self.mc_samples,
            "anchor": self._anchor.kind,
            "max_grad_norm": self.max_grad_norm,
            "nonfinite": self.nonfinite,
        }

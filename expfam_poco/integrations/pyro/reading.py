"""What a Pyro model's trace says: its latent sites, its log joint at given values, and what must not change.

The log joint is the trace's own, log p(x, θ) = Σ_sites scale · mask · log p(site), so that plates' subsampling
(scale N/B), `poutine.scale`, `mask` and `condition` mean what they mean in SVI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Model = Callable[..., Any]


@dataclass(frozen=True)
class Latent:
    """A latent site as the first trace has it.

    Attributes:
        name: of the site.
        value: where it was initialised, in its own space; of a local site all rows, which begin as the first batch's.
        support: of its distribution.
        event_dim: trailing axes of one draw of its distribution.
        frames: the plates around it, by name.
        plate: of whose rows a batch uses a part, for a local site; None for all others.
        axis: which axis of the value has that plate's rows.
    """

    name: str
    value: Tensor
    support: Any
    event_dim: int
    frames: Mapping[str, Any]
    plate: str | None = None
    axis: int = 0


class Replayed(Messenger):
    """Gives latent sites their values, and plates the subsample that they had before.

    Args:
        values: of the latent sites.
        rows: of the plates whose subsample is known.
    """

    def __init__(self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values, self.rows = values, rows

    def _pyro_sample(self, msg: Any) -> None:
        """A site that is observed keeps its value, and so does a plate to which its rows were given."""
        if msg["is_observed"] or msg["value"] is not None:
            return
        known = self.rows if site_is_subsample(msg) else self.values
        if msg["name"] in known:
            msg["value"], msg["done"] = known[msg["name"]], True


class Unpriced(Messenger):
    """Leaves the densities of some sites out.

    Args:
        names: of the sites.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        """Mask the site."""
        if msg["name"] in self.names:
            msg["mask"] = False


def first_trace(model: Model, init: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A trace of the model with its latent sites where `init` puts them; outer handlers do not see it."""
    with poutine.block(), torch.no_grad():
        return poutine.trace(InitMessenger(init)(model)).get_trace(*args, **kwargs)


def sizes_of(model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
    """How many rows a model takes of its plates with these arguments; {} where it cannot be called with them."""
    try:
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(model).get_trace(*args, **kwargs)
    except Exception:  # a guide may be called without the model's arguments; its plates have all rows then
        return {}
    return {name: len(rows) for name, rows in _rows(trace)}


def latents_of(trace: Any) -> list[Latent]:
    """The latent sites of a trace.

    Raises:
        ValueError: for none, for discrete ones, sequential plates, rows of a subsampled plate, or a whole model that is
            scaled.
    """
    found = [_latent(*each) for each in _samples(trace) if not each[1]["is_observed"] and not is_summed_out(each[1])]
    if not found:
        raise ValueError("model: it has no latent site, so there is no posterior; sample one without obs=.")
    scales = {round(_own_scale(site), 12) for _, site in _samples(trace)}
    if len(scales) == 1 and scales != {1.0}:
        raise ValueError(
            f"model: every site is scaled by {scales.pop():.3g}, as for a mean loss, where the log joint is meant: the "
            "posterior would be too wide; leave poutine.scale out, and let plates scale their subsamples."
        )
    return found


def _latent(name: str, site: Any) -> Latent:
    fn, frames = site["fn"], {frame.name: frame for frame in site["cond_indep_stack"]}
    if getattr(fn, "has_enumerate_support", False) or getattr(fn.support, "is_discrete", False):
        raise ValueError(
            f"site {name!r}: it is discrete, and no gradient reaches it; sum it out, by "
            "pyro.infer.config_enumerate(model) or by a mixture such as dist.MixtureSameFamily, or hide it by "
            "poutine.block and treat it apart."
        )
    if site["mask"] is not None and not bool(torch.as_tensor(site["mask"]).all()):
        raise ValueError(
            f"site {name!r}: some of its entries are masked, so that nothing says where they are; mask the observed "
            "site alone, by poutine.mask (obs_mask= makes a latent site of what is missing)."
        )
    for frame in frames.values():
        if not frame.vectorized:
            raise ValueError(
                f"site {name!r}: the plate {frame.name!r} around it is sequential; use it as a context, "
                f"with pyro.plate({frame.name!r}, …):, so that its rows are one tensor."
            )
    value = site["value"].detach()
    if not value.is_floating_point():
        raise ValueError(f"site {name!r}: its values are {value.dtype}; only real latent sites have posteriors here.")
    parts = [frame for frame in frames.values() if is_part(frame)]
    if not parts:
        return Latent(name, value, fn.support, fn.event_dim, frames)
    if len(parts) > 1:
        raise ValueError(
            f"site {name!r}: it is local to {len(parts)} subsampled plates, {', '.join(f.name for f in parts)}; "
            "subsample one of them."
        )
    (frame,), batch = parts, value.ndim - fn.event_dim
    axis = batch + frame.dim
    rows = torch.arange(frame.full_size, device=value.device) % frame.size
    return Latent(name, value.index_select(axis, rows), fn.support, fn.event_dim, frames, frame.name, axis)


def is_summed_out(site: Any) -> bool:
    """Whether a latent site is discrete and marked, by `config_enumerate`, to be summed over its values."""
    return site["infer"].get("enumerate") == "parallel" and getattr(site["fn"], "has_enumerate_support", False)


def is_part(frame: Any) -> bool:
    """Whether a plate has a part of its rows in this trace."""
    return frame.full_size is not None and frame.full_size != frame.size


def _samples(trace: Any) -> Iterator[tuple[str, Any]]:
    """The sample sites of a trace, without those of plates and of `pyro.deterministic`."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site_is_subsample(site) and not _is_deterministic(site):
            yield name, site


def _is_deterministic(site: Any) -> bool:
    fn = site["fn"]
    while isinstance(fn, dist.MaskedDistribution | torch.distributions.Independent):
        fn = fn.base_dist
    return site["is_observed"] and isinstance(fn, dist.Delta)


def _own_scale(site: Any) -> float:
    """What a site's log density is multiplied with, beside what its plates' subsamples do."""
    scale = float(site["scale"])
    for frame in site["cond_indep_stack"]:
        if is_part(frame):
            scale *= frame.size / frame.full_size
    return scale


class Reader:
    """Reads a model's log joint at values of its latent sites, and holds the model to what it was at first.

    Args:
        trace: the model's first.
        latents: the latent sites of that trace.
    """

    def __init__(self, trace: Any, latents: list[Latent]) -> None:
        self._latents = {latent.name: latent for latent in latents}
        self.sizes = dict(_plates(trace))
        self.rows: dict[str, Tensor] = {}
        self.params: dict[str, Tensor] = {}
        hidden = [site for _, site in _samples(trace) if not site["is_observed"] and is_summed_out(site)]
        frames = [frame for _, site in _samples(trace) for frame in site["cond_indep_stack"] if frame.vectorized]
        deepest = max((-frame.dim for frame in frames), default=0)
        self._summing = TraceEnum_ELBO(max_plate_nesting=deepest) if hidden else None
        self.subsampled = any(is_part(frame) for _, site in _samples(trace) for frame in site["cond_indep_stack"])

    def next_batch(self) -> None:
        """Let plates draw a new subsample at the next evaluation."""
        self.rows = {}

    def log_joint(
        self,
        model: Model,
        values: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        prior: bool,
    ) -> Tensor:
        """log p(x, θ), or log p(x | θ) without the latent sites' own densities, at values of the latent sites.

        Evaluations before the next `next_batch` see one subsample. The model's `pyro.param`s are kept in `params`.
        Discrete sites that are marked for it are summed over, by Pyro's `TraceEnum_ELBO` under an empty guide.

        Raises:
            ValueError: where the model has not the latent sites, or not the plates, that it had at first.
        """
        handled = Replayed(values, self.rows)(model)
        with poutine.block():
            trace = poutine.trace(handled).get_trace(*args, **kwargs)
        self._check(trace)
        self.rows = dict(_rows(trace))
        params: list[tuple[str, Any]] = [
            (name, site["value"]) for name, site in trace.nodes.items() if site["type"] == "param"
        ]
        self.params = {name: value.unconstrained() for name, value in params}
        if self._summing is not None:
            given = poutine.condition(Replayed({}, self.rows)(model), data=dict(values))
            with poutine.block():
                summed = self._summing.differentiable_loss(
                    given if prior else Unpriced(values)(given), lambda *args, **kwargs: None, *args, **kwargs
                )
            return -torch.as_tensor(summed)
        shown = None if prior else (lambda name, site: name not in self._latents)
        total = trace.log_prob_sum(shown) if shown else trace.log_prob_sum()
        if not isinstance(total, Tensor):
            raise ValueError("model: it has no density to speak of; observe something with obs=.")
        return total

    def look(self, model: Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The rows that this batch has of every plate, which evaluations before the next `next_batch` will see."""
        with poutine.block(), torch.no_grad():
            trace = poutine.trace(Replayed({}, self.rows)(model)).get_trace(*args, **kwargs)
        self.rows = {name: torch.as_tensor(rows) for name, rows in _rows(trace)}
        return self.rows

    def forget_sizes(self) -> None:
        """Let the next data have plates of other sizes, where no latent site is in them."""
        self.sizes = {}

    def _check(self, trace: Any) -> None:
        seen = {
            name: site
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
            and not is_summed_out(site)
        }  # fmt: skip
        if seen.keys() != self._latents.keys():
            (name, *_) = sorted(seen.keys() ^ self._latents.keys())
            how = "appears now and did not at first" if name in seen else "was there at first and is missing now"
            raise ValueError(
                f"site {name!r}: it {how}; a posterior is over the same sites at every step: sample it always, and let "
                "the data's density use it where it is needed."
            )
        for name, size in _plates(trace):
            known = self.sizes.setdefault(name, size)
            if known != size:
                raise ValueError(
                    f"plate {name!r}: its size was {known} and is {size} now; a plate's size is that of the whole "
                    f"data: give pyro.plate({name!r}, {max(known, size)}, subsample=rows), or call next_data() for "
                    "new data."
                )
        for name, latent in self._latents.items():
            fn, shape = seen[name]["fn"], latent.value.shape
            now = fn.batch_shape + fn.event_shape
            if latent.plate is not None:
                now = torch.Size([*now[: latent.axis], shape[latent.axis], *now[latent.axis + 1 :]])
            if now != shape:
                raise ValueError(
                    f"site {name!r}: its shape was {tuple(shape)} and is {tuple(now)} now; a posterior is of one shape."
                )


def _rows(trace: Any) -> Iterator[tuple[str, Any]]:
    """The rows that each plate of a trace has drawn, or was given."""
    for name, site in trace.nodes.items():
        if site_is_subsample(site):
            yield name, site["value"]


def _plates(trace: Any) -> Iterator[tuple[str, int]]:
    """The full sizes of the plates of a trace."""
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for frame in site["cond_indep_stack"]:
                yield frame.name, int(frame.size if frame.full_size is None else frame.full_size)

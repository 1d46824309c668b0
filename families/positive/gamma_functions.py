r"""The functions behind Gamma, Beta and Dirichlet weights: Stirling's remainders, and the Gamma quantile.

**Remainders.** log Γ, ψ and ψ′ of a large shape cancel in entropies, divergences and Fisher matrices. What is left is

    S(a) = log Γ(a) − (a − ½) log a + a − ½ log 2π,     log a − ψ(a),     a ψ′(a) − 1

by their asymptotic series; below a = 10 at a + 10, by Γ(a + 1) = a Γ(a). All derivatives are right, too.

**Quantile.** x = a e^z with P(a, x) = u, for a standard Gamma variable of shape a, in float64. Up to a = 19 by Halley's
method on log P, or log(1 − P) above the median: both are concave in z, and three evaluations reach rounding. Above by
the inversion of the uniform asymptotic expansion (Temme, *Asymptotic inversion of incomplete gamma functions*, Math.
Comp. 58, 1992): with ½η² = e^z − 1 − z, sign η = sign z, and the normal quantile n(u)

    η = η₀ + ε₁(η₀)/a + ε₂(η₀)/a² + …,     η₀ = n/√a

where the power series ε_k follow, order by order in 1/a, from the equality of the densities (1/f = (e^z − 1)/η):

    log dη/dη₀ = S(a) + ½ a (η² − η₀²) − log f(η)

**How it moves with the shape.** ∂z/∂a at fixed u is −(∂P/∂a at fixed z)/(density of z). Below 19 that derivative is a
difference quotient of log P of fourth order; at fixed z it varies slowly and nothing cancels. Above, the expansion is
differentiated. (`torch._standard_gamma_grad` is right to 5·10⁻⁴ only; and `torch.special.gammainc` itself only to 10⁻⁹
above a = 20, where it turns to an asymptotic series.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expfam_poco.family.inversion import increasing_root

_SERIES_FROM = 10.0
_RAISED = 10
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156)
_DIGAMMA = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)
_TRIGAMMA = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6)

LARGE = 19.0  # the shape above which the expansion inverts
_TINY = 1e-4  # x below which P is its power series
_ITERATIONS = 3
_STEP = 0.003  # of the difference quotient, relative to the shape

# Coefficients of ε₁ … ε₇, and of z(η).
# fmt: off
_EPSILON = (
    (
        -0.3333333333333333, 0.027777777777777776, 0.0006172839506172839, -0.0010802469135802468,
        0.0002755731922398589, -2.8741263309164543e-05, -6.185087203605722e-06, 3.776373375138807e-06,
        -9.120511014991658e-07, 7.735470535130866e-08, 3.2400053233896885e-08, -1.685720940069024e-08,
        3.931682661516204e-09, -2.8134289510434744e-10, -1.6988818928842894e-10, 8.292306612656927e-11,
        -1.8938909125596537e-11, 1.1892995766295252e-12, 9.11462943955477e-13, -4.3017733238664836e-13,
        9.690998266508106e-14, -5.4885838608443784e-15, -4.995436750189437e-15, 2.3090780873141203e-15,
    ),
    (
        -0.01728395061728395, -0.002700617283950617, 0.002611209092690574, -0.0007520766651425087,
        6.229995427526292e-05, 4.055292003251537e-05, -2.1264630522937184e-05, 4.963238978973187e-06,
        -1.762740701047537e-07, -3.458654060048345e-07, 1.524261435838951e-07, -3.203809272306461e-08,
        1.6623076398775507e-10, 2.5777683426580993e-09, -1.0435073378185946e-09, 2.053658457394389e-10,
        3.4054504319809476e-12, -1.81544299197197e-11, 6.980328316697958e-12, -1.3112911902225533e-12,
        -4.3822526765691545e-14, 1.2411293948420847e-13, -4.6066522222952243e-14,
    ),
    (
        0.004399372917891437, -0.003007782731290962, 0.0007956376423454613, 6.554653913335898e-05,
        -0.00014083659963035565, 5.835799802507499e-05, -1.0458719597698151e-05, -1.767264368629448e-06,
        1.9183236555833138e-06, -6.668385436179321e-07, 9.792656534261617e-08, 2.378280260904135e-08,
        -1.992062806370239e-08, 6.298393690865939e-09, -8.056012713385105e-10, -2.4906049085553655e-10,
        1.8121515967925844e-10, -5.3891425415537434e-11, 6.186811288290343e-12, 2.2949855218139014e-12,
        -1.5252689567315066e-12,
    ),
    (
        0.0017364513249286911, -6.36443186258144e-05, -0.00045808052481112146, 0.00029719735544227286,
        -8.702143139501812e-05, -6.062689845768047e-07, 1.3182157101661426e-05, -6.632500497635966e-06,
        1.5800065030126537e-06, 5.595475256604004e-08, -2.1646379636438505e-07, 9.592365281492863e-08,
        -2.0368598744217368e-08, -1.1692807202632505e-09, 2.7395325562357506e-09, -1.1218427962855448e-09,
        2.2032202509357576e-10,
    ),
    (
        -0.0008240070220417051, 0.0008212874677102286, -0.00034229782941925374, 1.4501997684577718e-05,
        6.745262271876104e-05, -4.360705593959036e-05, 1.3318400710709179e-05, -3.522967172109711e-07,
        -1.826543551480974e-06, 1.011972084183368e-06, -2.714625812667733e-07, 4.173440475362961e-09,
        3.246379095532825e-08, -1.646824633388644e-08, 4.087667836584576e-09,
    ),
    (
        -0.0006422136797865241, 3.4207147448548305e-05, 0.0002570019139209397, -0.00020643274407945573,
        7.62288235365189e-05, -3.069193902125162e-06, -1.3459186872901647e-05, 8.571852113906396e-06,
        -2.6287599644786936e-06, 9.112880888089398e-08, 3.5169204887489674e-07, -2.0130883545011035e-07,
    ),
    (
        0.0005116722749483351, -0.0006015675990857899, 0.00029137922032335947, -1.1503656137089714e-05,
        -7.930254608691933e-05, 5.800876270463477e-05, -2.0112302555999663e-05,
    ),
)
_LOG_RATIO = (
    1.0, -0.16666666666666666, 0.027777777777777776, -0.003703703703703704, 0.0002314814814814815,
    5.878894767783657e-05, -2.553644914756026e-05, 4.899078973153047e-06, -2.428276122977769e-07,
    -1.85406221071516e-07, 7.542464855411896e-08, -1.47216272806884e-08, 5.159887341078076e-10, 7.32986413160022e-10,
    -2.921357345635569e-10, 5.717312238897994e-11, -1.5008349408791911e-12, -3.239317851416903e-12,
    1.2822077905614429e-12, -2.513834640057088e-13, 5.2401866818838735e-15, 1.5326196647277207e-14,
    -6.053864010513748e-15, 1.1889539086269768e-15,
)
# fmt: on


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c₀ + c₁x + c₂x² + … by Horner's rule.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import polynomial
        >>> polynomial(torch.tensor(2.0), (1.0, 0.0, 3.0))
        tensor(13.)
    """
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


class _Split(NamedTuple):
    """Whether a shape is large; the shape, or 1 where it is large; and the shape raised by 10 where it is not."""

    large: Tensor
    small: Tensor
    raised: Tensor


def _split(shape: Tensor) -> _Split:
    large = shape > _SERIES_FROM
    return _Split(large, torch.where(large, 1.0, shape), torch.where(large, shape, shape + _RAISED))


def _upwards(a: Tensor) -> Tensor:
    """a, a + 1, … a + 9 along a last axis."""
    return a.unsqueeze(-1) + torch.arange(_RAISED, dtype=a.dtype, device=a.device)


def _stirling(a: Tensor) -> Tensor:
    """(a − ½) log a − a + ½ log 2π."""
    return (a - 0.5) * a.log() - a + 0.5 * math.log(2.0 * math.pi)


def log_gamma(shape: Tensor) -> Tensor:
    """log Γ(a), whose derivatives of any order are right to rounding in float64 (ψ′ of torch is right to 10⁻⁹ only).

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import log_gamma
        >>> log_gamma(torch.tensor([0.5, 4.0], dtype=torch.float64))
        tensor([0.5724, 1.7918], dtype=torch.float64)
    """
    large, a, x = _split(shape)
    rising = _upwards(a).log().sum(-1)  # log a (a + 1) … (a + 9)
    smooth = _stirling(x) + polynomial(x**-2, _STIRLING) / x - torch.where(large, 0.0, rising)
    return torch.lgamma(shape.detach()) + from_zero(smooth)  # the value of torch is the more exact one


def stirling_remainder(shape: Tensor) -> Tensor:
    """S(a) = log Γ(a) − (a − ½) log a + a − ½ log 2π, about 1/12a; float64 for full accuracy.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import stirling_remainder
        >>> stirling_remainder(torch.tensor([1.0, 1e6], dtype=torch.float64))
        tensor([8.1061e-02, 8.3333e-08], dtype=torch.float64)
    """
    large, a, x = _split(shape)
    return torch.where(large, polynomial(x**-2, _STIRLING) / x, log_gamma(a) - _stirling(a))


def log_less_digamma(shape: Tensor) -> Tensor:
    """log a − ψ(a) > 0, about 1/2a; float64 for full accuracy.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import log_less_digamma
        >>> log_less_digamma(torch.tensor([1.0, 1e6], dtype=torch.float64))
        tensor([5.7722e-01, 5.0000e-07], dtype=torch.float64)
    """
    large, a, x = _split(shape)
    series = 0.5 / x + polynomial(x**-2, _DIGAMMA) / (x * x)
    raising = _upwards(a).reciprocal().sum(-1) - torch.log1p(_RAISED / a)
    return series + torch.where(large, 0.0, raising)


def digamma(shape: Tensor) -> Tensor:
    """ψ(a), in the dtype of a, with the derivatives of `log_gamma`.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import digamma
        >>> digamma(torch.tensor(1.0))
        tensor(-0.5772)
    """
    a = shape.double()
    return (a.log() - log_less_digamma(a)).to(shape.dtype)


def log_gamma_fall(shape: Tensor, rest: Tensor) -> Tensor:
    r"""log Γ(a) − log Γ(a + r) without cancellation where r is small beside a; float64 for full accuracy.

    With x = a for large a, else a + 10, and ℓ = log(1 + r/x), by Stirling's series with coefficients c_k

        −(x − ½) ℓ − r log(x + r) + r + Σ_k c_k x^{−(2k+1)} (1 − e^{−(2k+1) ℓ})   [+ Σ_{j<10} log(1 + r/(a + j))]

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import log_gamma_fall
        >>> log_gamma_fall(torch.tensor(3.0), torch.tensor(2.0))  # log 2!/4!
        tensor(-2.4849)
    """
    large, a, x = _split(shape)
    ratio = torch.log1p(rest / x)
    total = rest - (x - 0.5) * ratio - rest * (x + rest).log()
    for number, coefficient in enumerate(_STIRLING):
        power = 2 * number + 1
        total = total - coefficient * x**-power * torch.expm1(-power * ratio)
    return total + torch.where(large, 0.0, torch.log1p(rest.unsqueeze(-1) / _upwards(a)).sum(-1))


def digamma_fall(shape: Tensor, rest: Tensor) -> Tensor:
    r"""ψ(a) − ψ(a + r) < 0 without cancellation where r is small beside a; float64 for full accuracy.

    With x and ℓ as in `log_gamma_fall`, and the coefficients d_k of ψ(x) = log x − 1/2x − Σ_k d_k x^{−2k},

        −ℓ − (1 − e^{−ℓ})/2x − Σ_k d_k x^{−2k} (1 − e^{−2kℓ})   [− Σ_{j<10} r/((a + j)(a + j + r))]

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import digamma_fall
        >>> round(digamma_fall(torch.tensor(1.0), torch.tensor(1.0)).item(), 6)
        -1.0
    """
    large, a, x = _split(shape)
    ratio = torch.log1p(rest / x)
    total = 0.5 * torch.expm1(-ratio) / x - ratio
    for number, coefficient in enumerate(_DIGAMMA):
        power = 2 * (number + 1)
        total = total + coefficient * x**-power * torch.expm1(-power * ratio)
    up, r = _upwards(a), rest.unsqueeze(-1)
    return total - torch.where(large, 0.0, (r / (up * (up + r))).sum(-1))


def trigamma_excess(shape: Tensor) -> Tensor:
    """a ψ′(a) − 1 > 0, about 1/2a; float64 for full accuracy.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import trigamma_excess
        >>> trigamma_excess(torch.tensor([1.0, 1e6], dtype=torch.float64))
        tensor([6.4493e-01, 5.0000e-07], dtype=torch.float64)
    """
    large, a, x = _split(shape)
    series = 0.5 / x + polynomial(x**-2, _TRIGAMMA) / (x * x)  # x ψ′(x) − 1
    raising = (_upwards(a) ** -2).sum(-1)
    return torch.where(large, series, a * (raising + (1.0 + series) / x) - 1.0)


def standard_entropy(shape: Tensor) -> Tensor:
    """The entropy of a Gamma variable of shape a and rate 1: ½ log 2πa + S(a) + (a − 1)(log a − ψ(a)).

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import standard_entropy
        >>> standard_entropy(torch.tensor(1.0))
        tensor(1.)
    """
    return 0.5 * (2.0 * math.pi * shape).log() + stirling_remainder(shape) + (shape - 1.0) * log_less_digamma(shape)


def exp_excess(x: Tensor) -> Tensor:
    """e^x − 1 − x ≥ 0.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import exp_excess
        >>> exp_excess(torch.tensor(1.0))
        tensor(0.7183)
    """
    return torch.expm1(x) - x


def shape_divergence(shape: Tensor, prior: Tensor) -> Tensor:
    """What two shapes contribute to a divergence beside their means: the Bregman divergence of log Γ(a) − a log a + a.

    With log Γ for φ, D_φ(a₀, a) = φ(a₀) − φ(a) − φ′(a)(a₀ − a), it is D_{log Γ} less that of a log a − a.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import shape_divergence
        >>> shape_divergence(torch.tensor(2.0), torch.tensor(2.0))
        tensor(0.)
    """
    rest = stirling_remainder(prior) - stirling_remainder(shape)
    slope = log_less_digamma(shape) - 0.5 / shape
    return 0.5 * exp_excess(prior.log() - shape.log()) + rest + (prior - shape) * slope


class Draw(NamedTuple):
    """Standard Gamma draws of shape a as z = log(x/a), and ∂z/∂a at fixed noise (None if not asked for); float64.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import standard_draw
        >>> draw = standard_draw(torch.tensor([1.0]), torch.tensor([0.5]), slope=True)  # −log ½ = 0.6931
        >>> draw.ratio.exp()
        tensor([0.6931], dtype=torch.float64)
    """

    ratio: Tensor
    slope: Tensor | None


def standard_draw(shape: Tensor, uniform: Tensor, *, slope: bool = False) -> Draw:
    """The quantile of a standard Gamma variable, by logarithms.

    Args:
        shape: a > 0, broadcast against `uniform`; it is taken as a constant.
        uniform: u in (0, 1).
        slope: whether ∂z/∂a is wanted, too.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import standard_draw
        >>> draw = standard_draw(torch.tensor([3.0]), torch.tensor([0.9]))
        >>> 3.0 * draw.ratio.exp()  # scipy.stats.gamma.ppf(0.9, 3)
        tensor([5.3223], dtype=torch.float64)
    """
    a, u = torch.broadcast_tensors(shape.detach().double(), uniform.detach().double())
    find = torch.ops.expfam_poco.gamma_draw if torch.compiler.is_compiling() else _draw
    ratio, moved = find(a, u, slope)
    return Draw(ratio, moved if slope else None)


def _draw(a: Tensor, u: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
    """z and ∂z/∂a (empty if not wanted)."""
    large = a > LARGE
    small, small_slope = _by_root(torch.where(large, 1.0, a), torch.where(large, 0.5, u), ~large, slope)
    big, big_slope = _by_expansion(torch.where(large, a, LARGE), u, slope)
    ratio = torch.where(large, big, small)
    if small_slope is None or big_slope is None:
        return ratio, torch.empty_like(ratio)
    return ratio, torch.where(large, big_slope, small_slope)


# To a compiler the quantile is one opaque operator: its hundreds of operations would take minutes to compile.
_SCHEMA = "(Tensor a, Tensor u, bool slope) -> (Tensor, Tensor)"
_opaque = torch.library.custom_op("expfam_poco::gamma_draw", _draw, mutates_args=(), schema=_SCHEMA)


@_opaque.register_fake
def _(a: Tensor, u: Tensor, slope: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(a)


def _normal_quantile(u: Tensor) -> Tensor:
    """n(u), accurate in both tails."""
    below = u <= 0.5
    n = torch.special.ndtri(torch.where(below, u, 1.0 - u))
    return torch.where(below, n, -n)


# ---- large shapes -----------------------------------------------------------------------------------------


def _by_expansion(a: Tensor, u: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """z, and ∂z/∂a = f(η) dη/da."""
    start = _normal_quantile(u) * a.rsqrt()
    terms = [polynomial(start, coefficients) for coefficients in _EPSILON]
    inverse = 1.0 / a
    shift = torch.zeros_like(a)  # a (η − η₀)
    for term in reversed(terms):
        shift = shift * inverse + term
    eta = start + shift * inverse
    z = eta * polynomial(eta, _LOG_RATIO)
    if not slope:
        return z, None
    moved = torch.zeros_like(a)  # −a² ∂η/∂a at fixed η₀
    for order in range(len(terms), 0, -1):
        moved = moved * inverse + order * terms[order - 1]
    flat = z.abs() < 1e-9
    f = torch.where(flat, 1.0, eta / torch.where(flat, 1.0, torch.expm1(z)))
    along = torch.exp(stirling_remainder(a) + shift * (start + 0.5 * shift * inverse))  # f(η) dη/dη₀
    return z, -inverse * (0.5 * start * along + f * moved * inverse)


# ---- other shapes -----------------------------------------------------------------------------------------


def _by_root(a: Tensor, u: Tensor, wanted: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """z by Halley's method, and ∂z/∂a by a difference quotient; entries that are not wanted cost next to nothing."""
    log_a, log_u, log_v = a.log(), u.log(), torch.log1p(-u)
    # P(a, x) ≤ x^a / Γ(a+1) bounds x from below, the tail of a sub-gamma variable from above (Boucheron et al. 2013).
    low = (log_u + torch.lgamma(a + 1.0)) / a - log_a
    high = torch.log1p((-log_v + torch.sqrt(-2.0 * log_v * a)) / a)
    below = (u <= 0.5) | (low + log_a < -15.0)
    tail = torch.where(below, log_u, log_v)
    sign = torch.where(below, 1.0, -1.0)
    scale = 0.5 * (a / (2.0 * math.pi)).log() - stirling_remainder(a)

    def excess(z: Tensor) -> tuple[Tensor, Tensor]:
        """± (log tail − its target), and the slope that makes a Newton step one of Halley's."""
        value = _log_tail(a, z, below, wanted)
        growth = torch.expm1(z)
        hazard = torch.exp(scale - a * (growth - z) - value)
        difference = sign * (value - tail)
        bend = difference * (a * growth + sign * hazard) / (2.0 * hazard)
        return difference, hazard * (1.0 + bend).clamp(0.5, 2.0)

    z = increasing_root(excess, _start(a, u, log_v, low), low, high, iterations=_ITERATIONS)
    if not slope:
        return z, None
    tails = {k: _log_tail(a * (1.0 + k * _STEP), z, below, wanted) for k in (-2, -1, 1, 2)}
    rise = (8.0 * (tails[1] - tails[-1]) - (tails[2] - tails[-2])) / (12.0 * _STEP * a)
    return z, -sign * rise * torch.exp(tail - scale + a * (torch.expm1(z) - z))


def _log_tail(a: Tensor, z: Tensor, below: Tensor, wanted: Tensor) -> Tensor:
    """log P(a, a e^z), or log(1 − P) where not `below`; 0 is given to the function that is not looked at."""
    x = a * z.exp()
    tiny = x < _TINY
    lower = torch.special.gammainc(a, torch.where(below & wanted & ~tiny, x, 0.0)).log()
    upper = torch.special.gammaincc(a, torch.where(below | ~wanted, 0.0, x)).log()
    bend = a * x * (-1.0 / (a + 1.0) + x * (0.5 / (a + 2.0) - x / (6.0 * (a + 3.0))))
    series = a * (z + a.log()) - torch.lgamma(a + 1.0) + torch.log1p(torch.where(tiny, bend, 0.0))
    return torch.where(below, torch.where(tiny, series, lower), upper)


def _start(a: Tensor, u: Tensor, log_v: Tensor, low: Tensor) -> Tensor:
    """A first guess of z: Wilson–Hilferty from a = 1 on, below it the power series or the exponential tail."""
    root = 1.0 - 1.0 / (9.0 * a) + _normal_quantile(u) / (3.0 * a.sqrt())
    cubed = 3.0 * root.clamp_min(0.1).log()
    depth = -(log_v + torch.lgamma(a + 1.0) - a.log())  # −log((1 − u) Γ(a))
    far = depth.clamp_min(1.5)
    tail = torch.where(depth > 1.5, (far - (1.0 - a) * far.log()).log() - a.log(), low)
    return torch.maximum(low, torch.where(a < 1.0, tail, torch.where(root > 0.1, cubed, low)))


def following(value: Tensor, change: Tensor) -> Tensor:
    """`value` with the derivative of value · change, where change is 0: d log value = d change.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import following
        >>> scale = torch.tensor(2.0, requires_grad=True)  # value = 3 · scale
        >>> torch.autograd.grad(following(torch.tensor(6.0), scale.log() - scale.log().detach()), scale)[0]
        tensor(3.)
    """
    return value.detach() * (1.0 + change)


def from_zero(value: Tensor) -> Tensor:
    """0, with the derivative of `value`.

    Example:
        >>> import torch
        >>> from expfam_poco.families.positive.gamma_functions import from_zero
        >>> from_zero(torch.tensor(3.0))
        tensor(0.)
    """
    return value - value.detach()

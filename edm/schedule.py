"""Noise schedules sigma(t), scalings s(t) and time discretisations (the first three rows of the paper's Table 1).

At time t, an image y has become s(t) (y + n) with noise n of standard deviation sigma(t).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Function = Callable[[torch.Tensor], torch.Tensor | float]


class Schedule:
    """sigma(t) and s(t), with derivatives by automatic differentiation.

    Args:
        sigma: the noise level, rising with t from 0 or a little more, made of arithmetic and PyTorch functions, such as
            `lambda t: torch.tan(t)`. It need not be defined for all t.
        s: the scaling, above 0 at all times, 0 included; 1 by default.
        sigma_inverse: t where the noise level is sigma; found by bisection where it is not given.

    Times and noise levels go in and out as Python numbers; in between the functions see a float64 scalar.
    """

    def __init__(self, sigma: Function, s: Function = lambda t: 1.0, sigma_inverse: Function | None = None):
        self.functions = sigma, s
        self.sigma_inverse = sigma_inverse

    def sigma(self, t: float) -> float:
        """The noise level at time t."""
        return float(self.functions[0](torch.tensor(t, dtype=torch.float64)))

    def s(self, t: float) -> float:
        """The scaling at time t."""
        return float(self.functions[1](torch.tensor(t, dtype=torch.float64)))

    def derivatives(self, t: float) -> tuple[float, float]:
        """sigma'(t) and s'(t).

        Raises:
            TypeError: a function leaves PyTorch on the way (math.sqrt, say), so that it cannot be differentiated.
            ValueError: sigma(t) does not rise.
        """
        dsigma, ds = (derivative(function, t) for function in self.functions)
        if not dsigma > 0:
            raise ValueError(f"sigma(t) must rise with t; at {t:g} its derivative is {dsigma:g}")
        return dsigma, ds

    def t(self, sigma: float) -> float:
        """The time at which the noise level is sigma. sigma(t) = 0 has t = 0, or t = -inf if sigma(0) is above 0.

        Raises:
            ValueError: sigma(t) has no such value.
        """
        if sigma == 0:
            return 0.0 if self.sigma(0.0) == 0 else -math.inf
        if self.sigma_inverse is None:
            return bisect(self.sigma, sigma)
        t = float(self.sigma_inverse(torch.tensor(sigma, dtype=torch.float64)))
        if not math.isfinite(t):
            raise ValueError(f"the schedule has no time at which the noise level is {sigma:g}")
        return t


class Time(torch.Tensor):
    """A tensor that refuses to become a number, since a number has no derivative."""

    def refuse(self, *args, **kwargs):
        raise TypeError("sigma(t) and s(t) cannot be differentiated through Python's numbers; use torch.sqrt for math.sqrt")

    __float__ = __int__ = __array__ = item = tolist = numpy = detach = refuse


def derivative(function: Function, t: float) -> float:
    """The derivative of a function of a scalar at t; 0 if it does not depend on t."""
    with torch.inference_mode(False), torch.enable_grad():
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        value = function(time.as_subclass(Time))
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return 0.0
        return float(torch.autograd.grad(value.as_subclass(torch.Tensor), time)[0])


def bisect(function: Callable[[float], float], target: float) -> float:
    """t with function(t) = target, to the last bit, for a function that rises as far as it is defined.

    Raises:
        ValueError: there is none.
    """
    low, high, reach = 0.0, 2.0**-30, 2.0**1000

    def beyond(t: float) -> bool:
        """Whether t is past the target; to have fallen, or to be no number, is to have left the function's domain."""
        return not function(low) <= function(t) < target

    while function(low) > target and low > -reach:
        low, high = 2 * low - 1, low
    while not beyond(high) and high < reach:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if beyond(middle) else (middle, high)
    if not math.isclose(function(high), target, rel_tol=1e-6):
        raise ValueError(f"no time was found at which the noise level is {target:g}: sigma(t) must rise through it")
    return high


@dataclass(frozen=True)
class VP:
    """The VP schedule sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), 0 <= t <= 1, for tensors of any shape."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise level at time t."""
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def inverse(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time t, the positive root of beta_d t^2 / 2 + beta_min t = ln(1 + sigma^2)."""
        log = torch.log1p(sigma**2)
        # The usual formula would lose digits as the difference of near numbers.
        return 2 * log / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * log).sqrt())

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> "VP":
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max.

        Raises:
            ValueError: it would not rise all the way.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        beta_min = high - beta_d / 2
        if not 0 < sigma_min < sigma_max or min(beta_min + beta_d * epsilon_s, beta_min + beta_d) <= 0:
            raise ValueError(f"no VP schedule rises from {sigma_min:g} to {sigma_max:g}; lower sigma_min, or raise sigma_max")
        return cls(beta_d, beta_min)


def linear(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """EDM's and DDIM's sigma(t) = t, and its inverse."""
    return (lambda t: t), (lambda sigma: sigma)


def ve(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """VE's sigma(t) = sqrt(t), and its inverse."""
    return torch.sqrt, torch.square


def vp(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """VP's sigma(t), with the betas that give it this range, and its inverse."""
    schedule = VP.between(sigma_min, sigma_max)
    return schedule.sigma, schedule.inverse


SCHEDULES = {"linear": linear, "ve": ve, "vp": vp}


def unscaled(sigma: Function) -> Function:
    """s(t) = 1."""
    return lambda t: 1.0


def vp_scaling(sigma: Function) -> Function:
    """VP's s(t) = 1 / sqrt(1 + sigma(t)^2), under which images and noise keep unit variance together."""
    return lambda t: (1 + sigma(t) ** 2) ** -0.5


SCALINGS = {"none": unscaled, "vp": vp_scaling}

LINEAR = Schedule(lambda t: t, sigma_inverse=lambda sigma: sigma)  # with s(t) = 1: EDM's


@functools.cache
def iddpm_levels(
    M: int = 1000,
    C_1: float = 0.001,
    C_2: float = 0.008,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Improved DDPM's noise levels u_0 > ... > u_M = 0 (Table 1, iDDPM column): (M + 1,)."""
    alpha_bar = torch.sin(math.pi / 2 * torch.arange(M + 1, dtype=torch.float64) / (M * (C_2 + 1))).square().tolist()
    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], C_1) - 1))
    return torch.tensor(u[::-1], dtype=dtype, device=device)


def fractions(num_steps: int, whole: int = 1) -> torch.Tensor:
    """whole i / (N - 1) for i = 0 .. N - 1; a single 0 for N = 1."""
    return torch.arange(num_steps, dtype=torch.float64) * whole / max(num_steps - 1, 1)


def then_zero(sigma: torch.Tensor) -> torch.Tensor:
    """The noise levels, and 0 after them."""
    return torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])


def edm_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """EDM's noise levels (Eq. 5): sigma_0 = sigma_max > ... > sigma_{N-1} = sigma_min, then sigma_N = 0.

    Args:
        num_steps: N, at least 1 (a single step goes from sigma_max to 0).
        sigma_min, sigma_max: the range of noise levels, 0 < sigma_min < sigma_max.
        rho: how far the steps crowd towards sigma_min; 1 is uniform.

    Returns:
        (num_steps + 1,) in float64, on the CPU; so do the other discretisations.
    """
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    fraction = fractions(num_steps)
    return then_zero(((1 - fraction) * ends[0] + fraction * ends[1]) ** rho)


def vp_steps(num_steps: int, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> torch.Tensor:
    """VP's: the noise levels at times evenly spaced from 1 to epsilon_s, under the VP schedule with this range."""
    t = 1 + fractions(num_steps) * (epsilon_s - 1)
    return then_zero(VP.between(sigma_min, sigma_max, epsilon_s).sigma(t))


def ve_steps(num_steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> torch.Tensor:
    """VE's: noise levels in geometric progression (sigma^2 is t)."""
    return then_zero(sigma_max * (sigma_min / sigma_max) ** fractions(num_steps))


def iddpm_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 81.0, **constants: float) -> torch.Tensor:
    """iDDPM's: of the levels u_j inside the range, num_steps evenly spaced ones (`constants` as in `iddpm_levels`).

    Raises:
        ValueError: there are fewer of them.
    """
    u = iddpm_levels(**constants)
    u = u[(u >= sigma_min) & (u <= sigma_max)]
    if num_steps > len(u):
        raise ValueError(f"iDDPM has {len(u)} noise levels from {sigma_min:g} to {sigma_max:g}, too few for {num_steps} steps")
    return then_zero(u[fractions(num_steps, whole=len(u) - 1).round().long()])


DISCRETIZATIONS = {"edm": edm_steps, "vp": vp_steps, "ve": ve_steps, "iddpm": iddpm_steps}

RANGES = {  # of noise levels, each discretisation's own
    "edm": (0.002, 80.0),
    "vp": tuple(VP().sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)).tolist()),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
}


def table_1(
    num_steps: int,
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    supported: tuple[float, float] = (0.0, math.inf),
) -> tuple[torch.Tensor, Schedule]:
    """The sampling choices of Table 1 by their names.

    Args:
        num_steps: N, at least 1.
        discretization, schedule, scaling: names in `DISCRETIZATIONS`, `SCHEDULES` and `SCALINGS`.
        sigma_min, sigma_max: the range of noise levels; None is the discretisation's own.
        rho: of EDM's discretisation.
        supported: the noise levels that the denoiser knows; the range is clamped to them.

    Returns:
        The noise levels (num_steps + 1,), falling, the last one 0; and sigma(t) with s(t).

    Raises:
        ValueError: the range is empty, or the choices do not fit it.
    """
    low, high = RANGES[discretization]
    low = max(low if sigma_min is None else sigma_min, supported[0])
    high = min(high if sigma_max is None else sigma_max, supported[1])
    if not low < high:
        known = f"the denoiser knows {supported[0]:g} to {supported[1]:g}"
        raise ValueError(f"sigma_min {low:g} must be below sigma_max {high:g}; {known}")
    options = {"rho": rho} if discretization == "edm" else {}
    sigma_steps = DISCRETIZATIONS[discretization](num_steps, low, high, **options)
    sigma, sigma_inverse = SCHEDULES[schedule](low, high)
    return sigma_steps, Schedule(sigma, SCALINGS[scaling](sigma), sigma_inverse)

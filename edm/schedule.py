"""Noise schedules sigma(t), scalings s(t) and time steps t_i: the sampling rows of the paper's Table 1.

At time t, a clean image y has become s(t) (y + n), where n is Gaussian noise of standard deviation sigma(t).
The formulas come first; `Schedule`, which differentiates and inverts any sigma(t), comes last.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

Function = Callable[[torch.Tensor], torch.Tensor | float]  # of a time t, or of a noise level


# sigma(t), each with its inverse, and s(t)


def linear(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """Return sigma(t) = t, as EDM and DDIM have it, and its inverse."""
    return (lambda t: t), (lambda sigma: sigma)


def ve(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """Return VE's sigma(t) = sqrt(t) and its inverse."""
    return torch.sqrt, torch.square


def vp(sigma_min: float, sigma_max: float) -> tuple[Function, Function]:
    """Return VP's sigma(t), with beta_d and beta_min solved for this range, and its inverse."""
    schedule = VP.between(sigma_min, sigma_max)
    return schedule.sigma, schedule.inverse


@dataclass(frozen=True)
class VP:
    """VP's schedule sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), 0 <= t <= 1, for tensors of any shape."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """Return the noise level at time t."""
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def inverse(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the time t: the positive root of beta_d t^2 / 2 + beta_min t = ln(1 + sigma^2)."""
        log = torch.log1p(sigma**2)
        # The textbook formula subtracts two nearly equal numbers here, and loses digits.
        return 2 * log / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * log).sqrt())

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> "VP":
        """Return the schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max.

        Raises:
            ValueError: that schedule would not rise everywhere between the two.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        beta_min = high - beta_d / 2
        if not 0 < sigma_min < sigma_max or min(beta_min + beta_d * epsilon_s, beta_min + beta_d) <= 0:
            raise ValueError(f"no VP schedule rises from {sigma_min:g} to {sigma_max:g}; lower sigma_min, or raise sigma_max")
        return cls(beta_d, beta_min)


SCHEDULES = {"linear": linear, "ve": ve, "vp": vp}


def unscaled(sigma: Function) -> Function:
    """Return s(t) = 1, whatever sigma(t)."""
    return lambda t: 1.0


def vp_scaling(sigma: Function) -> Function:
    """Return VP's s(t) = 1 / sqrt(1 + sigma(t)^2), which keeps the variance at 1 for data of variance 1."""
    return lambda t: (1 + sigma(t) ** 2) ** -0.5


SCALINGS = {"none": unscaled, "vp": vp_scaling}


# The time steps t_i, given by their noise levels sigma(t_i); `pad(..., (0, 1))` appends the last one, 0


def edm_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """Return EDM's noise levels (Eq. 5): sigma_max = sigma_0 > ... > sigma_{N-1} = sigma_min, then sigma_N = 0.

    Args:
        num_steps: N, at least 1. A single step goes from sigma_max to 0.
        sigma_min, sigma_max: the range of noise levels, 0 < sigma_min < sigma_max.
        rho: 1 spaces the levels evenly; the larger rho, the more of them lie near sigma_min.

    Returns:
        (num_steps + 1,) in float64, on the CPU. All discretizations return this form.
    """
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    fraction = evenly_spaced(num_steps)  # i / (N - 1)
    return pad(((1 - fraction) * first + fraction * last) ** rho, (0, 1))  # Eq. 5, arranged so that both ends are exact


def vp_steps(num_steps: int, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> torch.Tensor:
    """Return VP's noise levels: those at times evenly spaced from 1 to epsilon_s."""
    t = 1 + evenly_spaced(num_steps) * (epsilon_s - 1)
    return pad(VP.between(sigma_min, sigma_max, epsilon_s).sigma(t), (0, 1))


def ve_steps(num_steps: int, sigma_min: float = 0.02, sigma_max: float = 100.0) -> torch.Tensor:
    """Return VE's noise levels: a geometric progression from sigma_max to sigma_min."""
    return pad(sigma_max * (sigma_min / sigma_max) ** evenly_spaced(num_steps), (0, 1))


def iddpm_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 81.0) -> torch.Tensor:
    """Return iDDPM's noise levels: evenly spaced ones of the u_j between sigma_min and sigma_max.

    Raises:
        ValueError: there are fewer than num_steps of them.
    """
    u = iddpm_levels()
    u = u[(u >= sigma_min) & (u <= sigma_max)]
    if num_steps > len(u):
        raise ValueError(f"iDDPM has {len(u)} noise levels from {sigma_min:g} to {sigma_max:g}, too few for {num_steps} steps")
    return pad(u[evenly_spaced(num_steps, last=len(u) - 1).round().long()], (0, 1))


@functools.cache
def iddpm_levels(M: int = 1000, C_1: float = 0.001, C_2: float = 0.008) -> torch.Tensor:
    """Return Improved DDPM's noise levels u_0 > ... > u_M = 0: (M + 1,) in float64.

    u_{j-1}^2 + 1 = (u_j^2 + 1) / max(alpha_bar_{j-1} / alpha_bar_j, C_1), where alpha_bar_j = sin^2(pi/2 j / (M (C_2 + 1))).
    The index j = 0 .. M runs from noise to images, against the timesteps of `ddpm.Chain`.
    """
    j = torch.arange(M + 1, dtype=torch.float64)
    alpha_bar = torch.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2
    growth = 1 / (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=C_1)
    return pad((growth.flip(0).cumprod(0).flip(0) - 1).sqrt(), (0, 1))


def evenly_spaced(number: int, last: int = 1) -> torch.Tensor:
    """Return `number` values evenly spaced from 0 to `last`: i last / (number - 1). A single value is 0."""
    return torch.arange(number, dtype=torch.float64) * last / max(number - 1, 1)


DISCRETIZATIONS = {"edm": edm_steps, "vp": vp_steps, "ve": ve_steps, "iddpm": iddpm_steps}

RANGES = {  # (sigma_min, sigma_max) of each discretization in Table 1
    "edm": (0.002, 80.0),
    "vp": tuple(VP().sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)).tolist()),
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
}


class NoiseLevels:
    """The noise levels of a network that was trained at some levels only, such as those of a DDPM chain.

    Args:
        sigma: (M,), rising, in float64 on the CPU.
    """

    def __init__(self, sigma: torch.Tensor):
        self.sigma = sigma
        self.copies: dict[tuple, torch.Tensor] = {}

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Return the levels (M,) in the precision and on the device of x."""
        key = x.dtype, x.device
        if key not in self.copies:
            self.copies[key] = self.sigma.to(x.dtype).to(x.device)  # in this order, as Apple GPUs have no float64
        return self.copies[key]

    def nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the index of the level nearest to each sigma, a tensor of any shape."""
        levels = self.like(sigma)
        return torch.bucketize(sigma.contiguous(), (levels[1:] + levels[:-1]) / 2)


# Any sigma(t) and s(t)


class Schedule:
    """A noise schedule sigma(t) with a scaling s(t), their derivatives, and the inverse of sigma(t).

    Times and noise levels go in and out as Python numbers; the functions see a float64 scalar tensor.

    Args:
        sigma: the noise level at time t, made of arithmetic and PyTorch functions, such as `lambda t: torch.tan(t)`. It must
            rise with t, from 0 or a little more; it need not be defined for all t.
        s: the scaling at time t, above 0 at every time that a sampler visits, t = 0 included. 1 by default.
        sigma_inverse: the time at which the noise level is sigma. By default it is found by bisection.
    """

    def __init__(self, sigma: Function, s: Function = lambda t: 1.0, sigma_inverse: Function | None = None):
        self.functions = sigma, s
        self.sigma_inverse = sigma_inverse

    def sigma(self, t: float) -> float:
        """Return the noise level at time t."""
        return float(self.functions[0](torch.tensor(t, dtype=torch.float64)))

    def s(self, t: float) -> float:
        """Return the scaling at time t."""
        return float(self.functions[1](torch.tensor(t, dtype=torch.float64)))

    def derivatives(self, t: float) -> tuple[float, float]:
        """Return sigma'(t) and s'(t).

        Raises:
            TypeError: sigma or s turns t into a Python number (math.sqrt does), which has no derivative.
            ValueError: sigma(t) does not rise at t.
        """
        dsigma, ds = (derivative(function, t) for function in self.functions)
        if not dsigma > 0:
            raise ValueError(f"sigma(t) must rise with t; at {t:g} its derivative is {dsigma:g}")
        return dsigma, ds

    def t(self, sigma: float) -> float:
        """Return the time at which the noise level is sigma. Noise level 0 is at t = 0, or at -inf if sigma(0) > 0.

        Raises:
            ValueError: sigma(t) does not reach this level.
        """
        if sigma == 0:
            return 0.0 if self.sigma(0.0) == 0 else -math.inf
        if self.sigma_inverse is None:
            t = bisect(self.sigma, sigma)
        else:
            t = float(self.sigma_inverse(torch.tensor(sigma, dtype=torch.float64)))
        if not math.isclose(self.sigma(t), sigma, rel_tol=1e-6):
            raise ValueError(f"the schedule has no time at which the noise level is {sigma:g}: sigma(t) must rise through it")
        return t


LINEAR = Schedule(lambda t: t, sigma_inverse=lambda sigma: sigma)  # EDM's choice: sigma(t) = t, s(t) = 1


class Time(torch.Tensor):
    """A scalar tensor that raises a TypeError when it is turned into a Python number, which would lose its derivative."""

    def refuse(self, *args, **kwargs):
        raise TypeError("sigma(t) and s(t) cannot be differentiated through Python's numbers; use torch.sqrt for math.sqrt")

    __float__ = __int__ = __array__ = item = tolist = numpy = detach = refuse


def derivative(function: Function, t: float) -> float:
    """Return the derivative of a scalar function at t by automatic differentiation; 0 if it does not depend on t."""
    with torch.inference_mode(False), torch.enable_grad():
        time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        value = function(time.as_subclass(Time))
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return 0.0
        return float(torch.autograd.grad(value.as_subclass(torch.Tensor), time)[0])


def bisect(function: Callable[[float], float], target: float) -> float:
    """Return t with function(t) = target, exact to the last bit, if there is one; the function rises where it is defined."""
    low, high, reach = 0.0, 2.0**-30, 2.0**1000

    def is_beyond(t: float) -> bool:
        """Return whether t is past the target, or past where the function is defined: there it falls, or is nan."""
        return not function(low) <= function(t) < target

    while function(low) > target and low > -reach:
        low, high = 2 * low - 1, low
    while not is_beyond(high) and high < reach:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if is_beyond(middle) else (middle, high)
    return high

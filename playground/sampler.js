/**
 * Samplers: from noise to images along the probability-flow ODE, with any choice of Table 1 (Karras et al., 2022).
 *
 * A denoiser D(x, sigma) estimates clean images from images with noise of standard deviation sigma. Images are
 * Float64Arrays. D may return an array or a promise of one. `lab/export_onnx.py` makes such a D of a trained network.
 */

export const SOLVERS = ["heun", "euler", "dpmpp_2m"];
export const DISCRETIZATIONS = ["edm", "vp", "ve", "iddpm"];
export const SCHEDULES = ["linear", "ve", "vp"];
export const SCALINGS = ["none", "vp"];

const EPSILON_S = 1e-3; // the last time step of VP before 0

// The rows of Table 1: sigma(t), s(t) and the time steps

/** Return VP's sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), its derivative and its inverse. */
function vp(beta_d, beta_min) {
  const exponent = (t) => (beta_d * t ** 2) / 2 + beta_min * t;
  const sigma = (t) => Math.sqrt(Math.expm1(exponent(t)));
  const dsigma = (t) => (Math.exp(exponent(t)) * (beta_d * t + beta_min)) / (2 * sigma(t));
  const inverse = (level) => {
    const log = Math.log1p(level ** 2);
    // The textbook formula subtracts two nearly equal numbers here, and loses digits.
    return (2 * log) / (beta_min + Math.sqrt(beta_min ** 2 + 2 * beta_d * log));
  };
  return { sigma, dsigma, inverse };
}

/** Return VP's schedule with sigma(EPSILON_S) = sigma_min and sigma(1) = sigma_max. */
function vpBetween(sigma_min, sigma_max) {
  const [low, high] = [Math.log1p(sigma_min ** 2), Math.log1p(sigma_max ** 2)];
  const beta_d = (2 * (low / EPSILON_S - high)) / (EPSILON_S - 1);
  const beta_min = high - beta_d / 2;
  if (!(Math.min(beta_min + beta_d * EPSILON_S, beta_min + beta_d) > 0)) {
    throw new Error(
      `No VP schedule rises from ${sigma_min} to ${sigma_max}: lower the lowest noise, or raise the highest noise.`,
    );
  }
  return vp(beta_d, beta_min);
}

const VP_RANGE = [vp(19.9, 0.1).sigma(EPSILON_S), vp(19.9, 0.1).sigma(1)];

/** Return the entries of one column of Table 1. */
function preset(solver, discretization, schedule, scaling, [sigma_min, sigma_max]) {
  return { solver, discretization, schedule, scaling, rho: 7, sigma_min, sigma_max };
}

export const PRESETS = {
  VP: preset("euler", "vp", "vp", "vp", VP_RANGE),
  VE: preset("euler", "ve", "ve", "none", [0.02, 100]),
  DDIM: preset("euler", "iddpm", "linear", "none", [0.002, 81]),
  EDM: preset("heun", "edm", "linear", "none", [0.002, 80]),
};

/** Return sigma(t), s(t), derivatives(t) = [sigma'(t), s'(t)], and t(sigma), the inverse of sigma(t). */
export function makeSchedule({ schedule, scaling, sigma_min, sigma_max }) {
  check("schedule", schedule, SCHEDULES);
  check("scaling", scaling, SCALINGS);
  const { sigma, dsigma, inverse } = {
    linear: () => ({ sigma: (t) => t, dsigma: () => 1, inverse: (level) => level }),
    ve: () => ({ sigma: Math.sqrt, dsigma: (t) => 1 / (2 * Math.sqrt(t)), inverse: (level) => level ** 2 }),
    vp: () => vpBetween(sigma_min, sigma_max),
  }[schedule]();
  const s = (t) => (scaling === "vp" ? (1 + sigma(t) ** 2) ** -0.5 : 1);
  const ds = (t) => (scaling === "vp" ? -sigma(t) * dsigma(t) * s(t) ** 3 : 0);
  const t = (level) => {
    const time = level === 0 ? 0 : inverse(level);
    if (!Number.isFinite(time)) throw new Error(`The schedule ${schedule} has no time of noise level ${level}.`);
    return time;
  };
  return { sigma, s, derivatives: (time) => [dsigma(time), ds(time)], t };
}

/** Return the noise levels sigma(t_0) > ... > sigma(t_{N-1}), then 0, as a Float64Array of N + 1. */
export function noiseLevels({ discretization, N, rho, sigma_min, sigma_max }) {
  check("discretization", discretization, DISCRETIZATIONS);
  if (!(Number.isInteger(N) && N >= 1)) throw new Error("N, the number of steps, must be a whole number from 1 on.");
  if (!(sigma_min > 0 && sigma_min < sigma_max && sigma_max < Infinity)) {
    throw new Error(`The lowest noise (${sigma_min}) must be above 0 and below the highest noise (${sigma_max}).`);
  }
  const fractions = Array.from({ length: N }, (_, i) => i / Math.max(N - 1, 1)); // i / (N - 1)
  const levels = {
    edm: () => {
      if (!(rho > 0)) throw new Error("rho must be above 0.");
      const [first, last] = [sigma_max ** (1 / rho), sigma_min ** (1 / rho)];
      return fractions.map((fraction) => ((1 - fraction) * first + fraction * last) ** rho); // Eq. 5
    },
    vp: () => {
      const { sigma } = vpBetween(sigma_min, sigma_max);
      return fractions.map((fraction) => sigma(1 + fraction * (EPSILON_S - 1)));
    },
    ve: () => fractions.map((fraction) => sigma_max * (sigma_min / sigma_max) ** fraction),
    iddpm: () => {
      const u = iddpmLevels().filter((level) => sigma_min <= level && level <= sigma_max);
      if (N > u.length) {
        throw new Error(`iDDPM has ${u.length} levels between lowest and highest noise, too few for ${N} steps.`);
      }
      return fractions.map((_, i) => u[roundHalfToEven((i * (u.length - 1)) / Math.max(N - 1, 1))]);
    },
  };
  return Float64Array.of(...levels[discretization](), 0);
}

/** Return Improved DDPM's noise levels u_0 > ... > u_{M-1}. */
function iddpmLevels(M = 1000, C_1 = 0.001, C_2 = 0.008) {
  const alphaBar = (j) => Math.sin(((Math.PI / 2) * j) / (M * (C_2 + 1))) ** 2;
  const u = new Float64Array(M);
  for (let j = M, product = 1; j > 0; j--) {
    product /= Math.max(alphaBar(j - 1) / alphaBar(j), C_1); // u_{j-1}^2 + 1
    u[j - 1] = Math.sqrt(product - 1);
  }
  return [...u];
}

/** Return the nearest whole number, the even one of two that are equally near, as PyTorch does. */
function roundHalfToEven(value) {
  return value % 1 === 0.5 ? 2 * Math.round(value / 2) : Math.round(value);
}

/** Throw an error in words unless the value is one of the allowed names. */
function check(name, value, allowed) {
  if (!allowed.includes(value)) throw new Error(`${name} must be one of ${allowed.join(", ")}, not ${value}.`);
}

// Algorithms 1 and 2, for any sigma(t) and s(t) (Eq. 4)

/**
 * Sample with N steps and yield { x, sigma, denoised } after each; the last one's x holds the images.
 *
 * @param D the denoiser D(x, sigma)
 * @param latents Float64Array, noise of unit variance
 * @param settings solver, discretization, schedule, scaling, N, rho, sigma_min, sigma_max, and for churn (Algorithm 2)
 *   S_churn, S_min, S_max, S_noise (not dpmpp_2m). `sigma_steps`, falling to 0, replaces `noiseLevels(settings)`.
 * @param noise called once a step if S_churn > 0; returns as much new noise of unit variance
 */
export async function* sample(D, latents, settings, noise) {
  const { solver, S_churn = 0, S_min = 0, S_max = Infinity, S_noise = 1 } = settings;
  check("solver", solver, SOLVERS);
  const { s, derivatives, t: timeOf, ...schedule } = makeSchedule(settings);
  const levels = settings.sigma_steps ?? noiseLevels(settings);
  const N = levels.length - 1;
  let x = latents.map((value) => value * levels[0]);
  if (solver === "dpmpp_2m") return yield* multistep(D, x, levels);

  /** Return the slope dx/dt of the ODE (Eq. 4) and the denoised images. */
  async function slope(x, t) {
    const [sigma, scale, [dsigma, ds]] = [schedule.sigma(t), s(t), derivatives(t)];
    const unscaled = x.map((value) => value / scale);
    const denoised = await D(unscaled, sigma);
    const score = (i) => (denoised[i] - unscaled[i]) / sigma ** 2; // Eq. 3
    return { d: x.map((value, i) => (ds / scale) * value - scale * dsigma * sigma * score(i)), denoised };
  }

  for (let i = 0; i < N; i++) {
    const [sigma, sigmaNext] = [levels[i], levels[i + 1]];
    const gamma = S_min <= sigma && sigma <= S_max ? Math.min(S_churn / N, Math.SQRT2 - 1) : 0;
    const sigmaHat = sigma + gamma * sigma;
    if (S_churn > 0) { // Algorithm 2: raise the noise level
      const [epsilon, added] = [noise(), Math.sqrt(sigmaHat ** 2 - sigma ** 2) * S_noise];
      x = x.map((value, k) => value + added * epsilon[k]);
    }
    const [t, tNext] = [timeOf(sigmaHat), timeOf(sigmaNext)];
    const h = tNext - t;
    const start = x.map((value) => value * s(t));
    const { d, denoised } = await slope(start, t);
    let end = start.map((value, k) => value + h * d[k]); // Euler step
    if (solver === "heun" && sigmaNext > 0) { // Algorithm 1: 2nd order correction
      const { d: dPrime } = await slope(end, tNext);
      end = start.map((value, k) => value + h * (d[k] / 2 + dPrime[k] / 2));
    }
    x = end.map((value) => value / s(tNext));
    yield { x, sigma: sigmaNext, denoised };
  }
}

/** Follow the ODE with DPM-Solver++(2M) (Lu et al., 2022): D is extrapolated from the step before. */
async function* multistep(D, x, levels) {
  let before = null;
  for (let i = 0; i < levels.length - 1; i++) {
    const [ratio, denoised] = [levels[i + 1] / levels[i], await D(x, levels[i])];
    const weight = before && ratio > 0 ? Math.log(ratio) / Math.log(levels[i] / levels[i - 1]) / 2 : 0;
    const extrapolated = denoised.map((value, k) => (weight ? value + weight * (value - before[k]) : value));
    x = x.map((value, k) => ratio * value + (1 - ratio) * extrapolated[k]);
    before = denoised;
    yield { x, sigma: levels[i + 1], denoised };
  }
}

/** Return D with classifier-free guidance: D(x; sigma) + guidance (D(x; sigma, labels) - D(x; sigma)). */
export function guided(D, guidance) {
  if (guidance === 1) return D;
  return async (x, sigma, labels) => {
    const [unconditional, conditional] = [await D(x, sigma, null), await D(x, sigma, labels)];
    return unconditional.map((value, i) => value + guidance * (conditional[i] - value));
  };
}

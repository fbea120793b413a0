"""The samplers and the network of the page in `playground/` give what Python's give, in a real browser."""

import itertools
import json
import urllib.request

import pytest
import torch
from torch.nn.functional import one_hot

from edm.exact import FiniteData
from edm.sampler import SOLVERS, guided, sample
from edm.schedule import DISCRETIZATIONS, RANGES, SCALINGS, SCHEDULES, iddpm_levels, iddpm_steps
from lab.build import table_1
from lab.data import to_uint8
from lab.generate import load_denoiser

POINTS = [-1.0, 1.0]  # the data of the denoiser in closed form
CDN = "https://cdn.jsdelivr.net"
SITE = "https://name.github.io/repository/playground/"
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm"}
CHURN = {"S_churn": 4.0, "S_min": 0.05, "S_max": 20.0, "S_noise": 1.01}
NETWORK_SETTINGS = [  # solver, discretization, schedule, scaling, N, rho, churn, guidance
    ("heun", "edm", "linear", "none", 6, 7, {}, 1),
    ("heun", "edm", "linear", "none", 6, 3, CHURN, 1),
    ("heun", "edm", "linear", "none", 5, 7, {}, 1.5),
    ("euler", "edm", "linear", "none", 9, 7, CHURN, 1.5),
    ("dpmpp_2m", "edm", "linear", "none", 9, 7, {}, 1),
    ("euler", "vp", "vp", "vp", 9, 7, {}, 1),
    ("heun", "vp", "vp", "none", 6, 7, {}, 1),
    ("heun", "vp", "linear", "vp", 6, 7, CHURN, 1),
    ("euler", "ve", "ve", "none", 9, 7, {}, 1),
    ("heun", "ve", "ve", "vp", 6, 7, {}, 0),
    ("euler", "iddpm", "linear", "none", 9, 7, {}, 1),
    ("heun", "iddpm", "vp", "vp", 6, 7, {}, 1),
    ("euler", "edm", "ve", "vp", 9, 5, {}, 2),
    ("heun", "ve", "linear", "none", 6, 7, CHURN, 1),
]

SAMPLE_IN_CLOSED_FORM = """async ({ settings, latents, noise }) => {
  const { sample } = await import("/sampler.js");
  let evaluations = 0;
  const D = (x, sigma) => {
    evaluations++;
    return x.map((value) => Math.tanh(value / sigma ** 2));
  };
  const calls = noise.values();
  const states = [];
  for await (const { x, sigma, denoised } of sample(D, Float64Array.from(latents), settings, () => calls.next().value)) {
    states.push({ x: [...x], sigma, denoised: [...denoised] });
  }
  return { states, evaluations };
}"""
LOAD = """async () => {
  const { Engine } = await import("./engine.js");
  window.engine = await Engine.load("edm_small.onnx");
  return engine.metadata;
}"""
SAMPLE = """async (request) => {
  const { normalGenerator } = await import("/random.js");
  const generators = request.labels.map((_, index) => normalGenerator(request.seed, index));
  const noise = Array.from({ length: request.settings.N + 1 }, () => generators.flatMap((draw) => [...draw(32 * 32)]));
  const states = [];
  const { x, evaluations } = await engine.sample(request, { onState: (state) => states.push(state.sigma) });
  return { x: [...x], evaluations, states, noise };
}"""
CANCEL = """async (request) => {
  const controller = new AbortController();
  const onState = () => controller.abort();
  const error = await engine.sample(request, { signal: controller.signal, onState }).catch((error) => error);
  const aborted = performance.now();
  const { evaluations } = await engine.sample({ ...request, settings: { ...request.settings, N: 1 } });
  return { error: error.name, evaluations, milliseconds: performance.now() - aborted };
}"""
TRY_TO_EVALUATE = f"""async () => {{
  try {{
    await ({LOAD})();
    await engine.denoise({{ x: new Float64Array(32 * 32), sigma: 1, labels: [null] }});
  }} catch (error) {{
    return error.message;
  }}
}}"""


@pytest.fixture(scope="module")
def open_page(browser, serve):
    """open_page(folder): a blank page of a server of this folder."""

    def open_page(folder):
        page = browser.new_page()
        page.goto(serve(folder) + "package.json")
        return page

    return open_page


@pytest.fixture(scope="module")
def page(open_page, root):
    """A blank page of a server of playground/."""
    return open_page(root / "playground")


@pytest.fixture(scope="module")
def engine(page, root):
    """The same page, with the engine as `window.engine`."""
    if not (root / "playground" / "node_modules").exists():
        versions = json.loads((root / "playground" / "package.json").read_text())["dependencies"]
        url = f"{CDN}/npm/onnxruntime-web@{versions['onnxruntime-web']}/package.json"
        try:
            urllib.request.urlopen(url, timeout=10).close()
        except OSError:
            pytest.skip("there is no playground/node_modules, and the CDN cannot be reached")
    assert page.evaluate(LOAD) == dict(name="edm_small", resolution=32, channels=1, classes=10, sigma_min=0.002, sigma_max=80)
    return page


@pytest.fixture(scope="module")
def network(root):
    """The network of the page in PyTorch; `network.evaluations` counts."""
    _, denoiser, _ = load_denoiser(root / "assets" / "edm_small.safetensors", None, [], torch.device("cpu"))
    denoiser.evaluations = 0

    def count(*_):
        denoiser.evaluations += 1

    denoiser.register_forward_hook(count)
    return denoiser


def choices(solver: str, discretization: str, schedule: str, scaling: str, N: int, rho: float, churn: dict) -> dict:
    """Return the settings of the page for these choices, with the discretization's own range."""
    sigma_min, sigma_max = RANGES[discretization]
    names = {"solver": solver, "discretization": discretization, "schedule": schedule, "scaling": scaling}
    return {**names, "N": N, "rho": rho, "sigma_min": sigma_min, "sigma_max": sigma_max, **churn}


def without_labels(denoiser):
    """Return the guide of classifier-free guidance."""
    return lambda x, sigma, labels: denoiser(x, sigma)


def sample_in_python(denoiser, latents: torch.Tensor, settings: dict, noise: torch.Tensor, labels=None) -> list:
    """Return the states of Python's sampler with settings of the page; noise holds that of every step."""
    names = ("discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho")
    sigma_steps, schedule = table_1(settings["N"], **{name: settings[name] for name in names})
    churn = {name: value for name, value in settings.items() if name.startswith("S_")}
    calls = iter(noise)
    with torch.no_grad():
        return list(
            sample(denoiser, latents, sigma_steps, labels, schedule, settings["solver"], noise=lambda: next(calls), **churn)
        )


@pytest.mark.parametrize("churn", [{}, CHURN], ids=["ODE", "churn"])
def test_samplers_agree_in_closed_form(page, normal_noise, churn):
    """All choices of Table 1 together: the states and the number of evaluations."""
    latents, noise = normal_noise(8, 1, 1, 1)(), normal_noise(6, 8, 1, 1, 1, seed=1)()
    solvers = [solver for solver in SOLVERS if not (churn and solver == "dpmpp_2m")]
    for names in itertools.product(solvers, DISCRETIZATIONS, SCHEDULES, SCALINGS):
        settings, counts = choices(*names, 6, 5.0, churn), []
        exact = FiniteData(torch.tensor(POINTS, dtype=torch.float64).view(2, 1, 1, 1))

        def D(x, sigma, labels, exact=exact, counts=counts):
            counts.append(sigma)
            return exact(x, sigma)

        expected = sample_in_python(D, latents, settings, noise)
        data = {"settings": settings, "latents": latents.flatten().tolist(), "noise": noise.flatten(1).tolist()}
        found = page.evaluate(SAMPLE_IN_CLOSED_FORM, data)
        assert found["evaluations"] == len(counts), names
        for state, (x, sigma, denoised) in zip(found["states"], expected, strict=True):
            assert state["sigma"] == pytest.approx(sigma, rel=1e-12), names
            assert state["x"] == pytest.approx(x.flatten().tolist(), rel=1e-9, abs=1e-9), names
            assert state["denoised"] == pytest.approx(denoised.flatten().tolist(), rel=1e-9, abs=1e-9), names


def test_ties_are_rounded_as_in_python(page):
    """iDDPM's middle step of three, among even numbers of levels: half-way between two, the first of them even or odd."""
    code = "async (settings) => [...(await import('/sampler.js')).noiseLevels(settings)]"
    low, highs = 0.002, iddpm_levels()[200:204] * (1 + 1e-9)  # each takes in one level more than the next
    for high in highs.tolist():
        settings = {"discretization": "iddpm", "N": 3, "rho": 7, "sigma_min": low, "sigma_max": high}
        assert page.evaluate(code, settings) == pytest.approx(iddpm_steps(3, low, high).tolist(), rel=1e-12)


@pytest.mark.parametrize("row", NETWORK_SETTINGS, ids=lambda row: "-".join(map(str, [*row[:6], len(row[6]), row[7]])))
def test_networks_agree(engine, network, row):
    *names, guidance = row
    settings, labels = choices(*names), [3, 8]
    found = engine.evaluate(SAMPLE, {"settings": settings, "guidance": guidance, "labels": labels, "seed": 5})
    noise = torch.tensor(found["noise"], dtype=torch.float64).view(-1, 2, 1, 32, 32)
    assert noise.mean().abs() < 0.05 and 0.95 < noise.std() < 1.05
    network.evaluations = 0
    one_hot_labels = one_hot(torch.tensor(labels), 10)
    states = sample_in_python(guided(network, without_labels(network), guidance), noise[0], settings, noise[1:], one_hot_labels)
    assert found["evaluations"] == network.evaluations
    assert found["states"] == pytest.approx([state.sigma for state in states], rel=1e-12)
    images = torch.tensor(found["x"], dtype=torch.float64).view(2, 1, 32, 32)
    assert (to_uint8(images).int() - to_uint8(states[-1].x).int()).abs().max() <= 2


def test_an_image_depends_on_its_own_seed(engine):
    settings = choices("heun", "edm", "linear", "none", 3, 7, CHURN)
    request = {"settings": settings, "guidance": 1, "seed": 1}
    alone, together = (engine.evaluate(SAMPLE, {**request, "labels": labels})["x"] for labels in ([2], [2, 7]))
    assert together[: 32 * 32] == pytest.approx(alone, abs=1e-4)
    assert together[32 * 32 :] != pytest.approx(alone, abs=0.5)


def test_from_a_noisy_image(engine, network, normal_noise):
    """One evaluation of D, and Heun's method from there."""
    x, sigma = 2 * normal_noise(1, 1, 32, 32)(), 2.0
    with torch.no_grad():
        D = network(x, sigma, one_hot(torch.tensor([4]), 10))
    data = {"x": x.flatten().tolist(), "sigma": sigma, "labels": [4]}
    found = engine.evaluate("async (request) => [...await engine.denoise(request)]", data)
    torch.testing.assert_close(torch.tensor(found).view(1, 1, 32, 32), D, rtol=0, atol=1e-4)

    settings = choices("heun", "edm", "linear", "none", 8, 7, {})
    levels, schedule = table_1(8)
    levels = torch.cat([torch.tensor([sigma], dtype=torch.float64), levels[levels < sigma]])
    with torch.no_grad():
        D = guided(network, without_labels(network), 1.5)
        *_, state = sample(D, x / sigma, levels, one_hot(torch.tensor([4]), 10), schedule)
    request = {"settings": settings, "guidance": 1.5, "labels": [4], "seed": 0}
    request["start"] = {"x": data["x"], "sigma": sigma}
    found = engine.evaluate("async (request) => [...(await engine.sample(request)).x]", request)
    images = torch.tensor(found, dtype=torch.float64).view(1, 1, 32, 32)
    assert (to_uint8(images).int() - to_uint8(state.x).int()).abs().max() <= 2


def test_cancelling(engine):
    """A computation of half a minute stops after an evaluation, and the next one begins."""
    request = {"settings": choices("heun", "edm", "linear", "none", 1000, 7, {}), "labels": [0], "seed": 0}
    found = engine.evaluate(CANCEL, request)
    assert found.pop("milliseconds") < 10_000
    assert found == {"error": "AbortError", "evaluations": 1}


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "flipped in the middle", "text"])
def test_errors_in_words(engine, open_page, root, tmp_path, damage):
    for item in (root / "playground").iterdir():
        (tmp_path / item.name).symlink_to(item)
    model = tmp_path / "edm_small.onnx"
    data = bytearray(model.read_bytes())
    model.unlink()
    place = {"flipped": 2000, "flipped in the middle": len(data) // 2}.get(damage)  # the nodes; the weights
    if place:
        data[place : place + 4000] = bytes(255 - byte for byte in data[place : place + 4000])
    if damage != "missing":
        model.write_bytes({"cut": data[:-5000], "text": b"<html>not found</html>"}.get(damage, data))
    message = open_page(tmp_path).evaluate(TRY_TO_EVALUATE)
    assert "edm_small.onnx" in message and ("no such file" if damage == "missing" else "damaged") in message


@pytest.fixture
def page_without_packages(open_page, root, tmp_path):
    """A blank page of a server of playground/ without node_modules."""
    for item in (root / "playground").iterdir():
        if item.name != "node_modules":
            (tmp_path / item.name).symlink_to(item)
    page = open_page(tmp_path)
    yield page
    page.context.unroute_all()


def test_missing_runtime_in_words(page_without_packages):
    page_without_packages.context.route(f"{CDN}/**", lambda route: route.abort())
    message = page_without_packages.evaluate(TRY_TO_EVALUATE)
    assert "onnxruntime-web cannot be loaded" in message and "npm install" in message


@pytest.mark.parametrize("site", ["localhost", "published"])
def test_runtime_from_the_cdn(page_without_packages, root, site):
    """The files of the pinned version, as the CDN would serve them. A published page asks for no others."""
    packages = root / "playground" / "node_modules"
    if not packages.exists():
        pytest.skip("there is no playground/node_modules to serve as the CDN")
    page, asked, missing = page_without_packages, [], []

    def serve(route):
        asked.append(route.request.url)
        name, _, file = route.request.url.removeprefix(f"{CDN}/npm/").partition("/")
        path = packages / name.partition("@")[0] / file
        route.fulfill(path=path, headers={"Access-Control-Allow-Origin": "*", "Content-Type": TYPES[path.suffix]})

    page.context.route(f"{CDN}/**", serve)
    page.context.on("response", lambda response: missing.append(response.url) if not response.ok else None)
    if site == "published":
        own = page.url.removesuffix("package.json")

        def publish(route):
            route.fulfill(response=route.fetch(url=route.request.url.replace(SITE, own)))

        page.context.route(f"{SITE}**", publish)
        page.goto(f"{SITE}package.json")
    assert page.evaluate(LOAD)["name"] == "edm_small"
    versions = json.loads((root / "playground" / "package.json").read_text())["dependencies"]
    assert asked and all(f"/onnxruntime-web@{versions['onnxruntime-web']}/dist/" in url for url in asked)
    assert len(missing) == {"localhost": 1, "published": 0}[site]

"""In a real browser, the page playground/ samples, draws, keeps its settings in its address, and says what does not work."""

import re

import pytest
import torch
from PIL import Image

from edm.exact import FiniteData, GaussianMixture
from edm.sampler import sample
from lab.build import table_1

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=60_000)  # the first evaluation takes seconds on a busy machine

QUICK = "#digits&N=2&B.N=3"  # three evaluations of each digit
RUNTIMES = re.compile("node_modules/onnxruntime-web|cdn.jsdelivr.net")


@pytest.fixture(scope="module")
def address(root, serve):
    """The address of a server of the folder playground."""
    if not (root / "playground" / "node_modules" / "onnxruntime-web").exists():
        pytest.skip("npm install has not been run in playground/")
    return serve(root / "playground")


@pytest.fixture
def new_page(browser):
    """A new page that has not been loaded yet."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    yield page
    page.close()


@pytest.fixture(scope="module")
def visit(address, browser):
    """visit("#digits&N=2"): the page with these settings, all on one page; at the end there was no error in its console."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    errors = []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address + QUICK)

    def go(fragment: str):
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        return page

    yield go
    page.close()
    assert errors == []


def pictures(place) -> list[str]:
    """Return the contents of all canvases in a place."""
    return place.locator("canvas").evaluate_all("all => all.map(canvas => canvas.toDataURL())")


def side(page, name: str):
    """Return the digits of set-up A or B, with their caption."""
    return page.locator(".side", has=page.get_by_role("heading", name=name, exact=True))


def wait_for(page, a: str, b: str) -> None:
    """Wait until both set-ups have been sampled, with these numbers of evaluations."""
    for name, evaluations in (("A", a), ("B", b)):
        expect(side(page, name).get_by_role("status")).to_have_text(re.compile(rf"^{evaluations}, [\d,]+ ms$"))


def press(slider, key: str, times: int) -> None:
    for _ in range(times):
        slider.press(key)


def test_two_set_ups(visit):
    """They differ where their settings do, and with the same settings their digits are the same to the last pixel."""
    page = visit(QUICK)
    wait_for(page, "3 evaluations", "3 evaluations")
    a = pictures(side(page, "A").locator(".ten"))
    assert len(set(a)) == 10 and not set(a) & set(pictures(side(page, "B").locator(".ten")))
    page.get_by_role("button", name="EDM for B").click()  # with as many evaluations as before
    expect(page).to_have_url(re.compile("#digits&N=2&B.N=2&B.solver=heun&B.discretization=edm&"))
    wait_for(page, "3 evaluations", "3 evaluations")
    assert pictures(side(page, "B").locator(".ten")) == a
    films = page.locator(".film")
    assert pictures(films.nth(0)) == pictures(films.nth(1))
    assert len(films.nth(0).locator("figure").all()) == 3
    side(page, "A").get_by_role("button", name="Digit 7 of A").click()
    expect(films.nth(1).get_by_role("heading")).to_contain_text("digit 7")
    expect(films.nth(1).get_by_role("img", name="Digit 7 of B: D(x) at noise level 80")).to_be_visible()
    assert pictures(films.nth(0))[-1] == a[7] == pictures(films.nth(1))[-1]
    page.get_by_label("guidance of B", exact=True).press("ArrowRight")
    wait_for(page, "3 evaluations", "6 evaluations")
    assert pictures(side(page, "A").locator(".ten")) == a != pictures(side(page, "B").locator(".ten"))


def test_a_new_setting_cancels_the_old_computation(visit):
    page = visit("#digits&N=1&B.N=1&seed=1")
    wait_for(page, "1 evaluation", "1 evaluation")
    wanted = pictures(side(page, "A").locator(".ten"))
    steps = page.get_by_label("steps of A", exact=True)
    steps.press("End")
    expect(side(page, "A").locator(".progress")).to_have_text(re.compile(r"^step \d+ of 64"))
    steps.press("Home")
    wait_for(page, "1 evaluation", "1 evaluation")
    page.wait_for_timeout(500)
    assert side(page, "A").locator(".progress").inner_text() == ""
    assert pictures(side(page, "A").locator(".ten")) == wanted


def test_settings_that_cannot_work_say_so(visit):
    """The message names the knob, and the knob comes in sight. So it does if a link sets it."""
    page = visit(QUICK + "&sigma_min=1")
    wait_for(page, "3 evaluations", "3 evaluations")
    before = pictures(side(page, "A").locator(".ten"))
    knob = page.get_by_label("lowest noise of A", exact=True)
    expect(knob).to_be_visible()
    page.get_by_text("More knobs").click()
    expect(knob).to_be_hidden()
    page.get_by_label("schedule of A", exact=True).select_option("vp")
    expect(side(page, "A").get_by_role("alert")).to_contain_text("lower the lowest noise")
    expect(knob).to_be_visible()
    assert pictures(side(page, "A").locator(".ten")) == before
    page.get_by_role("button", name="Reset").click()
    expect(side(page, "A").get_by_role("alert")).to_be_hidden()
    expect(page).to_have_url(re.compile("#digits$"))


def test_a_link_restores_the_settings(visit):
    page = visit(
        "#digits&N=3&rho=4.5&solver=euler&S_churn=8&seed=7&digit=5&B.N=2&B.guidance=0&B.scaling=vp&x=1&B.rho=much&S_min=99"
    )
    values = {
        "steps of A": "3", "spacing of A": "4.5", "solver of A": "euler", "churn of A": "8", "seed": "7",
        "steps of B": "2", "guidance of B": "0", "scaling of B": "vp", "spacing of B": "7",
    }  # fmt: skip
    for label, value in values.items():
        expect(page.locator("#digits").get_by_label(label, exact=True)).to_have_value(value)
    expect(page.locator(".film h3").first).to_contain_text("digit 5")
    wait_for(page, "3 evaluations", "4 evaluations")
    page.get_by_label("spacing of A", exact=True).press("ArrowRight")
    left = "N=3&solver=euler&rho=5&S_churn=8&B.N=2&B.scaling=vp&B.guidance=0"  # what is not known has gone
    expect(page).to_have_url(re.compile(re.escape(f"#digits&seed=7&digit=5&{left}") + "$"))


def test_trajectories(visit):
    page = visit("#trajectories&N=5&data=peaks")
    plots = page.locator("#trajectories .plot")
    expect(plots).to_have_count(6)
    expect(page.get_by_label("data", exact=True)).to_have_value("peaks")
    for label in ("steps", "tangents at", "spacing"):
        before = plots.nth(4).inner_html()
        page.locator("#trajectories").get_by_label(label, exact=True).press("ArrowRight")
        page.wait_for_function("before => document.querySelectorAll('#trajectories .plot')[4].innerHTML !== before", arg=before)
    expect(page.locator(".column.EDM .caption")).to_have_text(
        re.compile(r"^6 evaluations\. Mean error: [\d.]+ \S during sampling, [\d.]+ at the end\.$")
    )


def test_tangents(visit, assert_close):
    """EDM's end at D(x; sigma), VE's half-way to it, and all have the slope of an Euler step of Python's sampler."""
    code = """async ([x, sigma, settings]) => {
      const { tangents } = await import("./trajectories.js");
      const { twoPeaks } = await import("./exact.js");
      const { makeSchedule } = await import("./sampler.js");
      const solutions = { sigma: [2 * sigma, sigma], x: [x, x].map((each) => Float64Array.from(each)) };
      return tangents(twoPeaks(0), solutions, sigma, makeSchedule(settings));
    }"""
    x, sigma = torch.linspace(-2, 2, 8, dtype=torch.float64), 0.5
    D = FiniteData(torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1))
    denoised = D(x.view(8, 1, 1, 1), sigma).flatten()
    for name, scaling, end in (("linear", "none", denoised), ("ve", "none", (x + denoised) / 2), ("vp", "vp", None)):
        settings = {"schedule": name, "scaling": scaling, "sigma_min": 0.002, "sigma_max": 25}
        lines = torch.tensor(visit("#trajectories").evaluate(code, [x.tolist(), sigma, settings]), dtype=torch.float64)
        _, schedule = table_1(2, **settings)
        step = next(sample(D, x.view(8, 1, 1, 1) / sigma, torch.tensor([sigma, 0.1, 0]), schedule=schedule, solver="euler"))
        t, t_next = schedule.t(sigma), schedule.t(step.sigma)
        slope = (schedule.s(t_next) * step.x.flatten() - schedule.s(t) * x) / (t_next - t)
        assert_close(lines[:, :, 0], [[0.0, t]] * 8)
        start, touch = lines[:, :, 1].T
        assert_close(touch, schedule.s(t) * x)
        assert_close((touch - start) / t, slope)
        if end is not None:
            assert_close(start, end)


def test_solutions_between_their_steps(visit):
    code = """async () => {
      const { between } = await import("./trajectories.js");
      const solutions = { sigma: [4, 2, 0], x: [[8, 0], [4, 1], [3, 3]].map((each) => Float64Array.from(each)) };
      return [2.5, 2, 0].map((level) => [...between(solutions, level)]);
    }"""
    assert visit("#trajectories").evaluate(code) == [[5, 0.75], [4, 1], [3, 3]]


def test_the_exact_denoiser(visit, assert_close):
    x, sigmas = torch.linspace(-3, 3, 7, dtype=torch.float64), [0.1, 0.5, 2.0, 25.0]
    peaks = torch.tensor([[-1.0], [1.0]])
    exact = {0: FiniteData(peaks[:, :, None, None]), 0.2: GaussianMixture(peaks, torch.full((2, 1, 1), 0.04))}
    code = """async ([x, sigmas, width]) => {
      const { twoPeaks } = await import("./exact.js");
      return sigmas.map((sigma) => [...twoPeaks(width)(Float64Array.from(x), sigma)]);
    }"""
    for width, D in exact.items():
        made = visit("#trajectories").evaluate(code, [x.tolist(), sigmas, width])
        for sigma, denoised in zip(sigmas, made):
            assert_close(torch.tensor(denoised, dtype=torch.float64), D(x[:, None, None, None], sigma).flatten(), 1e-6)


def test_draw(visit):
    page = visit("#draw&N=4&sigma=0.05&label=4")
    outcome, note = page.locator(".outcome"), page.locator(".outcome small").last
    expect(note).to_have_text("3 evaluations")  # one of the four time steps lies below sigma
    example = pictures(outcome)
    alert, hint = page.locator("#draw").get_by_role("alert"), page.locator("#draw .hint")
    expect(hint).to_be_empty()
    page.get_by_role("button", name="Clear").click()
    expect(hint).to_have_text("Draw a digit here.")
    expect(note).to_be_empty()
    (black,) = set(pictures(outcome))
    box = page.locator(".drawing").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 30)  # a stroke in a corner
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 130, steps=5)
    page.mouse.up()
    page.wait_for_function("old => document.querySelectorAll('.outcome canvas')[3].toDataURL() !== old", arg=black)
    expect(alert).to_be_hidden()
    expect(hint).to_be_empty()
    code = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data].filter((_, i) => i % 4 === 0)"
    y, _, denoised, _ = (torch.tensor(each.evaluate(code)).view(32, 32) for each in outcome.locator("canvas").all())
    rows, columns = y.sum(dim=1).nonzero(), y.sum(dim=0).nonzero()
    assert (rows.min(), rows.max()) == (6, 25) and columns.float().mean() == 15.5  # 20 pixels high, in the middle
    assert (denoised - y).abs().float().mean() < 8  # so little noise hides nothing
    expect(page).to_have_url(re.compile("example=own"))
    page.get_by_role("button", name="Example: digit 3").press("Enter")
    page.wait_for_function("old => document.querySelectorAll('.outcome canvas')[3].toDataURL() === old", arg=example[3])


def test_load_an_image(visit, tmp_path):
    """A bar of 4 x 20 pixels: dark on light, faint, light on dark, or on nothing; again after Clear; and no digit."""
    page = visit("#draw&N=1&example=own")
    hint = page.locator("#draw .hint")
    first = page.locator(".outcome canvas").first
    code = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data].filter((_, i) => i % 4 === 0)"
    page.get_by_role("button", name="Clear").click()
    expect(page.locator(".outcome small").last).to_be_empty()
    black = pictures(page.locator(".outcome"))[0]

    def load(image: Image.Image | str) -> None:
        path = tmp_path / "image.png"
        path.write_text(image) if isinstance(image, str) else image.save(path)
        page.get_by_label("Load an image").set_input_files(path)

    inks = [((255,), (30,)), ((200,), (150,)), ((0,), (90,)), ((0, 0), (0, 255)), ((255, 0), (255, 255))]
    for background, ink in [*inks, inks[-1]]:
        page.get_by_role("button", name="Clear").click()
        expect(hint).to_have_text("Draw a digit here.")
        page.wait_for_function("old => document.querySelector('.outcome canvas').toDataURL() === old", arg=black)
        image = Image.new("L" if len(ink) == 1 else "LA", (50, 80), background)
        image.paste(ink, (20, 10, 24, 30))
        load(image)
        page.wait_for_function("old => document.querySelector('.outcome canvas').toDataURL() !== old", arg=black)
        expect(hint).to_be_empty()
        y = torch.tensor(first.evaluate(code)).view(32, 32)
        assert y[0].max() < 40 and y[16, 16] > 200 and (y > 128).sum(dim=1).max() in (4, 5)
    load(Image.new("L", (50, 80), 128))
    expect(hint).to_have_text("No digit was found in this image.")
    load("no image")
    expect(page.locator("#draw").get_by_role("alert")).to_contain_text("not an image")


def test_tabs_by_keyboard(visit):
    page = visit("#trajectories")
    page.get_by_role("tab", name="Trajectories").focus()
    for key, name in (("ArrowRight", "Draw"), ("ArrowRight", "Digits"), ("ArrowLeft", "Draw"), ("Home", "Digits")):
        page.keyboard.press(key)
        expect(page.get_by_role("tab", name=name)).to_be_focused()
        expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
        assert page.get_by_role("tabpanel").count() == 1


@pytest.mark.parametrize("tab", ["digits", "trajectories", "draw"])
def test_the_width_of_a_phone(visit, tab):
    page = visit(f"#{tab}&N=1&B.N=1")
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("document.documentElement.scrollWidth === 390")  # plots follow a little later
    page.set_viewport_size({"width": 1280, "height": 900})


def break_model(page) -> None:
    page.route("**/edm_small.onnx", lambda route: route.fulfill(body=b"no model"))


def hide_runtime(page) -> None:
    page.route(RUNTIMES, lambda route: route.abort())


def hide_katex(page) -> None:
    page.route(re.compile("node_modules/katex|cdn.jsdelivr.net"), lambda route: route.abort())


def remove_webassembly(page) -> None:
    page.add_init_script("delete globalThis.WebAssembly")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_model, "The model edm_small.onnx is damaged"),
        (hide_runtime, 'run "npm install" in the folder playground'),
        (remove_webassembly, "This browser has no WebAssembly"),
    ],
)
def test_what_does_not_work_is_said_in_words(address, new_page, harm, words):
    harm(new_page)
    new_page.goto(address)
    expect(new_page.get_by_role("alert")).to_contain_text(words)
    new_page.get_by_role("tab", name="Trajectories").click()
    expect(new_page.locator("#trajectories .plot")).to_have_count(6)


def test_a_tab_opened_by_a_click(address, new_page):
    """It shows its settings, though no link has set them."""
    new_page.goto(address + "#trajectories")
    new_page.get_by_role("tab", name="Draw").click()
    expect(new_page.get_by_role("button", name="Example: digit 3")).to_have_attribute("aria-pressed", "true")
    expect(new_page.locator(".outcome small").nth(1)).to_have_text(re.compile(r"^\S = 2$"))
    new_page.get_by_role("tab", name="Digits").click()
    expect(new_page.get_by_role("button", name="EDM for A")).to_have_attribute("aria-pressed", "true")
    expect(new_page.locator(".film h3").first).to_contain_text("digit 3")


def test_formulas_can_be_read_without_katex(address, new_page):
    hide_katex(new_page)
    new_page.goto(address + QUICK)
    wait_for(new_page, "3 evaluations", "3 evaluations")
    assert "dx/dt" in new_page.locator(".formula").inner_text()

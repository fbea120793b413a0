"""Controls draw anew when they change; the playground computes what `edm` computes."""

import asyncio
import math

import ipywidgets as widgets
import pytest
import torch
from matplotlib.figure import Figure

from edm.exact import GaussianMixture
from edm.sampler import sample
from edm.schedule import RANGES
from lab import live as module
from lab import trajectories
from lab.build import table_1
from lab.cli import UserError
from lab.live import Live, control, first_value, live, prepared
from lab.playground import START, applies, draw_used, make_controls, make_panel
from lab.seeds import ImageNoise
from lab.trajectories import FOUR, GUIDANCE, ONE, preset, results, solution_of


def titled(title: object) -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.suptitle(str(title))
    return figure


def drawn(draw, **controls) -> Live:
    return Live(draw, "a <picture>", {name: control(name, spec) for name, spec in controls.items()})


def finish(computation):
    """Return what the generator yields at last."""
    *_, last = computation
    return last


@pytest.fixture
def displayed(monkeypatch) -> list:
    """What is displayed: (data, metadata) pairs."""
    outputs = []
    monkeypatch.setattr("IPython.display.display", lambda data, metadata, raw: outputs.append((data, metadata)))
    return outputs


def test_controls_are_of_the_kind_that_their_values_say():
    kinds = {
        "rho": ((1.0, 15.0, 0.5), widgets.FloatSlider, 8.0),
        "steps": ((2, 64), widgets.IntSlider, 33),
        "sigma_min": ((0.0, 1.0, 0.25, 0.75), widgets.FloatSlider, 0.75),
        "solver": (["heun", "euler"], widgets.ToggleButtons, "heun"),
        "digit": (list(range(10)), widgets.Dropdown, 0),
        "S_churn": ({"none": 0, "some": 40}, widgets.ToggleButtons, 0),
        "clip": (False, widgets.Checkbox, False),
    }
    for name, (spec, kind, value) in kinds.items():
        made = control(name, spec)
        assert type(made) is kind and made.value == value == first_value(spec)
    assert [control(name, True).description for name in ("sigma_min", "rho", "N")] == ["σ_min", "ρ", "N"]  # noqa: RUF001
    own = widgets.IntText(description="mine")
    assert control("N", own) is own and own.description == "mine"


def test_a_change_is_drawn_with_the_new_values_and_errors_become_a_line():
    calls = []

    def draw(rho, solver):
        calls.append((rho, solver))
        if solver == "bad":
            raise UserError("rho < 7 & no more")
        return titled(rho)

    async def session():
        shown = drawn(draw, rho=(1.0, 15.0, 0.1), solver=["heun", "bad"])
        first = shown.png
        assert calls == [(8.0, "heun")] and 'alt="a &lt;picture&gt;"' in shown.picture.value  # at once
        shown.controls["rho"].value = 9.0
        await asyncio.sleep(0.01)
        shown.controls["rho"].value = 9.3
        await shown.task
        second = shown.png
        assert calls[1:] == [(9.3, "heun")] and second != first  # the hasty value 9.0 was not drawn
        shown.controls["solver"].value = "bad"
        await shown.task
        assert shown.png == second and "rho &lt; 7 &amp; no more" in shown.message.value
        shown.controls["solver"].value = "heun"
        await shown.task
        assert shown.message.value == "" and shown.png == second

    asyncio.run(session())


def test_errors_are_one_line_whatever_they_are():
    def draw(kind):
        raise {"value": ValueError("two\nlines"), "type": TypeError("no number")}[kind]

    assert "two lines<" in drawn(draw, kind=["value"]).message.value
    assert "TypeError: no number<" in drawn(draw, kind=["type"]).message.value


def test_a_newer_change_ends_an_older_computation(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 0.0)
    parts = []

    def draw(N):
        for part in range(20):
            parts.append((N, part))
            yield titled(N) if part in (0, 19) else None

    async def session():
        shown = drawn(draw, N=(1, 9))
        shown.controls["N"].value = 2
        while (2, 3) not in parts:
            await asyncio.sleep(0.001)  # other tasks run between the parts
        shown.controls["N"].value = 3
        await shown.task

    asyncio.run(session())
    assert (2, 19) not in parts and (3, 19) in parts


def test_one_output_holds_the_widgets_and_the_picture(displayed, monkeypatch, capsys):
    live(lambda N: titled(N), alt="N steps", N=(1, 9))
    (data, metadata), view = displayed.pop(), "application/vnd.jupyter.widget-view+json"
    assert {view, "image/png", "text/plain"} <= data.keys() and metadata == {"image/png": {"alt": "N steps"}}
    monkeypatch.setattr(module, "widgets", None)
    live(lambda N: titled(N), alt="N steps", N=(1, 9))
    (static, _), text = displayed.pop(), capsys.readouterr().out
    assert view not in static and static["image/png"] == data["image/png"] and "pip install ipywidgets" in text
    live(lambda N: titled(missing), N=(1, 9))  # noqa: F821
    assert "NameError" in displayed.pop()[0]["text/html"]


def test_a_page_without_a_kernel_has_a_picture_for_each_value(displayed, monkeypatch):
    def draw(N, solver):
        if N == 1:
            raise ValueError("too few")
        return titled(f"{N} {solver}")

    monkeypatch.setenv("EDM_STATIC", "1")
    live(draw, N=(1, 64), solver=["heun", "euler"])
    assert "image/png" in displayed[0][0]
    box, first = prepared(draw, "", {"N": control("N", (1, 64)), "solver": control("solver", ["heun", "euler"])})
    choice, stack = box.children
    assert len(stack.children) == len(choice.options) == 12 and choice.options[::11] == ("1", "64")
    assert choice.value == "33" and choice.index == stack.selected_index and first == module.png(draw(33, "heun"))
    assert "too few" in stack.children[0].value and len({child.value for child in stack.children}) == 12
    log = widgets.FloatLogSlider(value=7, min=0, max=2, step=0.1)
    box, _ = prepared(lambda sigma: titled(sigma), "", {"sigma": log})
    assert box.children[0].value == "7" and len(box.children[0].options) == 12 and box.children[0].options[-1] == "100"
    flag, _ = prepared(lambda clip: titled(clip), "", {"clip": control("clip", True)})
    assert flag.children[0].options == ("off", "on") and flag.children[0].value == "on"


# The playground


def result(**settings):
    return finish(results(**START | settings))[ONE]


def test_a_run_is_that_of_the_package(assert_close):
    """For each preset: the same paths as from `edm` by hand."""
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.04))
    latents = ImageNoise(list(range(24, 48)), (1, 1, 1), torch.device("cpu"), torch.float64)()
    for name in trajectories.FILES:
        chosen = preset(name)
        rows = {row: chosen[row] for row in ("discretization", "schedule", "scaling")}
        sigma_steps, schedule = table_1(6, **rows)
        states = list(sample(mixture, latents, sigma_steps, schedule=schedule, solver=chosen["solver"]))
        found, _, solution, _ = result(N=6, seed=1, **chosen)
        assert solution.trajectories.sigma[0] == pytest.approx(found.sigma[0])  # the same problem
        assert_close(found.x[1:], torch.stack([state.x for state in states]))
        assert found.sigma == sigma_steps.tolist()
        assert_close(found.x[0], latents * sigma_steps[0])
        assert found.evaluations == (11 if name == "EDM" else 6)


def test_errors_fall_with_the_order_of_the_solver():
    def order(solver, few):
        errors = [result(N=N, solver=solver).error for N in (few, 2 * few)]
        return math.log2(errors[0] / errors[1])

    assert order("heun", 64) > 1.7 and 0.8 < order("euler", 128) < 1.2 and order("dpmpp_2m", 128) > 1.7


def test_presets_are_the_columns_of_table_1():
    controls = make_controls()
    make_panel(controls)
    expected = {
        "VP": ("euler", "vp", "vp", "vp"),
        "VE": ("euler", "ve", "ve", "none"),
        "iDDPM": ("euler", "iddpm", "linear", "none"),
        "EDM": ("heun", "edm", "linear", "none"),
    }
    for name, rows in expected.items():
        values = preset(name)
        assert tuple(values[row] for row in ("solver", "discretization", "schedule", "scaling")) == rows
        assert (values["sigma_min"], values["sigma_max"]) == RANGES[rows[1]] and values["S_churn"] == 0
        for key, value in values.items():
            controls[key].value = value
            assert controls[key].value == value  # within the control's range
    assert finish(results(**START | {"view": FOUR})).keys() == expected.keys()


def test_controls_that_change_nothing_are_switched_off():
    controls = make_controls()
    make_panel(controls)

    def off():
        return {name for name, widget in controls.items() if widget.disabled}

    churn = {"S_min", "S_max", "S_noise"}
    assert off() == {*GUIDANCE, "class_index", *churn}
    controls["data"].value, controls["S_churn"].value = "digits without classes", 10
    assert off() == {"class_index"}
    controls["data"].value = "ten digits"
    assert off() == set()
    controls["guidance"].value = 1.0
    assert off() == {"guidance_min", "guidance_max"}
    controls["guidance"].value = 2.0
    controls["discretization"].value = "vp"
    assert off() == {"rho"}
    controls["solver"].value = "dpmpp_2m"
    assert off() == {"rho", "schedule", "scaling", "S_churn", *churn}
    controls["solver"].value = "ddim"
    assert off() == {"discretization", "schedule", "scaling", "rho", "sigma_min", "sigma_max", "S_churn", *churn}
    assert not applies("solver", START | {"view": FOUR}) and applies("N", START | {"view": FOUR})


def test_ddim_and_churn_and_impossible_settings():
    ddim = result(solver="ddim", N=50)
    assert ddim.trajectories.evaluations == 50 and ddim.trajectories.sigma[0] > 150 and ddim.error < 0.1
    churned = [result(S_churn=40.0, S_noise=noise) for noise in (1.0, 1.1)]
    assert "random" in churned[0].caption() and not torch.equal(churned[0].trajectories.x[-1], churned[1].trajectories.x[-1])
    with pytest.raises(UserError, match="lower sigma_min"):
        finish(results(**START | preset("VP") | {"sigma_min": 1.0}))
    with pytest.raises(UserError, match="S_min"):
        trajectories.sampler_config("two peaks", 8, S_min=2.0, S_max=1.0)


def test_a_setting_that_does_not_apply_is_not_used(monkeypatch):
    seen = []
    monkeypatch.setattr("lab.playground.draw", lambda **settings: seen.append(settings))
    draw_used(**START | {"solver": "dpmpp_2m", "S_churn": 40.0, "S_min": 5.0, "S_max": 2.0, "schedule": "vp"})
    draw_used(**START | {"data": "ten digits", "guidance": 1.0, "guidance_min": 5.0, "guidance_max": 2.0})
    draw_used(**START | {"S_churn": 40.0, "S_min": 0.1})
    assert seen[0] == START | {"solver": "dpmpp_2m"}
    assert seen[1] == START | {"data": "ten digits", "guidance": 1.0}
    assert seen[2] == START | {"S_churn": 40.0, "S_min": 0.1}


def test_a_solution_is_continued_where_it_was_interrupted():
    settings = START | {"seed": 7}
    computation = results(**settings)
    for _ in range(500):
        next(computation)
    computation.close()
    solution = solution_of("two peaks", 80.0, (), 7, None)
    assert solution.trajectories is None and sum(1 for _ in solution.steps) < 1000 - 450
    assert solution.trajectories.evaluations == 1999 and finish(results(**settings))[ONE].solution is solution


def test_digits_are_drawn_by_the_shipped_network(monkeypatch):
    """Guidance doubles the evaluations in its interval; the class holds for all ten; there is a figure before and after the
    solution, which has the same guidance."""
    assert [trajectories.load_problem(data).config.name for data in trajectories.TRAINED] == [
        name for name, _ in trajectories.TRAINED.values()
    ]
    solution_of.cache_clear()
    problem = trajectories.load_problem("ten digits")
    monkeypatch.setattr(trajectories, "load_problem", lambda data: problem._replace(fine=3, count=2))
    settings = START | {"data": "ten digits", "N": 2, "class_index": 3}
    found = finish(results(**settings))[ONE]
    assert found.trajectories.evaluations == 6 and found.trajectories.x.shape == (3, 2, 1, 32, 32)
    assert finish(results(**settings | {"guidance": 1.0}))[ONE].trajectories.evaluations == 3
    low = finish(results(**settings | {"guidance_max": 10.0}))[ONE]
    assert low.trajectories.evaluations == 5 and not torch.equal(low.solution.trajectories.x, found.solution.trajectories.x)
    other = finish(results(**settings | {"class_index": "all"}))[ONE]
    assert not torch.equal(other.trajectories.x[-1], found.trajectories.x[-1]) and found.error > 0
    solution_of.cache_clear()
    figures = [figure for figure in trajectories.draw(**settings) if figure]
    assert len(figures) == 2 and all(isinstance(figure, Figure) for figure in figures)


def test_digits_without_classes_are_guided_by_a_worse_network(monkeypatch):
    problem = trajectories.load_problem("digits without classes")
    monkeypatch.setattr(trajectories, "load_problem", lambda data: problem._replace(fine=3, count=2))
    settings = START | {"data": "digits without classes", "N": 2}
    guide, alone, twice = (finish(results(**settings | {"guidance": weight}))[ONE].trajectories for weight in (0.0, 1.0, 2.0))
    assert (alone.evaluations, twice.evaluations) == (3, 6)
    # All three start at the same x, so the first denoised images lie on a line: D_guide, D and twice as far.
    assert torch.allclose(twice.denoised[0] - alone.denoised[0], alone.denoised[0] - guide.denoised[0], atol=1e-5)
    assert (alone.denoised[0] - guide.denoised[0]).abs().max() > 1e-3


@pytest.mark.parametrize("view", [ONE, FOUR])
@pytest.mark.parametrize("data", ["two points", "2-D mixture", "2-D spiral"])
def test_every_toy_problem_is_drawn(data, view, monkeypatch):
    solution_of.cache_clear()
    problem = trajectories.load_problem(data)
    monkeypatch.setattr(trajectories, "load_problem", lambda data: problem._replace(fine=20))
    figure = finish(trajectories.draw(**START | {"data": data, "view": view}))
    assert len(figure.axes) == (8 if view == FOUR else 2) and module.png(figure)
    solution_of.cache_clear()

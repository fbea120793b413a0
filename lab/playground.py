"""The playground: solvers, schedules, churn and guidance as live controls, on toy data and on trained networks."""

import math
from collections.abc import Iterable, Iterator

from matplotlib.figure import Figure

from edm.sampler import SOLVERS
from edm.schedule import DISCRETIZATIONS, SCALINGS, SCHEDULES
from lab.live import Live, control, in_line, is_static, live, show, values_of, widgets
from lab.trajectories import FILES, FOUR, GUIDANCE, ONE, TRAINED, VIEWS, draw, load_problem, preset

DATA = ("two peaks", "two points", "2-D mixture", "2-D spiral", *TRAINED)
ALT = "Paths of a sampler from noise to data, with its error and the number of evaluations of the denoiser"
START = {"data": DATA[0], "view": ONE, "N": 8, "seed": 0, "class_index": "all", **preset("EDM")}
START |= {"guidance": 1.5, "guidance_min": 0.001, "guidance_max": 250.0}


def applies(name: str, settings: dict[str, object]) -> bool:
    """Return whether a control changes what is computed with these settings."""
    if name in ("data", "view", "N", "seed"):
        return True
    if name in ("guidance_min", "guidance_max") and settings["guidance"] == 1:
        return False
    if name in GUIDANCE:
        return settings["data"] in TRAINED
    if name == "class_index":
        return settings["data"] in TRAINED and load_problem(settings["data"]).config.network.label_dim > 0
    if settings["view"] == FOUR:
        return False
    if name == "solver":
        return True
    if settings["solver"] == "ddim":  # it has noise levels of its own
        return False
    if settings["solver"] == "dpmpp_2m" and (name in ("schedule", "scaling") or name.startswith("S_")):
        return False  # sigma(t) and s(t) cancel out, and there is no churn
    if name == "rho":
        return settings["discretization"] == "edm"
    return name not in ("S_min", "S_max", "S_noise") or settings["S_churn"] > 0


def draw_used(**settings: object) -> Iterator[Figure | None]:
    """Draw these settings; those that do not apply are as at the start."""
    return draw(**{name: value if applies(name, settings) else START[name] for name, value in settings.items()})


def make_controls() -> dict[str, "widgets.Widget"]:
    """Return the controls by the names of the settings, at EDM's values."""

    def choice(names: Iterable[str]) -> "widgets.Widget":
        return widgets.Dropdown(options=list(names))

    def logarithmic(low: float, high: float) -> "widgets.Widget":
        options = {"min": math.log10(low), "max": math.log10(high), "step": 0.001, "readout_format": ".3g"}
        return widgets.FloatLogSlider(value=low, **options)

    specs = {
        "data": widgets.ToggleButtons(options=DATA, style={"button_width": "auto"}),
        "view": widgets.ToggleButtons(options=VIEWS),
        "solver": choice([*SOLVERS, "ddim"]),
        "discretization": choice(DISCRETIZATIONS),
        "schedule": choice(SCHEDULES),
        "scaling": choice(SCALINGS),
        "N": (1, 64, 1),
        "rho": (1.0, 15.0, 0.5),
        "sigma_min": logarithmic(0.001, 1.0),
        "sigma_max": logarithmic(1.0, 250.0),
        "guidance": (0.0, 4.0, 0.1),
        "guidance_min": logarithmic(0.001, 10.0),
        "guidance_max": logarithmic(0.1, 250.0),
        "class_index": ["all", *range(10)],
        "S_churn": (0.0, 80.0, 1.0),
        "S_min": logarithmic(0.001, 10.0),
        "S_max": logarithmic(0.1, 200.0),
        "S_noise": (0.9, 1.1, 0.001),
        "seed": (0, 99),
    }
    controls = {name: control(name, spec) for name, spec in specs.items()}
    controls["class_index"].description = "class"
    controls["S_noise"].readout_format = ".3f"
    for name, widget in controls.items():
        widget.value = START[name]
        if name not in ("data", "view"):
            widget.layout.width, widget.style.description_width = "286px", "100px"
    return controls


def make_panel(controls: dict[str, "widgets.Widget"]) -> "widgets.Widget":
    """Return the controls in columns, with a button for each preset, and switch off those that do not apply."""

    def button(name: str) -> "widgets.Widget":
        def press(_):
            for key, value in preset(name).items():
                controls[key].value = value
            controls["view"].value = ONE

        made = widgets.Button(description=name, tooltip=f"Table 1: {name}", layout={"width": "90px"})
        made.on_click(press)
        return made

    def update(_=None):
        settings = values_of(controls)
        for name, widget in controls.items():
            widget.disabled = not applies(name, settings)

    for widget in controls.values():
        widget.observe(update, "value")
    update()
    columns = (
        ("solver", "discretization", "schedule", "scaling", "N", "rho"),
        ("sigma_min", "sigma_max", *GUIDANCE, "class_index"),
        ("S_churn", "S_min", "S_max", "S_noise", "seed"),
    )
    first = [in_line(controls[name], width="60px") for name in ("data", "view")]
    presets = widgets.HBox([widgets.Label("presets", layout={"width": "60px"}), *map(button, FILES)])
    table = widgets.HBox([widgets.VBox([controls[name] for name in names]) for names in columns])
    return widgets.VBox([*first, presets, table])


def playground() -> None:
    """Display the samplers' choices as controls, with the paths from noise to data, their error and their cost."""
    if is_static():  # a picture for each preset
        return live(lambda column: draw(**START | preset(column)), ALT, column=list(FILES))
    controls = make_controls()
    shown = Live(draw_used, ALT, controls, make_panel(controls))
    show(shown.view, shown.png, ALT)

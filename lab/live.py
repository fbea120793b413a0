"""Live controls for a notebook: every change of a control calls a function that draws, and shows its new picture."""

import asyncio
import base64
import html
import inspect
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from lab.cli import UserError, one_line

try:
    import ipywidgets as widgets
except ImportError:  # pictures are shown without controls
    widgets = None

GREEK = "alpha", "beta", "gamma", "lambda", "rho", "sigma"
DEBOUNCE = 0.1  # seconds without a further change before a picture is drawn
CHUNK, PAUSE = 0.05, 0.005  # seconds of computing, and then of rest, in which the kernel answers
MAX_PREPARED = 12  # pictures of a page without a kernel


def png(figure: Figure, colours: int = 128) -> bytes:
    """Return the figure as a PNG file of few colours, which keeps notebooks small."""
    canvas, file = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(colours, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return file.getvalue()


def img(picture: bytes, alt: str) -> str:
    """Return a PNG file as an HTML image; `decoding` keeps it from flickering when it replaces another."""
    width, height = Image.open(io.BytesIO(picture)).size
    source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    style = "max-width: 100%; height: auto"
    return f'<img src="{source}" alt="{html.escape(alt)}" width={width} height={height} decoding=sync style="{style}">'


def label(name: str) -> str:
    """Return the name of a control as the paper writes it, with Greek letters."""
    return "_".join(html.unescape(f"&{part};") if part in GREEK else part for part in name.split("_"))


def slider(low: float, high: float, step: float | None = None, start: float | None = None) -> tuple[float, ...]:
    """Complete a slider's (low, high[, step[, start]]): it starts at about the middle."""
    step = step or (1 if isinstance(low, int) and isinstance(high, int) else (high - low) / 50)
    return low, high, step, low + round((high - low) / 2 / step) * step if start is None else start


def first_value(spec: object) -> object:
    """Return the value that a control has at first; `spec` is as in `live`."""
    if isinstance(spec, tuple):
        return slider(*spec)[-1]
    if isinstance(spec, list | dict):
        return next(iter(spec.values() if isinstance(spec, dict) else spec))
    return spec


def control(name: str, spec: object) -> "widgets.Widget":
    """Return the widget for a control; `spec` is as in `live`."""
    if isinstance(spec, widgets.Widget):
        spec.description = spec.description or label(name)
        return spec
    options = {"description": label(name), "value": first_value(spec), "style": {"description_width": "initial"}}
    options["layout"] = {"width": "280px" if isinstance(spec, tuple) else "max-content"}
    if isinstance(spec, bool):
        return widgets.Checkbox(indent=False, **options)
    if isinstance(spec, tuple):
        low, high, step, start = slider(*spec)
        whole = all(isinstance(number, int) for number in (low, high, step, start))
        return (widgets.IntSlider if whole else widgets.FloatSlider)(min=low, max=high, step=step, **options)
    named = spec if isinstance(spec, dict) else {str(value): value for value in spec}
    few = len(named) <= 6 and sum(map(len, named)) <= 40
    if few:
        options["style"]["button_width"] = "auto"
    return (widgets.ToggleButtons if few else widgets.Dropdown)(options=list(named.items()), **options)


def in_line(widget: "widgets.Widget", width: str = "max-content") -> "widgets.Widget":
    """Return a control in one line: the name of a group of buttons beside it, where ipywidgets would put it above."""
    if not isinstance(widget, widgets.ToggleButtons):
        return widget
    name, widget.description = widgets.Label(widget.description, layout={"width": width}), ""
    return widgets.HBox([name, widget])


def in_rows(controls: Iterable["widgets.Widget"]) -> "widgets.Widget":
    """Return the controls side by side, in as many rows as the page's width needs."""
    return widgets.HBox(list(map(in_line, controls)), layout={"flex_flow": "row wrap", "grid_gap": "2px 24px"})


def pictures(draw: Callable, alt: str, values: dict) -> Iterator[tuple[bytes | None, str] | None]:
    """Call `draw` with the controls' values; yields after each part of the computation.

    Yields:
        None, or a picture: the PNG file, and it as HTML. An error ends the computation; then there is no file, and the HTML is
        the error as a line.
    """
    try:
        result = draw(**values)
        for figure in result if inspect.isgenerator(result) else [result]:
            picture = None if figure is None else png(figure)
            yield picture and (picture, img(picture, alt))
    except Exception as error:  # of any kind, as learners edit what is drawn
        kind = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
        text = html.escape(one_line(f"{kind}{error}"))
        yield None, f'<span role="alert" style="color: firebrick">{text}</span>'


def values_of(controls: dict[str, "widgets.Widget"]) -> dict[str, object]:
    """Return the values of the controls by their names, without the rounding errors of sliders."""
    values = {name: widget.value for name, widget in controls.items()}
    return {name: round(value, 9) if isinstance(value, float) else value for name, value in values.items()}


class Live:
    """A picture with controls. The first picture is drawn at once, later ones in the kernel's event loop.

    Args:
        draw, alt: as in `live`.
        controls: the widgets; `draw` gets their values under these names.
        panel: the widget that shows them; by default they stand in rows.
    """

    def __init__(self, draw: Callable, alt: str, controls: dict[str, "widgets.Widget"], panel: "widgets.Widget | None" = None):
        self.draw, self.alt, self.controls = draw, alt, controls
        self.png: bytes | None = None  # the latest picture
        self.task: asyncio.Task | None = None  # the computation that goes on, or the last one
        self.picture, self.message = widgets.HTML(), widgets.HTML()
        self.view = widgets.VBox([panel or in_rows(controls.values()), self.message, self.picture])
        for _ in self.redraw():
            pass
        for widget in controls.values():
            widget.observe(self.changed, "value")

    def redraw(self) -> Iterator[None]:
        """Draw with the controls' values of now; yields after each part. With an error, the picture before it stays."""
        for shown in pictures(self.draw, self.alt, values_of(self.controls)):
            if shown and shown[0]:
                self.png, self.picture.value, self.message.value = *shown, ""
            elif shown:
                self.message.value = shown[1]
            yield

    def changed(self, change: object = None) -> None:
        """Cancel the computation that goes on, and begin one with the new values."""
        if self.task:
            self.task.cancel()
        self.task = asyncio.get_running_loop().create_task(self.redraw_soon())

    async def redraw_soon(self) -> None:
        """Wait for further changes, then draw with pauses, in which a newer change can cancel this task."""
        await asyncio.sleep(DEBOUNCE)
        rested = time.monotonic()
        for _ in self.redraw():
            if time.monotonic() - rested > CHUNK:
                await asyncio.sleep(PAUSE)
                rested = time.monotonic()


def choices(widget: "widgets.Widget") -> dict[str, object]:
    """Return up to 12 values of a control, the present one among them, by their names."""
    if isinstance(widget, widgets.Checkbox):
        return {"off": False, "on": True}
    if isinstance(widget, widgets.IntSlider | widgets.FloatSlider | widgets.FloatLogSlider):
        is_log = isinstance(widget, widgets.FloatLogSlider)
        last = round((widget.max - widget.min) / widget.step)
        places = [widget.min + round(i * last / (MAX_PREPARED - 1)) * widget.step for i in range(MAX_PREPARED)]
        values = sorted({widget.base**place if is_log else place for place in places})
        nearest = min(values, key=lambda value: abs(value - widget.value))
        return {f"{value:.4g}": value for value in sorted({*values, widget.value} - ({nearest} - {widget.value}))}
    if isinstance(widget, widgets.ToggleButtons | widgets.Dropdown | widgets.SelectionSlider):
        return dict(list(zip(widget._options_labels, widget._options_values))[:MAX_PREPARED])
    return {str(widget.value): widget.value}


def prepared(draw: Callable, alt: str, controls: dict[str, "widgets.Widget"]) -> tuple["widgets.Widget", bytes | None]:
    """Return the first control with a picture for each of its values, which needs no kernel, and the picture at first."""
    (first, widget), others = next(iter(controls.items())), values_of(controls)
    values = choices(widget)
    index = list(values.values()).index(widget.value)
    shown = [[*filter(None, pictures(draw, alt, others | {first: value}))][-1] for value in values.values()]
    stack = widgets.Stack([widgets.HTML(markup) for _, markup in shown], selected_index=index)
    choice = widgets.SelectionSlider(options=list(values), index=index, description=label(first), layout={"width": "450px"})
    widgets.jslink((choice, "index"), (stack, "selected_index"))
    return widgets.VBox([choice, stack]), shown[index][0]


def is_static() -> bool:
    """Return whether there is no kernel, or there are no widgets, that could answer changes."""
    return widgets is None or bool(os.environ.get("EDM_STATIC"))


def show(view: "widgets.Widget | None", picture: bytes | None, alt: str, error: str = "") -> None:
    """Display widgets, and in the same output the picture, for where widgets are not drawn, such as GitHub.

    Args:
        view: the widgets, or None to display the picture alone.
        picture: a PNG file, or None if it could not be drawn.
        alt: what it shows.
        error: HTML that is displayed if there are neither widgets nor a picture.
    """
    from IPython.display import display

    data = view._repr_mimebundle_() if view else {}
    if not view and not picture:
        data = {"text/html": error}
    if picture:
        data |= {"image/png": base64.b64encode(picture).decode(), "text/plain": alt}
    display(data, metadata={"image/png": {"alt": alt}}, raw=True)


def live(draw: Callable, alt: str = "", **controls) -> None:
    """Display controls and the picture that is drawn with their values; every change draws it anew.

    For a page that works without a kernel, set the environment variable EDM_STATIC: then the first control alone is shown,
    with a picture for each of up to 12 values.

        EDM_STATIC=1 jupyter nbconvert --to html --execute notebooks/design_space.ipynb

    Args:
        draw: a function of the controls' values that returns a `matplotlib.figure.Figure`. A generator function may yield
            several, each replacing the one before, and None after a part of a long computation: the kernel answers there, and
            a newer change ends the computation.
        alt: describes the picture to readers who cannot see it.
        controls: (low, high[, step[, start]]) is a slider, of whole numbers if all of these are; a list, or a dict of names
            and values, is a choice; a bool is a checkbox; a widget of ipywidgets is used as it is.
    """
    if widgets is None:
        *_, (picture, markup) = filter(None, pictures(draw, alt, {name: first_value(spec) for name, spec in controls.items()}))
        show(None, picture, alt, error=markup)
        print("For live controls: pip install ipywidgets")
        return
    made = {name: control(name, spec) for name, spec in controls.items()}
    if is_static():
        view, picture = prepared(draw, alt, made)
    else:
        shown = Live(draw, alt, made)
        view, picture = shown.view, shown.png
    show(view, picture, alt)

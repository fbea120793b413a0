"""In JupyterLab, in a real browser, the controls of the notebooks are moved, and the pictures change."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
from ipykernel.kernelspec import install

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

PLAYGROUND = """import sys
sys.path.insert(0, "..")
from lab.playground import playground
playground()"""
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are drawn as well
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture
def notebooks(tmp_path, root):
    """The folder of the notebooks in a copy of the repository, which JupyterLab may write to, with playground.ipynb."""
    copy = tmp_path / "copy"
    shutil.copytree(root / "notebooks", copy / "notebooks")
    for item in root.iterdir():
        if item.name not in ("notebooks", ".git"):
            (copy / item.name).symlink_to(item)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(PLAYGROUND)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), copy / "notebooks/playground.ipynb")
    return copy / "notebooks"


@pytest.fixture
def server(tmp_path, notebooks):
    """The address of a JupyterLab that shows these notebooks, with a kernel of this Python, and no access from outside."""
    install(prefix=str(tmp_path))
    for name, values in SETTINGS.items():
        path = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config"}
    environment = {
        **os.environ,
        **{name: str(tmp_path / folder) for name, folder in folders.items()},
        "IPYTHONDIR": str(tmp_path),
        "JUPYTER_PATH": str(tmp_path / "share" / "jupyter"),
    }
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={notebooks}"]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=file, stderr=file)
    try:
        while not (address := re.search(r"(http://127\.0\.0\.1:\d+)/lab\?(token=\w+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield address.groups()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def page(server, browser):
    """page(notebook): a browser's page that shows the notebook after Run All."""
    address, token = server
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(60_000)

    def run(notebook: str):
        page.goto(f"{address}/lab/tree/{notebook}?{token}")
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        last = page.locator(".jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)").last  # a folded cell shows no number
        expect(last).to_have_text(re.compile(r"\[\d+\]:"), timeout=480_000)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        return page

    yield run
    page.close()


def change(picture, action) -> None:
    """Assert that the picture changes, and keeps its alternative text, after an action."""
    before = picture.get_attribute("src")
    action()
    expect(picture).not_to_have_attribute("src", before, timeout=60_000)
    assert picture.get_attribute("alt")


def check_errors(page) -> None:
    """Assert that no cell and no picture reports an error or a warning."""
    for sign in ("[data-mime-type='application/vnd.jupyter.stderr']", "[data-mime-type*=error]", "[role=alert]"):
        assert page.locator(f".jp-OutputArea {sign}").all_inner_texts() == []


def test_the_playground(page, tmp_path):
    page = page("playground.ipynb")
    picture = page.locator(".widget-html-content img")
    page.screenshot(path=tmp_path / "1.png")
    change(picture, lambda: page.get_by_role("button", name="VE", exact=True).click())
    expect(page.locator(".widget-dropdown", has_text="schedule").locator("select")).to_have_value("ve")
    page.screenshot(path=tmp_path / "2.png")
    change(picture, lambda: page.get_by_role("button", name="2-D spiral").click())
    change(picture, lambda: page.get_by_role("slider").first.press("ArrowRight"))  # N
    page.screenshot(path=tmp_path / "3.png")
    change(picture, lambda: page.get_by_role("button", name="the four presets").click())
    page.screenshot(path=tmp_path / "4.png")
    change(picture, lambda: page.get_by_role("button", name="ten digits", exact=True).click())
    page.screenshot(path=tmp_path / "5.png")
    change(picture, lambda: page.get_by_role("button", name="one sampler").click())
    page.screenshot(path=tmp_path / "6.png")
    check_errors(page)


def test_the_notebook(page, tmp_path):
    """The first control that is a slider is moved in three of its pictures."""
    page = page("design_space.ipynb")
    live = page.locator(".jp-OutputArea-output:has([role=slider]):has(.widget-html-content img)")
    assert live.count() >= 3
    for index in range(3):
        picture = live.nth(index).locator(".widget-html-content img")
        change(picture, lambda: live.nth(index).get_by_role("slider").first.press("ArrowRight"))  # noqa: B023
        page.screenshot(path=tmp_path / f"{index}.png")  # of the page, as the picture may be replaced meanwhile
    check_errors(page)

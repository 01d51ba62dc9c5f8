"""The explorer in JupyterLab in a real browser. Skipped if there is no browser."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")

CELL = """
import itertools
import torch
from iapo_mini.policy import load_policy
from iapo_mini.tasks import stories
from iapo_mini.tools.widgets import explorer
torch.set_num_threads(1)
policy = load_policy("embedded", lora_rank=0)
explorer(policy, list(itertools.islice(stories("test", seed=1), 2)), num_generations=2)
"""


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab that serves a folder with one notebook."""
    cell = {"cell_type": "code", "metadata": {}, "source": CELL.strip(), "outputs": []}
    cell |= {"execution_count": None, "id": "explorer"}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "explore.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    home = {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path)}
    with (tmp_path / "lab.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | home, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def test_explorer_moves_in_jupyterlab(lab, tmp_path):
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(240_000)
        page.goto(f"{lab}/lab/tree/explore.ipynb")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        # A notebook that is run before its kernel is ready opens a dialog.
        kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
        page.wait_for_function(f"{kernel}?.status === 'idle'")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells') && null")
        shown = page.get_by_text("answer, if forced now")
        shown.wait_for()
        at_the_start = shown.locator("..").inner_text()
        unread = page.locator(".jp-OutputArea span[style*='#5c5c5c'], span[style*='92, 92, 92']")
        assert unread.count() > 20 and page.get_by_text("No token is read yet").count() == 1
        read = page.locator(".widget-slider", has_text="tokens read").locator(".noUi-handle")
        read.press("End")
        page.wait_for_function(
            "before => !document.body.innerText.includes(before)", arg=at_the_start
        )
        assert "H = " in shown.locator("..").inner_text()
        assert unread.count() == 0 and page.get_by_text("✓ right").count() == 1
        page.get_by_label("token number").fill("2")
        page.get_by_label("token number").press("Enter")
        page.wait_for_function(
            "[...document.querySelectorAll('.jp-OutputArea span')]"
            ".filter(e => getComputedStyle(e).color === 'rgb(92, 92, 92)').length > 20"
        )

        page.get_by_role("button", name="IAPO advantage").click()
        page.get_by_text("IAPO advantage of each token").wait_for()
        page.screenshot(path=tmp_path / "explorer.png")
        browser.close()

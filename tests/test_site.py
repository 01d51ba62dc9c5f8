"""The site: it builds without a warning, its links lead somewhere, and its explorer moves.

Skipped where the tools of the site, node or a Chromium are not installed.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from helpers import PATIENCE, load_script

from iapo_mini.advantages import grpo, iapo
from iapo_mini.information import informativeness
from iapo_mini.problems.stories import stories
from iapo_mini.rollouts import Rollouts

ROOT = Path(__file__).parent.parent
STATIC = ROOT / "site" / "static"
TOOLS = ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinx-mathjax-offline")
MISSING = [name for name in TOOLS if importlib.util.find_spec(name) is None]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


BUILD, EXPORT = (load_script(ROOT / f"site/{name}.py") for name in ("build", "export_stories"))
SCENES = json.loads((STATIC / "explorer.json").read_text(encoding="utf-8"))["scenes"]
SHOWN = [(scene, completion) for scene in SCENES for completion in scene["completions"]]


# ---- How links are turned ----


@pytest.mark.parametrize(
    ("target", "page", "expected"),
    [
        ("results.md#a", "docs/methods.md", "results.md#a"),
        ("../iapo_mini/advantages.py", "docs/methods.md", "../api/iapo_mini.advantages.rst"),
        ("../iapo_mini/early_exit", "docs/methods.md", "../api/iapo_mini.early_exit.rst"),
        ("docs/data.md", "README.md", "docs/data.md"),
        ("../notebooks/solutions", "docs/syllabus.md", "../course.md"),
        ("../figures/table1.png", "docs/results.md", "../figures/table1.png"),
        ("#here", "docs/results.md", "#here"),
        ("https://arxiv.org/abs/1", "docs/results.md", "https://arxiv.org/abs/1"),
        (f"{BUILD.REPOSITORY}/blob/main/docs/data.md#b", "notebooks/00_quickstart.ipynb",
         "../docs/data.md#b"),
        (f"{BUILD.REPOSITORY}/issues", "README.md", f"{BUILD.REPOSITORY}/issues"),
        ("tests/conftest.py", "README.md", f"{BUILD.REPOSITORY}/blob/main/tests/conftest.py"),
        ("../tests", "docs/data.md", f"{BUILD.REPOSITORY}/tree/main/tests"),
    ],
)  # fmt: skip
def test_a_link_stays_inside_where_there_is_a_page(target, page, expected):
    assert BUILD.turn(target, page, BUILD.pages()) == expected


def test_links_of_a_text_are_turned_and_its_code_is_not():
    known = {"a.py": "api/a.rst"}
    text = (
        "[`a.py`](a.py), `[x](a.py)` and\n```\n[x](a.py)\n```\n[![Badge](https://x/y)](https://z)"
    )
    turned = "[`a.py`](api/a.rst), `[x](a.py)` and\n```\n[x](a.py)\n```\n[Badge](https://z)"
    assert BUILD.turn_links(text, "b.md", known) == turned


# ---- What the explorer is given ----


def rollouts_of(scene, completion):
    """The exported completion as rollouts of its group; the others are a token long."""
    i, m, size = completion["index"], len(completion["probabilities"]), len(scene["rewards"])
    mask = torch.zeros(size, m, dtype=torch.bool)
    mask[:, 0] = mask[i] = True
    logprobs, potential = torch.zeros(size, m), torch.zeros(size, m + 1)
    logprobs[i] = torch.tensor(completion["probabilities"]).log()
    potential[i] = torch.tensor(completion["entropies"])
    correct = torch.zeros(size, dtype=torch.bool)
    correct[i] = completion["correct"]
    ids = torch.zeros(size, m, dtype=torch.long)
    return Rollouts(
        ids[:, :1], mask[:, :1], ids, mask, logprobs, size, torch.ones(size, dtype=torch.bool)
    ).filled(
        rewards=torch.tensor(scene["rewards"]),
        correct=correct,
        informativeness=informativeness(potential, mask),
    )


def test_export_is_small_and_whole():
    assert (STATIC / "explorer.json").stat().st_size < 400_000
    assert len(SCENES) == EXPORT.STORIES + 1
    for scene, completion in SHOWN:
        m, n = len(completion["probabilities"]), len(completion["tokens"])
        assert 0 <= m - n <= 1 and len(completion["entropies"]) == m + 1
        assert len(completion["answers"]) == len(completion["right"]) == n + 1
        assert all(sum(p for _, p in row) <= 1.01 for row in completion["answers"])
        assert len(scene["rewards"]) == EXPORT.GROUP > completion["index"]
        assert (completion["roles"] is None) == (scene is SCENES[-1])
        # The right answer stands among the likely ones as it stands in the question's answer.
        assert max(completion["right"]) > 0


def test_the_shortest_right_and_the_longest_wrong_completion_are_shown():
    assert EXPORT.choose([True, False, True, False], [9, 4, 7, 8]) == [2, 3]
    assert EXPORT.choose([False, False], [3, 5]) == [1]
    assert EXPORT.gather(iter([None, {"a": 1}, None, {"a": 2}, {"a": 3}]), 2) == [
        {"a": 1},
        {"a": 2},
    ]


def test_an_export_has_what_the_policy_answers_after_every_prefix(base_policy):
    # This policy is random, so that it is never right.
    problem = next(stories("test", seed=0))
    assert EXPORT.export(base_policy, problem, "tiny", limit=4) is None
    rollouts = EXPORT.sample(base_policy, [problem], num_generations=2, max_completion_length=6)
    rollouts = EXPORT.score(rollouts, base_policy.tokenizer, [problem])
    forced = EXPORT.forced_answers(base_policy, rollouts, k=20)
    told = EXPORT.completion(base_policy, problem, rollouts, forced, 1)
    n = len(told["tokens"])
    assert 1 <= n <= 6 and len(told["roles"]) == n and len(told["answers"]) == n + 1
    assert told["answers"][0][0][1] == pytest.approx(float(forced.probabilities[1, 0, 0]), abs=1e-3)
    assert told["entropies"] == pytest.approx(forced.entropies[1, : n + 1].tolist(), abs=1e-4)


@pytest.fixture(scope="module")
def in_javascript():
    """Runs an expression over ``e`` (the explorer's functions) and ``scenes`` in node."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node on this machine")

    def run(expression):
        code = (
            f"const e = require({json.dumps(str(STATIC / 'explorer.js'))});"
            f"const scenes = require({json.dumps(str(STATIC / 'explorer.json'))}).scenes;"
            f"console.log(JSON.stringify({expression}))"
        )
        done = subprocess.run([node, "-e", code], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.05), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_advantages_in_javascript_are_those_of_the_library(in_javascript, alpha, beta):
    each = "scenes.map((s) => s.completions.map((c) => "
    ours = in_javascript(f"{each} e.iapo(s, c, {alpha}, {beta})))")
    plain = in_javascript(f"{each} e.grpo(s, c)))")
    for j, scene in enumerate(SCENES):
        for i, completion in enumerate(scene["completions"]):
            rollouts = rollouts_of(scene, completion)
            row = completion["index"]
            expected = iapo(rollouts, alpha, beta)[row].tolist()
            assert ours[j][i] == pytest.approx(expected, abs=1e-4)
            assert plain[j][i] == pytest.approx(grpo(rollouts)[row].tolist(), abs=1e-5)


def test_a_flat_population_has_no_advantage_in_javascript(in_javascript):
    assert in_javascript("[e.normalize([]), e.normalize([3]), e.normalize([0.1, 0.1, 0.1])]") == [
        [], [0], [0, 0, 0],
    ]  # fmt: skip


def test_text_on_every_colour_can_be_read(in_javascript):
    values = [x / 20 for x in range(-60, 61)]
    for dark in ("false", "true"):
        pairs = in_javascript(f"{values}.map((v) => e.colors(v, 3, {dark}))")
        for pair in pairs:
            ground = [int(c) for c in re.findall(r"\d+", pair["ground"])]
            assert contrast(ground, [255 * (pair["text"] == "#fff")] * 3) >= 4.5


@pytest.mark.parametrize("theme, ground", [("light", "#ffffff"), ("dark", "#14181e")])
def test_unread_tokens_and_marks_can_be_read_in_both_themes(theme, ground):
    """The grounds are those of the theme; the test in a browser compares with what is drawn."""
    css = (STATIC / "site.css").read_text(encoding="utf-8")
    light, dark = re.findall(r"\{([^{}]*--ex-unread: [^{}]*)\}", css)
    own = dark if theme == "dark" else light
    for name, least in (("unread", 4.5), ("right", 3.0), ("bar", 3.0)):
        value = re.search(rf"--ex-{name}: (#\w+);", own)[1]
        pair = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (value, ground)]
        assert contrast(*pair) >= least, (name, value)


def contrast(one, other):
    """WCAG 2's contrast of two colours, each red, green and blue of 0 to 255."""

    def light(color):
        parts = [c / 255 for c in color[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


# ---- The site ----


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site. The build is strict: a warning fails it."""
    if MISSING:
        pytest.skip(f"the extra [site] is not installed: {', '.join(MISSING)}")
    out = tmp_path_factory.mktemp("site") / "html"
    done = subprocess.run(
        [sys.executable, str(ROOT / "site" / "build.py"), "--out", str(out)],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """Anchors of a page, where it leads, and what it loads."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.leads, self.loads = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.leads.add(given["href"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "shortcut icon"):
            self.loads.add(given["href"])
        if given.get("src"):
            self.loads.add(given["src"])


def test_every_link_and_anchor_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    found = [path for path in site.rglob("*.html") if "_static" not in path.parts]
    pages = {path.resolve(): Page(path) for path in found}
    dead = []
    for path, page in pages.items():
        for target in page.leads | page.loads:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https", "mailto") and target not in page.loads:
                continue
            if parts.scheme == "data":
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchored = not parts.fragment or unquote(parts.fragment) in getattr(
                pages.get(file), "anchors", ()
            )
            # Sphinx's script answers these two itself.
            if parts.scheme or parts.netloc or not file.is_file() or not anchored:
                dead.append((path.relative_to(site).as_posix(), target))
    assert not dead, "\n".join(map(" -> ".join, sorted(dead)))
    assert len(pages) > 80


def test_every_document_lesson_and_module_has_a_page(site):
    for page in BUILD.pages().values():
        assert (site / page).with_suffix(".html").exists() or page.startswith("api/")
    for module in BUILD.modules():
        assert (site / f"api/{module}.html").exists()
    advantages = (site / "api/iapo_mini.advantages.html").read_text(encoding="utf-8")
    assert (
        "The first norm is over the group" in advantages
        and f"{BUILD.REPOSITORY}/blob/main/iapo_mini/advantages.py#L" in advantages
    )
    lesson = (site / "notebooks/03_early_exit.html").read_text(encoding="utf-8")
    assert "Try one without it" in lesson and "<img" in lesson


# ---- In a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served: the summaries of its search are fetched, which files can't be."""
    handler = functools.partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def visit(address, browser):
    """Opens a page of the site; at the end, nothing may have gone wrong on any of them."""
    faults, contexts = [], []

    def open_page(name, scheme="light", width=1280, **options):
        size = {"width": width, "height": 900}
        context = browser.new_context(color_scheme=scheme, viewport=size, **options)
        context.set_default_timeout(240_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
        page.on("requestfailed", lambda request: faults.append(request.url))
        page.on(
            "request",
            lambda r: r.url.startswith((address, "file:", "data:")) or faults.append(r.url),
        )
        page.goto(name if name.startswith("file:") else f"{address}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def color(page, selector, name):
    text = page.locator(selector).first.evaluate(f"e => getComputedStyle(e)['{name}']")
    return [float(c) for c in re.findall(r"[\d.]+", text)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_explorer_moves_by_keys_and_by_mouse_and_its_sliders_recolour(visit, scheme):
    page = visit("explorer.html", scheme)
    read = page.locator(".ex-read")
    assert page.locator(".ex-token").count() == len(SHOWN[0][1]["tokens"])
    assert read.count() == 0 and "No token is read yet" in page.locator(".ex-told").inner_text()
    assert page.locator(".ex-right").count() == 1
    ground = color(page, "body", "backgroundColor")
    assert (sum(ground[:3]) < 384) == (scheme == "dark")
    assert contrast(ground, color(page, ".ex-unread", "color")) >= 4.5

    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert read.count() == 2
    page.locator(".ex-strip").press("End")
    assert page.locator(".ex-unread").count() == 0
    heads = page.locator(".ex-heading")
    assert (
        f"H = {SHOWN[0][1]['entropies'][len(SHOWN[0][1]['tokens'])]:.2f}"
        in heads.nth(1).inner_text()
    )
    page.locator(".ex-token").nth(6).click()
    assert read.count() == 7 and "Token 7:" in page.locator(".ex-told").inner_text()
    box = page.locator(".ex-curve svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    assert page.locator(".ex-unread").count() == 0

    page.get_by_role("button", name="IAPO advantage").click()
    before = read.evaluate_all("all => all.map(e => e.style.background)")
    page.get_by_role("slider", name="alpha, weight of information").fill("1")
    after = read.evaluate_all("all => all.map(e => e.style.background)")
    assert before != after
    steps = page.locator(".ex-step").all_inner_texts()
    page.get_by_role("slider", name="alpha, weight of information").fill("0")
    page.get_by_role("slider", name="beta, weight of confidence").fill("0")
    assert len(set(read.evaluate_all("all => all.map(e => e.style.background)"))) == 1
    assert page.locator(".ex-step").all_inner_texts() == steps


def test_explorer_follows_the_switch_of_the_site(visit):
    page = visit("explorer.html")
    page.locator(".ex-strip").press("End")
    light = page.locator(".ex-token").last.evaluate("e => e.style.background")
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(
        "old => [...document.querySelectorAll('.ex-token')].at(-1).style.background !== old",
        arg=light,
    )
    assert contrast(color(page, "body", "backgroundColor"), color(page, ".ex-told", "color")) >= 4.5


def test_explorer_plays_and_pauses_and_needs_no_server(visit, site):
    page = visit((site / "explorer.html").as_uri())
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelectorAll('.ex-read').length >= 3")
    page.get_by_role("button", name="Pause").click()
    at = page.locator(".ex-read").count()
    page.wait_for_timeout(1500)
    assert page.locator(".ex-read").count() == at


def test_explorer_shows_every_problem_and_completion(visit):
    page = visit("explorer.html")
    for j, scene in enumerate(SCENES):
        page.get_by_role("combobox", name="Problem").select_option(str(j))
        assert (
            f"The right answer is {scene['answer']}." in page.locator(".ex-question").inner_text()
        )
        for completion in scene["completions"]:
            name = f"{'right' if completion['correct'] else 'wrong'}, {len(completion['tokens'])}"
            page.get_by_role("button", name=name).click()
            assert page.locator(".ex-token").count() == len(completion["tokens"])
            page.locator(".ex-strip").press("End")
            assert "NaN" not in page.locator("#token-explorer").inner_html()
            assert page.locator(".ex-right").count() == 1


def test_explorer_fits_a_telephone_and_is_touched(visit):
    page = visit("explorer.html", width=400, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.locator(".ex-token").nth(4).tap()
    assert page.locator(".ex-read").count() == 5
    unnamed = page.locator("#token-explorer :is(button, input, select)").evaluate_all(
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim())).length"
    )
    assert unnamed == 0


def test_equations_are_drawn_and_the_search_finds(visit):
    page = visit("index.html")
    page.wait_for_selector("mjx-container svg")
    assert page.get_by_role("link", name="Try the explorer").is_visible()
    page = visit("notebooks/05_the_advantage_term_by_term.html")
    page.wait_for_selector("mjx-container svg")
    page = visit("search.html?q=exploration")
    page.wait_for_selector("#search-results li a")

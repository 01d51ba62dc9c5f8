"""What the project says of itself is what its files hold."""

import json
import re
from pathlib import Path

import pytest

from iapo_mini.experiments import table

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def full():
    return json.loads((ROOT / "figures/results/compare_full.json").read_text())


def test_readme_table_is_the_committed_result(full):
    assert table(full) in (ROOT / "README.md").read_text()


def test_full_result_has_five_seeds_and_every_metric(full):
    assert len(full["seeds"]) == 5
    for method in ("start", "grpo", "iapo"):
        for metric in ("length", "pass@1", "pass@8", "ratio@8"):
            values = full["methods"][method][metric]
            assert len(values) == 5 and all(v > 0 for v in values)


def test_readme_files_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
        assert (ROOT / target).exists(), target


def test_committed_log_ends_where_the_policy_report_says():
    folder = ROOT / "iapo_mini/embedded"
    last = json.loads((folder / "pretrain_log.jsonl").read_text().splitlines()[-1])
    policy = json.loads((ROOT / "figures/results/policy.json").read_text())
    assert policy["train_minutes"] == last["minutes"] <= 60


def test_embedded_policy_is_small_and_holds_no_pickle():
    files = list((ROOT / "iapo_mini/embedded").iterdir())
    assert sum(f.stat().st_size for f in files) < 12e6
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_notebooks_keep_their_outputs_and_stay_small():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        assert path.stat().st_size < 1_000_000
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert all(c["execution_count"] for c in cells), f"{path.name} was not run"
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
        assert not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]

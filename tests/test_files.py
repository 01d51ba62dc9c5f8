"""Reading JSON back: an object, or one sentence that names the file."""

import pytest

from iapo_mini.files import read_json, write_json
from iapo_mini.lab.assess import assess
from iapo_mini.lab.claims import _theory
from iapo_mini.lab.estimators import estimator_study
from iapo_mini.lab.results import results_path
from iapo_mini.lab.tuning import tuned

DAMAGED = [b"", b"{", b"[1]", b"null", b'{"a": "\xff"}', b'{"a":' * 10**5, b"9" * 5000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    for default in (None, {}):
        with pytest.raises(ValueError, match=r"\A'.*x.json' can't be used \(.+\); restore") as told:
            read_json(file, default)
        assert "\n" not in str(told.value)


def test_a_missing_file_gives_the_default_or_is_named(tmp_path):
    assert read_json(tmp_path / "x.json", {"a": 1}, needs=("b",)) == {"a": 1}
    with pytest.raises(ValueError, match=r"x.json' can't be used \(.*No such file"):
        read_json(tmp_path / "x.json")


def test_a_key_that_is_needed_is_named(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json", needs=("a",)) == {"a": 1}
    with pytest.raises(ValueError, match=r"it lacks 'b'"):
        read_json(tmp_path / "x.json", needs=("a", "b"))


def test_damaged_results_are_reported_before_they_are_used(tmp_path):
    for name, read in (
        ("tuning", lambda: tuned("full", tmp_path / "out", tmp_path, None)),
        ("theory", lambda: _theory("full", tmp_path)),
        ("estimator", lambda: estimator_study(tmp_path)),
    ):
        file = results_path(tmp_path, name, "full")
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"trials": ', encoding="utf-8")
        with pytest.raises(ValueError, match=rf"{name}.json' can't be used"):
            read()


def test_a_policy_without_the_log_of_its_pretraining_is_not_assessed(tmp_path):
    with pytest.raises(ValueError, match="folder must hold the log of pretraining"):
        assess(tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())

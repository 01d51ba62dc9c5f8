"""Absurd values for every number of every command: one sentence, before any work begins."""

import argparse
import dataclasses

import pytest
from matplotlib.figure import Figure

from iapo_mini import cli, options
from iapo_mini.errors import MOST_SEED, check_choice, check_number, check_temperature, shown
from iapo_mini.lab import pretrain
from iapo_mini.tools.explain import check_figure

ABSURD = ["", "abc", "nan", "inf", "-inf", "-1", "-1e400", "1e400", "9" * 23, "9" * 5000]

NEEDED = {
    "look": ["run"],
    "train": ["--out", "x"],
    "explain": ["-"],
    "diagnose": ["run"],
    "lab figures": ["estimator"],
    "lab real": ["--model", "embedded", "--data-file", "f"],
    "lab real-calibration": ["--data-file", "f"],
}
"""What else a command must be given."""

NUMBERS = (options.whole, options.number, options.number_or_word)


def commands(parser, way=()):
    """Every command as (words, parser)."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield " ".join(way), parser
    for name, part in inner[0].choices.items() if inner else ():
        yield from commands(part, (*way, name))


OPTIONS = [
    (command, action.option_strings[0])
    for command, parser in commands(cli._parser())
    for action in parser._actions
    if action.type in NUMBERS
]


PARSER = cli._parser()


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """An empty working folder in which no model may be loaded."""
    monkeypatch.setattr(cli, "_parser", lambda: PARSER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("iapo_mini.policy.AutoModelForCausalLM", None)
    return tmp_path


def told(capsys, run, arguments):
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == "" and len(lines) == 1 and len(lines[0]) < 250, printed
    return lines[0]


def test_the_numbers_of_all_commands_are_found():
    assert len(OPTIONS) > 50
    assert {c for c, _ in OPTIONS} == {c for c, _ in commands(cli._parser())} - {
        "export",
        "methods",
    }


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=map(" ".join, OPTIONS))
def test_absurd_numbers_are_refused_in_one_sentence(command, option, idle, capsys):
    name = {"--completion": "--max-completion-length"}.get(option, option)
    for value in ABSURD:
        given = [*command.split(), *NEEDED.get(command, []), f"{option}={value}"]
        sentence = told(capsys, cli.main, given).replace("_", "-")
        assert f"{name[2:]} must be" in sentence or f"{option[2:]} must be" in sentence, given
        assert ", got" in sentence
        assert not list(idle.rglob("*.json*"))


@pytest.mark.parametrize("field", dataclasses.fields(pretrain.Settings), ids=lambda f: f.name)
def test_absurd_numbers_of_pretrain_are_refused_in_one_sentence(field, idle, capsys):
    for value in ABSURD if field.name != "checkpoint_every" else []:
        option = "--" + field.name.replace("_", "-")
        for doing in ([], ["--report-only"], ["--calibrate"]):
            sentence = told(capsys, pretrain.main, [f"{option}={value}", *doing])
            assert "must be" in sentence and ", got" in sentence
    assert not list(idle.iterdir())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --out x --lora-rank 99999999999999999999999",
         "iapo-mini: lora_rank must be at most 16384, got 99999999999999999999999"),
        ("train --out x --threads 1000000",
         "iapo-mini: threads must be at most 1024, got 1000000"),
        ("explain - --seed 99999999999",
         "iapo-mini: seed must be at most 4294967295, got 99999999999"),
        ("train --out x --prompts-per-step 60000 --num-generations 60000",
         "iapo-mini: prompts_per_step * num_generations must be at most 65536, got 3600000000"),
        ("train --out x --num-generations 0",
         "iapo-mini: num_generations must be at least 2, got 0"),
        ("train --out x --temperature -1", "iapo-mini: temperature must be above 0, got -1.0"),
        ("train --out x --temperature 1e-300",
         "iapo-mini: temperature must be at least 1e-06, got 1e-300"),
        ("train --out x --method iapp",
         "iapo-mini: method must be one of grpo, dapo, gfpo, gtpo, gtpo_iapo, sgrpo, iapo, "
         "iapo_ni, iapo_ne, iapo_pmi, grpo_kimi, grpo_efficient, got 'iapp'; did you mean 'iapo'?"),
        ("train --out x --card 16gb",
         "iapo-mini: --card must be one of t4, 12gb, 24gb, got '16gb'; did you mean '12gb'?"),
        ("evaluate --k 8 nine", "iapo-mini: --k must be a whole number, got 'nine'"),
        ("evaluate --k", "iapo-mini: --k expected at least one argument; see iapo-mini evaluate "
         "--help"),
        ("train", "iapo-mini: the following arguments are required: --out; see iapo-mini train "
         "--help"),
        ("trian --out x", "did you mean 'train'?"),
        ("lab tabel1", "did you mean 'table1'?"),
        ("lab figures speed", "study must be one of estimator, all, got 'speed'"),
        ("plan --gpu 0gb", "gpu must be one of t4 or a size, such as 12gb, got '0gb'"),
        (f"plan --gpu {'9' * 400}gb", "gpu must be one of t4 or a size, such as 12gb, got '9999"),
        ("explain - --out h.json", "out must be a .png, .pdf or .svg file, got 'h.json'"),
    ],
)  # fmt: skip
def test_wrong_options_get_these_sentences(arguments, sentence, idle, capsys):
    assert sentence in told(capsys, cli.main, arguments.split())


@pytest.mark.parametrize("name", ["h.png", "h.pdf", "h.svg"])
def test_a_heat_map_overwrites_only_heat_maps(name, tmp_path):
    figure = tmp_path / name
    check_figure(figure)
    Figure().savefig(figure)
    check_figure(figure)
    figure.write_bytes(b"a photograph")
    with pytest.raises(ValueError, match="which exists and is not a figure"):
        check_figure(figure)
    figure.unlink()
    figure.mkdir()
    with pytest.raises(ValueError, match="which exists and is not a figure"):
        check_figure(figure)


def test_a_seed_takes_no_time_to_count_to(monkeypatch, tmp_path, capsys):
    """The seed of stories must not be used as a number of stories to skip."""
    monkeypatch.setattr("iapo_mini.policy.load_policy", lambda *a, **k: 1 / 0)
    out = ["--out", str(tmp_path / "h.png")]
    assert "division" in told(capsys, cli.main, ["explain", "-", "--seed", str(MOST_SEED), *out])


def test_too_little_memory_is_reported(monkeypatch, tmp_path, capsys):
    def load(*args, **settings):
        raise MemoryError

    monkeypatch.setattr("iapo_mini.policy.load_policy", load)
    arguments = ["explain", "-", "--out", str(tmp_path / "h.png")]
    assert told(capsys, cli.main, arguments).endswith("need more memory than this machine has")


@pytest.mark.parametrize("value", [2, 3.5, 9, 10**400])
def test_bounds_themselves_are_allowed(value):
    check_number("n", value, 2, 10**400)
    check_number("n", value, above=1.99)
    check_temperature(0)
    check_choice("word", "a", ("a", "b"))


def test_values_are_shown_on_one_short_line():
    for value in ("a\nb", "x" * 999, 10**5000, [1] * 999, float("nan")):
        assert "\n" not in shown(value) and len(shown(value)) < 80

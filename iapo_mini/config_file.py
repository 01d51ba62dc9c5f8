"""Settings from a file: YAML or JSON with the names of TrainConfig, or the config.json of a run."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import yaml

from iapo_mini.config import CARDS, TrainConfig
from iapo_mini.errors import check_choice, first_line, shown

OF_A_RUN = ("from_recipe", "data_fingerprint", "problems_fingerprint", "model_fingerprint")
"""Entries of a run's config.json that are not settings."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read fields of TrainConfig from a file; the fields of its ``card`` are filled in.

    Args:
        path: ``.yaml``, ``.yml`` or ``.json``. Fields of a run's ``config.json`` that came from the
            method's recipe are left out, so another method uses its own recipe.

    Returns:
        Field name -> value, for ``TrainConfig(**settings)``, which checks the values.

    Raises:
        ValueError: for a file that can't be read or holds no settings, and for an unknown name.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"config must be a .yaml or .json file, got '{path}'")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(
            f"config is '{path}', which can't be read ({error.strerror or error})."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"config is '{path}', which is damaged ({first_line(error)}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"config must hold lines of the form 'name: value', got {shown(found)}")
    recipe = found.get("from_recipe") or []
    if not isinstance(recipe, list):
        raise ValueError(f"from_recipe must be a list of names in config, got {shown(recipe)}")
    settings = {
        name: value for name, value in found.items() if name not in (*OF_A_RUN, "card", *recipe)
    }
    types = typing.get_type_hints(TrainConfig)
    for name in settings:
        check_choice("a name in config", name, [f.name for f in dataclasses.fields(TrainConfig)])
    if "card" in found:
        check_choice("card", found["card"], CARDS)
        settings = {**CARDS[found["card"]], **settings}
    return {name: _number(value, types[name]) for name, value in settings.items()}


def _number(value: Any, kind: Any) -> Any:
    """Convert text to a number if the field is a number: YAML reads 1e-5 as text, 1.0e-5 not."""
    if isinstance(value, str) and float in (typing.get_args(kind) or (kind,)):
        try:
            return float(value)
        except ValueError:
            return value
    return value

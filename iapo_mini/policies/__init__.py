"""Names and folders of the policies that ship with the package."""

from pathlib import Path

EMBEDDED = "embedded"
"""Name of the shipped policy."""

EMBEDDED_UNCALIBRATED = "embedded-uncalibrated"
"""Name of a shipped policy trained on whole chains only, which shows the need for calibration."""

EMBEDDED_CALIBRATED = "embedded-calibrated"
"""Name of the embedded policy after ``calibration.calibrate``, with steadier early answers."""

SHIPPED = {
    EMBEDDED: Path(__file__).parent / "embedded",
    EMBEDDED_CALIBRATED: Path(__file__).parent / "embedded_calibrated",
    EMBEDDED_UNCALIBRATED: Path(__file__).parent / "embedded_uncalibrated",
}
"""Name of each shipped policy -> its folder."""


def shown_name(model: str) -> str:
    """What a results file calls a model: a hub id as it is, a folder by its name without a path."""
    return Path(model).name if looks_local(model) else model


def looks_local(model: str) -> bool:
    """Whether a name is a shipped model or a folder, and not a hub id."""
    path = Path(model)
    local = path.exists() or path.is_absolute() or model.startswith((".", "~")) or "\\" in model
    return model in SHIPPED or local

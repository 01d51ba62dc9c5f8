"""The policies that ship with the package: their names and their folders."""

from pathlib import Path

EMBEDDED = "embedded"
"""Name under which the shipped policy is loaded."""

EMBEDDED_UNCALIBRATED = "embedded-uncalibrated"
"""A second shipped policy, trained on whole chains only: what goes wrong without calibration."""

EMBEDDED_CALIBRATED = "embedded-calibrated"
"""The embedded policy after ``calibration.calibrate``: the same chains, steadier early answers."""

SHIPPED = {
    EMBEDDED: Path(__file__).parent / "embedded",
    EMBEDDED_CALIBRATED: Path(__file__).parent / "embedded_calibrated",
    EMBEDDED_UNCALIBRATED: Path(__file__).parent / "embedded_uncalibrated",
}
"""Name -> folder."""


def looks_local(model: str) -> bool:
    """Whether a name is that of a shipped model or of a folder, not a hub id."""
    path = Path(model)
    local = path.exists() or path.is_absolute() or model.startswith((".", "~")) or "\\" in model
    return model in SHIPPED or local

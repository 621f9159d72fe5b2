"""Ready-made records for tests that need no model."""

from __future__ import annotations

from typing import Any

from hypersd.records import Panel


def panel(width: int = 8, height: int = 6, **changes: Any) -> Panel:
    """A panel with a small colour gradient for pixels; any field can be replaced by name."""
    pixels = bytes(
        (x * 20 % 256, y * 30 % 256, 99)[channel] for y in range(height) for x in range(width) for channel in range(3)
    )
    fields: dict[str, Any] = {
        "pixels": pixels,
        "width": width,
        "height": height,
        "prompt": "a happy cat, naïve 猫 🐈",
        "negative_prompt": "",
        "seed": 1,
        "noise_sha256": "0" * 64,
        "backbone": "emoji",
        "base_sha256": "1" * 64,
        "method": "base",
        "adapter_sha256": None,
        "sampler": "DDIM",
        "steps": 25,
        "nfe": 50,
        "guidance": 4.0,
        "eta": 0.0,
        "dtype": "float32",
        "seconds": 1.25,
        "version": "0.1.0",
    }
    return Panel(**{**fields, **changes})

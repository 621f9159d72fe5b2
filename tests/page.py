"""What a page asks of a served app, without a browser."""

from __future__ import annotations

import requests


def look(address: str) -> tuple[str, bool]:
    """(HTML of the line that says what is being downloaded, whether the page is to ask again), as its timer does."""
    config = requests.get(f"{address}config", timeout=30).json()
    (timer,) = (part["id"] for part in config["components"] if part["type"] == "timer")
    (tick,) = (event["id"] for event in config["dependencies"] if [timer, "tick"] in event["targets"])
    asked = {"data": [], "fn_index": tick, "session_hash": "visitor"}
    answer = requests.post(f"{address}gradio_api/run/predict", json=asked, timeout=30)
    line, timed = answer.json()["data"]
    return line, timed["active"]

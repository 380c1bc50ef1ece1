"""Take docs/img/study.png and docs/img/compare.png from a real study in the MLflow UI.

    python docs/screenshots.py first                       # study in outputs/studies
    python docs/screenshots.py demo tracking.uri=sqlite:////tmp/demo/mlflow.db

Needs the `docs` extra and an installed Chromium (apt-get install chromium); downloads nothing.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from nightshift.fixed.config import ROOT
from nightshift.fixed.tracking import load_tracking, open_store

IMAGES = ROOT / "docs/img"
SIZE = {"width": 1600, "height": 820}
WAIT_MS = 30_000
UNFOLD = "cells_runnamecellrenderer.tsx_46"
ASSISTANT_SEEN = (
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"  # else it covers a third of the page
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("overrides", nargs="*", help="tracking.uri=...")
    parser.add_argument("--into", type=Path, default=IMAGES)
    args = parser.parse_args(argv)
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no chromium on this machine. Run: apt-get install chromium", file=sys.stderr)
        return 1
    store = open_store(load_tracking(args.overrides))
    studies = store.find(kind="study", study=args.study)
    if not studies:
        print(f"study ({args.study}): not in {store.uri}", file=sys.stderr)
        return 1
    trials = store.children(studies[0].info.run_id)
    ui, address = start_ui(args.overrides)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=browser_path, args=["--no-sandbox"]
            )
            page = browser.new_page(viewport=SIZE)
            page.add_init_script(f"localStorage.setItem('{ASSISTANT_SEEN}', 'true')")
            args.into.mkdir(parents=True, exist_ok=True)
            shoot_table(page, address, args.into / "study.png")
            shoot_comparison(page, address, store.experiment_id, trials, args.into / "compare.png")
            browser.close()
    finally:
        ui.send_signal(signal.SIGINT)
        ui.wait(30)
    return 0


def start_ui(overrides: list[str]) -> tuple[subprocess.Popen, str]:
    """(process, address of the runs page)."""
    ui = subprocess.Popen(
        [sys.executable, "-m", "nightshift.ui", *overrides], stdout=subprocess.PIPE, text=True
    )
    for line in ui.stdout:
        if found := re.search(r"http://\S+#/\S+", line):
            return ui, found.group()
    raise SystemExit("nightshift ui did not start")


def shoot_table(page: Page, address: str, path: Path) -> None:
    """The runs table with our columns and the newest study unfolded."""
    page.goto(address)
    page.wait_for_selector(".ag-row", timeout=WAIT_MS)
    page.locator(f"button[data-component-id$='{UNFOLD}']").first.click()
    page.get_by_label("Hide banner").click()
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(path)


def shoot_comparison(
    page: Page, address: str, experiment_id: str, trials: list, path: Path
) -> None:
    """The compare view of the trials that have a number."""
    ids = [t.info.run_id for t in trials if t.data.tags.get("status") == "ok"]
    runs, experiments = json.dumps(ids[:8]), json.dumps([experiment_id])
    root = address.split("#")[0]
    page.goto(
        f"{root}#/compare-runs?runs={runs}&experiments={experiments}&workflowType=machine_learning"
    )
    page.wait_for_selector(".js-plotly-plot, .parcoords", timeout=WAIT_MS)
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

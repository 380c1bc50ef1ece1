"""Take the pictures in docs/img from a real study: study.png and compare.png in the MLflow UI,
chat.png and compare_chat.png on the page of `nightshift serve`.

    python docs/screenshots.py first                       # study in outputs/studies
    python docs/screenshots.py demo tracking.uri=sqlite:////tmp/demo/mlflow.db
    python docs/screenshots.py first --only chat --root /other/checkout

Needs the `docs` extra and an installed Chromium (apt-get install chromium); downloads nothing.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from nightshift import catalogue
from nightshift.fixed.config import ROOT
from nightshift.fixed.tracking import load_tracking, open_store

IMAGES = ROOT / "docs/img"
SIZE = {"width": 1600, "height": 820}
CHAT_SIZE = {"width": 1280, "height": 800}
WAIT_MS = 30_000
CHAT = (
    "How many letters has the word 'night'?",
    "How many times is the letter e in 'freedom'?",
    "Hello! Who are you?",
)
TEXT = "My fellow Americans, the economy of this country"
UNFOLD = "cells_runnamecellrenderer.tsx_46"
ASSISTANT_SEEN = (
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1"  # else it covers a third of the page
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("overrides", nargs="*", help="tracking.uri=...")
    parser.add_argument("--into", type=Path, default=IMAGES)
    parser.add_argument("--only", choices=("mlflow", "chat"), help="two of the four pictures")
    parser.add_argument("--root", type=Path, default=ROOT, help="where checkpoints are (chat)")
    args = parser.parse_args(argv)
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no chromium on this machine. Run: apt-get install chromium", file=sys.stderr)
        return 1
    args.into.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        if args.only != "chat":
            take_mlflow(browser, args.study, args.overrides, args.into)
        if args.only != "mlflow":
            take_chat(browser, args.study, args.root, args.into)
        browser.close()
    return 0


def take_mlflow(browser: Browser, study: str, overrides: list[str], into: Path) -> None:
    store = open_store(load_tracking(overrides))
    studies = store.find(kind="study", study=study)
    if not studies:
        raise SystemExit(f"study ({study}): not in {store.uri}")
    trials = store.children(studies[0].info.run_id)
    with started("nightshift.ui", overrides, r"http://\S+#/\S+") as address:
        page = browser.new_page(viewport=SIZE)
        page.add_init_script(f"localStorage.setItem('{ASSISTANT_SEEN}', 'true')")
        shoot_table(page, address, into / "study.png")
        shoot_comparison(page, address, store.experiment_id, trials, into / "compare.png")


def take_chat(browser: Browser, study: str, root: Path, into: Path) -> None:
    """The champion in a talk, and the study's baseline beside the last trial that was kept."""
    kept = [e.name for e in catalogue.entries(root) if e.decision == "keep" and e.is_kept]
    kept = sorted(name for name in kept if name.startswith(f"{study}/"))
    with started("nightshift.serve", ["--root", str(root)], r"http://[^\s/]+") as address:
        page = browser.new_page(viewport=CHAT_SIZE)
        page.goto(address)
        page.wait_for_selector(".empty")
        shoot_talk(page, into / "chat.png")
        if len(kept) > 1:
            shoot_side_by_side(page, kept[0], kept[-1], into / "compare_chat.png")


@contextmanager
def started(module: str, arguments: list[str], address: str):
    """Yields the address that a command of ours prints; ends it afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if found := re.search(address, line):
                yield found.group()
                break
        else:
            raise SystemExit(f"{module} did not start")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def say(page: Page, text: str, number: int) -> None:
    """Types a message and waits until that many answers are there, finished."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    done = "document.querySelectorAll('.said:not(.user):not(.running)').length"
    page.wait_for_function(f"{done} === {number}", timeout=10 * WAIT_MS)


def shoot_talk(page: Page, path: Path) -> None:
    page.evaluate("Object.assign(settings, {temperature: 0.3, seed: 1, max_tokens: 60})")
    page.evaluate("showSettings()")
    page.click("#settings-button")
    for number, text in enumerate(CHAT, start=1):
        say(page, text, number)
    page.screenshot(path=path)
    print(path)


def shoot_side_by_side(page: Page, first: str, second: str, path: Path) -> None:
    page.evaluate("Object.assign(settings, {temperature: 0.8, seed: 3, max_tokens: 110})")
    page.click("#settings-button")
    page.click("#mode-text")
    page.click("#compare")
    page.select_option("#side-a select", first)
    page.select_option("#side-b select", second)
    say(page, TEXT, 2)
    page.screenshot(path=path)
    print(path)


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

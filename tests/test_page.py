"""The web page in a headless Chromium: type, stream, stop, switch the trial, compare two."""

import shutil

import pytest
import tiny_checkpoint
from serving import server

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs the `docs` extra")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONGER = {"model.seq_len": 128, "train.batch_tokens": 512}
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    root, work = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("work")
    tiny_checkpoint.make(root / "champion", work, val_bpb=1.5, **LONGER)
    tiny_checkpoint.make_trial(root, work, 0, "keep", **LONGER)
    tiny_checkpoint.make_trial(root, work, 1, "discard", kept=False)
    tiny_checkpoint.make_trial(root, work, 2, "keep", **LONGER)
    with server(root) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser(address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """A fresh page; any script error, console error or request to another place fails the test."""
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.set_default_timeout(WAIT_MS)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # A prompt that is too long is an answer of 400 that the page expects, and Chromium logs.
    is_wrong = lambda m: m.type == "error" and "status of 400" not in m.text  # noqa: E731
    page.on("console", lambda m: wrong.append(m.text) if is_wrong(m) else None)
    page.on(
        "request", lambda r: None if r.url.startswith((address, "data:")) else wrong.append(r.url)
    )
    page.goto(address)
    page.wait_for_selector(".empty")
    yield page
    page.close()
    assert wrong == []


def say(page, text: str, tokens: int = 12) -> None:
    page.evaluate(f"settings.max_tokens = {tokens}")
    page.fill("#prompt", text)
    page.keyboard.press("Enter")


def finished(page, number: int, kind: str = "assistant") -> list[str]:
    """The texts of that many finished answers."""
    done = f".said.{kind}:not(.running)"
    page.wait_for_function(f"document.querySelectorAll('{done}').length === {number}")
    return page.locator(f"{done} .body").all_text_contents()


def test_the_page_opens_on_the_champion_and_lists_every_trial(page):
    assert page.input_value("#side-a select") == "champion"
    options = page.locator("#side-a option").all_text_contents()
    assert options[1].startswith("first/002 \u00b7 1.9800 \u2713 \u00b7 change 2")
    assert "(not kept)" in options[-1]
    assert page.locator("#side-a option").last.is_disabled()
    assert page.locator("#side-a .facts").inner_text() == "1.5000 bpb"


def test_a_typed_message_is_answered_piece_by_piece(page):
    page.evaluate(
        """() => {
            window.seen = new Set();
            new MutationObserver(() => {
                const body = document.querySelector('.said.assistant .body');
                if (body) window.seen.add(body.textContent);
            }).observe(document.querySelector('#side-a .log'), {subtree: true, childList: true});
        }"""
    )
    say(page, "Hello", tokens=20)
    finished(page, 1)
    assert page.locator(".said.user .body").inner_text() == "Hello"
    assert "tokens" in page.locator(".said.assistant .meta").inner_text()
    assert page.evaluate("window.seen.size") > 3
    say(page, "And then?")
    finished(page, 2)
    roles = page.evaluate("columns[0].messages.map(m => m.role)")
    assert roles == ["user", "assistant", "user", "assistant"]


def test_stop_ends_an_answer_and_the_server_s_work(page, address):
    page.evaluate("settings.temperature = 0")  # it repeats itself: no end of its own before ours
    say(page, "Hello", tokens=4000)
    page.wait_for_function("document.querySelector('.said.assistant .body').textContent.length > 9")
    page.click("#stop-button")
    finished(page, 1)
    assert "stopped" in page.locator(".said.assistant .meta").inner_text()
    page.wait_for_function(
        "fetch('/health').then(r => r.json())"
        ".then(s => Object.values(s.requests).every(n => n === 0))"
    )
    assert page.locator("#send").is_visible()


def test_the_trial_can_be_switched(page):
    page.select_option("#side-a select", "first/002")
    assert "kept" in page.locator("#side-a .facts").inner_text()
    with page.expect_request("**/v1/chat/completions") as request:
        say(page, "Hello")
    assert request.value.post_data_json["model"] == "first/002"
    finished(page, 1)
    page.reload()
    page.wait_for_selector(".empty")
    assert page.input_value("#side-a select") == "first/002"


def test_two_trials_answer_one_prompt_side_by_side_with_the_same_seed(page):
    page.click("#compare")
    page.select_option("#side-a select", "first/000")
    page.select_option("#side-b select", "first/002")
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.post_data else None)
    say(page, "Hello")
    one, two = finished(page, 2)
    assert one != two
    assert sorted(body["model"] for body in bodies) == ["first/000", "first/002"]
    assert bodies[0]["seed"] == bodies[1]["seed"]
    page.select_option("#side-b select", "first/000")
    page.click("#new")
    say(page, "Hello")
    same, again = finished(page, 2)
    assert same == again


def test_complete_mode_shows_the_prompt_and_its_continuation(page):
    page.click("#mode-text")
    with page.expect_request("**/v1/completions"):
        say(page, "The night")
    finished(page, 1, "text")
    assert page.locator(".said.text .prompt").inner_text() == "The night"


def test_sampling_controls_reach_the_server_and_are_remembered(page):
    page.click("#settings-button")
    page.fill("#seed", "7")
    page.fill("#system", "Be brief.")
    page.locator("#temperature").fill("0.3")
    with page.expect_request("**/v1/chat/completions") as request:
        say(page, "Hello")
    body = request.value.post_data_json
    assert (body["seed"], body["temperature"], body["messages"][0]["role"]) == (7, 0.3, "system")
    first = finished(page, 1)
    page.reload()
    page.wait_for_selector(".empty")
    assert page.input_value("#seed") == "7"
    say(page, "Hello")
    assert finished(page, 1) == first


def test_a_conversation_longer_than_the_window_goes_on(page):
    for number in range(6):
        say(page, f"This is message {number} of them", tokens=20)
        finished(page, number + 1)
    assert page.locator(".note").count() >= 1
    assert page.locator(".said.error").count() == 0
    assert page.evaluate("columns[0].messages.length") < 12


def test_what_a_model_says_is_text_and_never_markup(page):
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    finished(page, 1)
    assert page.locator(".log img, .log b").count() == 0

"""The chat page in a headless Chromium: types a message, sees the answer grow and the experts move, stops an answer, reads a cell's
numbers, and takes pictures in light and dark.

    python tests/serve/chat_page.py URL [--key KEY] [--pictures FOLDER] [--chromium PATH]

URL is that of `hadal serve`, or of the example `fake_server`. Chromium is Debian's `chromium`; playwright drives it.
"""

import argparse
import pathlib
import shutil
import sys
import time

from playwright.sync_api import expect, sync_playwright

MESSAGE = "Call me Ishmael. Some years ago I thought I would sail about a little and see the watery part of the world."
PATIENCE_SECS = 30


def open_page(page, arguments):
    reply = page.goto(arguments.url)
    if arguments.key:
        assert reply.status == 401, reply.status
        page.get_by_label("Key").fill("wrong")
        page.get_by_role("button", name="Open").click()
        expect(page.get_by_text("That is not the server's key.")).to_be_visible()
        page.get_by_label("Key").fill(arguments.key)
        page.get_by_role("button", name="Open").click()
    else:
        assert reply.status == 200, reply.status
    expect(page.locator("#state")).to_have_class("ready", timeout=PATIENCE_SECS * 1000)
    assert page.locator("#model").inner_text().strip(), "the page does not say which model it is"


# Notes every other text of the last answer and every other picture of the strip, from within the page, where neither the machine's load
# nor the speed of the model can make the test miss one.
WATCH = """() => {
    window.seen = { texts: [], strips: [] };
    const note = (list, value) => { if (value !== list.at(-1)) list.push(value); };
    seen.timer = setInterval(() => {
        const answer = [...document.querySelectorAll("article.assistant .text")].at(-1);
        if (answer) note(seen.texts, answer.innerText);
        note(seen.strips, document.getElementById("strip").toDataURL());
    }, 40);
}"""


def talk(page, arguments):
    page.get_by_label("Temperature").fill("0.3")
    assert page.locator("#shown").inner_text() == "0.3"
    page.get_by_label("Max tokens").fill(str(arguments.max_tokens))
    page.get_by_label("Your message").fill(MESSAGE)
    page.evaluate(WATCH)
    page.get_by_label("Your message").press("Enter")
    page.wait_for_function("() => seen.texts.length > 2", timeout=PATIENCE_SECS * 1000)
    page.screenshot(path=arguments.pictures / "streaming.png")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=PATIENCE_SECS * 1000)
    seen = page.evaluate("() => { clearInterval(seen.timer); return { texts: seen.texts, strips: seen.strips }; }")
    texts = seen["texts"]
    assert all(len(a) < len(b) and b.startswith(a.rstrip("\ufffd")) for a, b in zip(texts, texts[1:])), texts
    assert len(seen["strips"]) > 3, f"expected the strip of experts to move as the answer came, found {len(seen['strips']) - 1} moves"
    note = page.locator("article.assistant .note").last.inner_text()
    assert "tokens/s" in note and "first after" in note, note


def without_end(route):
    """The page's request with `ignore_eos`, so that no answer ends of itself."""
    route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})


def stop(page, arguments):
    page.get_by_label("Max tokens").fill(str(2 * arguments.max_tokens))
    page.get_by_label("Your message").fill(MESSAGE * 3)
    answers = page.locator("article.assistant .text").count()
    page.get_by_role("button", name="Send").click()
    # Stopped from within the page as soon as the answer grows: a quick model must not be done before.
    page.wait_for_function(
        """answers => {
            const all = document.querySelectorAll("article.assistant .text");
            if (all.length <= answers || !all[answers].textContent) return false;
            document.getElementById("stop").click();
            return true;
        }""",
        arg=answers,
        timeout=PATIENCE_SECS * 1000,
    )
    expect(page.locator("article.assistant .note").last).to_have_text("stopped")
    text = lambda: page.locator("article.assistant .text").last.inner_text()
    length = len(text())
    time.sleep(0.5)
    assert len(text()) == length, "the answer goes on after it was stopped"


def look(page):
    page.get_by_label("Since loading").check(force=True)
    box = page.locator("#strip").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    tip = page.locator("#tip").inner_text()
    assert tip.startswith("Layer ") and "since loading" in tip, tip
    page.locator("#strip").focus()
    page.keyboard.press("ArrowRight")
    moved = page.locator("#tip").inner_text()
    assert moved.startswith("Layer ") and moved != tip, (tip, moved)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key")
    # Some seconds, in which the strip moves also on a busy machine.
    parser.add_argument("--max-tokens", type=int, default=192, help="of the first answer; more for a model that is quick")
    parser.add_argument("--pictures", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    arguments = parser.parse_args()
    assert arguments.chromium, "expected Debian's `chromium`, found none; `apt-get install chromium`"
    arguments.pictures.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(arguments.url) or problems.append(f"asked for {request.url}"))
        page.route("**/v1/chat/completions", without_end)
        open_page(page, arguments)
        talk(page, arguments)
        stop(page, arguments)
        look(page)
        page.screenshot(path=arguments.pictures / "light.png")
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(200)
        page.screenshot(path=arguments.pictures / "dark.png")
        page.set_viewport_size({"width": 420, "height": 820})
        page.wait_for_timeout(200)
        page.screenshot(path=arguments.pictures / "narrow.png")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the narrow page is wider than its window"
        browser.close()
        assert not problems, problems
    print("the chat page: 1 passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

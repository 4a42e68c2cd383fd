"""The web chat behind ``foveate serve --ui``, with the demo model and a real browser."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from chat_page import BOX, PICTURES, ChatPage, running_browser
from playwright.sync_api import Browser, expect
from serving import RunningServer, running_server

CIRCLE = "Which picture shows a circle?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("ui"), "--ui", model=None) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as running:
        yield running


@pytest.fixture(scope="module")
def page(demo: RunningServer, browser: Browser) -> Iterator[ChatPage]:
    context = browser.new_context(permissions=["camera"], locale="en-US")
    yield ChatPage(context.new_page(), f"{demo.url}/ui")
    context.close()


@pytest.fixture
def chat(demo: RunningServer, page: ChatPage) -> Iterator[ChatPage]:
    """A new chat; nothing that it does reaches another machine, and none of the page's scripts fails."""
    page.clear()
    yield page
    assert page.hosts == {urlsplit(demo.url).netloc}
    assert page.problems == []


def test_two_pictures_and_a_second_turn(chat: ChatPage) -> None:
    chat.attach(PICTURES / "before.png", PICTURES / "after.png")
    chat.ask(CIRCLE)
    facts = chat.expect_answer("The second picture.")
    expect(chat.pictures).to_have_count(2)
    expect(facts).to_contain_text("+ 128 picture tokens")
    expect(facts).to_contain_text("first token")
    facts.locator("summary").click()
    expect(facts.locator(".fv-legend")).to_contain_text("prefill")
    expect(facts.locator(".fv-legend")).to_contain_text("encode")
    expect(facts.locator("figure")).to_have_count(2)
    expect(facts.locator("figcaption").first).to_contain_text("64 tokens, seen whole")
    chat.ask("What is at the bottom right of the first picture?")
    second = chat.expect_answer("A yellow star.", 1)
    # The pictures were in the prompt again, and computed before.
    expect(second).to_contain_text("128 picture tokens")
    expect(second.locator("figcaption").first).to_contain_text("known from before")


def test_slices_are_drawn_and_can_be_chosen(chat: ChatPage) -> None:
    chat.attach(PICTURES / "small-print.png")
    chat.ask("Read the number.")
    sliced = chat.expect_answer("The number is 1671.")
    sliced.locator("summary").click()
    expect(sliced.locator(".fv-cells span")).to_have_text(["64"] * 6)
    expect(sliced.locator("figcaption")).to_contain_text("overview 64 + 3×2 × 64 = 448 tokens")
    chat.clear()
    chat.attach(PICTURES / "small-print.png")
    chat.page.click(".fv-most-slices input")
    chat.page.get_by_role("option", name="Slices: 2").click()
    chat.ask("Read the number.")
    fewer = chat.expect_answer("The number is")
    expect(fewer).to_contain_text("+ 192 picture tokens")
    expect(fewer.locator(".fv-cells span")).to_have_count(2)
    chat.attach(PICTURES / "small-print.png")
    chat.page.click(".fv-detail input")
    chat.page.get_by_role("option", name="Detail: low").click()
    chat.ask("Read the number.")
    expect(chat.expect_answer("", 1)).to_contain_text(f"+ {192 + 64} picture tokens")


def test_edit_retry_and_clear(chat: ChatPage) -> None:
    chat.attach(PICTURES / "after.png")
    chat.ask("Is there a heart?")
    chat.expect_answer("No, there is no heart.")
    chat.ask("Is there a circle?")
    chat.expect_answer("Yes", 1)
    chat.page.get_by_label("Edit").first.click()
    expect(chat.find("#fv-chat textarea")).to_be_visible()
    chat.find("#fv-chat textarea").fill("Is there a star?")
    chat.find("#fv-chat").get_by_label("Submit").click()
    chat.expect_answer("Yes, there is")
    expect(chat.answers).to_have_count(1)
    expect(chat.questions).to_have_count(1)
    expect(chat.pictures).to_have_count(1)
    facts = chat.find("#fv-chat .fv-facts summary")
    before = facts.inner_text()
    chat.page.get_by_label("Retry").first.click()
    expect(facts).not_to_have_text(before)
    chat.expect_answer("Yes, there is")
    chat.page.get_by_label("Clear", exact=True).click()
    expect(chat.questions).to_have_count(0)
    expect(chat.page.get_by_text("Ask about a picture", exact=True)).to_be_visible()


def test_a_sample_to_click_and_markup_that_stays_text(chat: ChatPage) -> None:
    chat.page.get_by_text("How much is the total?").click()
    chat.expect_answer("The total is 66.89.")
    chat.ask("<img src=x onerror=alert(1)> <b>Who</b> are you?")
    expect(chat.questions.nth(1)).to_contain_text("<b>Who</b>".replace("<", "<\u2060"))
    expect(chat.questions.nth(1).locator("img, b")).to_have_count(0)


def test_a_picture_is_pasted_and_one_is_dropped(chat: ChatPage) -> None:
    data = base64.b64encode((PICTURES / "chart.png").read_bytes()).decode()
    give = """([box, data, type]) => {
        const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
        const moved = new DataTransfer();
        moved.items.add(new File([bytes], type + '.png', {type: 'image/png'}));
        const options = {bubbles: true, cancelable: true, clipboardData: moved, dataTransfer: moved};
        const made = type === 'paste' ? new ClipboardEvent(type, options) : new DragEvent(type, options);
        document.querySelector(box).dispatchEvent(made);
    }"""
    chat.page.evaluate(give, [BOX, data, "paste"])
    expect(chat.find(".fv-option")).to_have_count(1)
    chat.page.evaluate(give, [BOX, data, "drop"])
    expect(chat.find(".fv-option")).to_have_count(2)
    chat.ask("How much is MAR?")
    chat.expect_answer("MAR is 11.")
    expect(chat.pictures).to_have_count(2)


def test_the_camera(chat: ChatPage) -> None:
    chat.page.click("#fv-camera")
    chat.page.locator("#fv-webcam").get_by_role("button").first.click()
    chat.page.wait_for_function("document.querySelector('#fv-webcam video')?.videoWidth > 0")
    chat.page.get_by_label("capture photo").click()
    expect(chat.find(".fv-option")).to_have_count(1)
    expect(chat.find("#fv-webcam")).to_be_hidden()
    chat.ask("Describe the picture.")
    expect(chat.expect_answer("")).to_contain_text("picture tokens")


def test_an_error_is_a_message_and_the_chat_goes_on(chat: ChatPage) -> None:
    chat.attach({"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG nothing"})
    chat.ask("What is it?")
    refusal = chat.find("#fv-chat .bot-row").get_by_role("alert")
    expect(refusal).to_contain_text("Picture 1 (messages[0].content[0]): this is not a picture")
    chat.ask("Who are you?")
    chat.expect_answer("Foveate demo model")


def test_the_settings_are_used(chat: ChatPage) -> None:
    chat.open_settings()
    expect(chat.find("#fv-model input")).to_have_value("foveate-demo")
    chat.page.get_by_label("Own sampling settings").check()
    chat.page.fill("#fv-max-tokens input", "2")
    chat.page.press("#fv-max-tokens input", "Tab")
    chat.ask("Who are you?")
    facts = chat.expect_answer("I am")
    expect(facts).to_contain_text("cut off")
    expect(facts).to_contain_text("answer 2")
    chat.page.get_by_label("Own sampling settings").uncheck()


def test_chinese(chat: ChatPage) -> None:
    chat.page.get_by_label("中文").check(force=True)
    expect(chat.find("#fv-new")).to_have_text("新对话")
    expect(chat.find(BOX)).to_have_attribute("placeholder", "就图片提问：在此添加、粘贴或拖入图片")
    chat.page.get_by_text("哪张图里有圆形？").click()
    chat.expect_answer("第二张图")
    chat.open_settings()
    expect(chat.find("#fv-system")).to_contain_text("系统提示词")
    chat.page.reload()
    expect(chat.find("#fv-new")).to_have_text("新对话")
    chat.page.get_by_label("English").check(force=True)
    expect(chat.find("#fv-new")).to_have_text("New chat")

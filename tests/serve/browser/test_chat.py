"""The chat in a browser: send, stream, stop, edit, branches, thinking, history, keys."""

import json
from collections.abc import Iterator

import pytest
from browser_steps import ask, until, wait_for_answer
from live_server import Live, running

from qnext import LLM
from qnext.serve.gate import Rules

QUESTION = "What is 17 + 25?"
STORY = "Tell me a short story about a fox and the moon."


def answers(page) -> list[str]:
    return page.locator("article.model .prose").all_inner_texts()


def test_an_answer_streams_and_says_what_it_took(visit, slow_site) -> None:
    page = visit()
    page.get_by_label("Message", exact=True).fill(STORY)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.model .prose')?.textContent.length > 5")
    begun = answers(page)[0]
    until(page, f"document.querySelector('.model .prose').textContent.length > {len(begun)}")
    assert answers(page)[0].startswith(begun[:5])
    wait_for_answer(page)
    messages = [{"role": "user", "content": STORY}]
    whole = slow_site.client.post(
        "/v1/chat/completions", json={"messages": messages, "temperature": 0}
    ).json()
    text = whole["choices"][0]["message"]["content"]
    assert "".join(answers(page)[0].split()) == "".join(text.split())
    remark = page.locator(".remark").inner_text()
    for words in ("tokens/s", "first after", "drafts accepted",
                  f"{whole['usage']['completion_tokens']} tokens"):  # fmt: skip
        assert words in remark
    # The second turn finds the first in the cache, and the page says so.
    ask(page, "And then?")
    assert "prompt tokens cached" in page.locator(".remark").last.inner_text()


def test_stop_ends_the_answer_and_the_request(visit, slow_site) -> None:
    page = visit()
    page.get_by_label("Message", exact=True).fill(STORY)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.model .prose')?.textContent.length > 5")
    page.get_by_role("button", name="Stop").click()
    wait_for_answer(page)
    assert "stopped" in page.locator(".remark").inner_text()
    slow_site.wait_until(busy=0)
    part = answers(page)[0]
    assert part
    page.reload()
    assert answers(page)[0] == part
    page.get_by_label("Message", exact=True).fill("again")
    assert page.get_by_role("button", name="Send").is_enabled()


def test_editing_makes_a_branch_and_the_old_one_stays(visit) -> None:
    page = visit()
    ask(page, "Who are you?")
    first = answers(page)
    page.locator(".user").hover()
    page.get_by_role("button", name="Edit").click()
    field = page.get_by_label("Edit the message")
    assert field.input_value() == "Who are you?"
    field.fill(QUESTION)
    page.get_by_role("article").get_by_role("button", name="Send").click()
    until(page, f"document.querySelector('.user .text')?.textContent === '{QUESTION}'")
    wait_for_answer(page)
    second = answers(page)
    assert second != first
    assert page.locator(".user .branches").inner_text() == "2 / 2"
    page.get_by_role("button", name="Earlier version").click()
    assert answers(page) == first
    assert page.locator(".user .text").inner_text() == "Who are you?"
    page.reload()
    assert answers(page) == first
    page.get_by_role("button", name="Later version").click()
    assert answers(page) == second


def test_answering_again_adds_a_version(visit) -> None:
    page = visit(settings={"temperature": 1.2, "seed": 1})
    ask(page, STORY)
    first = answers(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Seed").fill("2")
    page.get_by_label("Seed").press("Tab")
    page.get_by_role("button", name="Answer again").click()
    page.wait_for_selector(".model .branches")
    wait_for_answer(page)
    assert page.locator(".model .branches").inner_text() == "2 / 2"
    assert answers(page) != first
    page.locator(".model").get_by_role("button", name="Earlier version").click()
    assert answers(page) == first


def test_thoughts_are_folded_and_counted(visit) -> None:
    page = visit()
    ask(page, QUESTION)
    fold = page.locator(".reasoning")
    assert not fold.locator(".text").is_visible()
    title = fold.locator("summary").inner_text()
    assert "Thought for" in title
    assert "tokens" in title
    fold.locator("summary").click()
    assert len(fold.locator(".text").inner_text()) > 5


def test_a_thinking_budget_ends_the_thoughts(visit) -> None:
    def thoughts(page) -> str:
        ask(page, QUESTION)
        page.locator(".reasoning summary").click()
        return page.locator(".reasoning .text").inner_text()

    # The shortest budget but none, 32 tokens; then the sentence that closes the thoughts.
    free, bound = visit(), visit(settings={"temperature": 0, "budget": 1})
    begun, _, closing = thoughts(bound).partition("Considering the limited time")
    assert closing
    assert begun.strip()
    assert len(begun) < len(thoughts(free))
    assert answers(bound)[0]


def test_settings_reach_the_server(visit) -> None:
    page = visit(settings=None)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Longest answer").fill("7")
    page.get_by_label("Seed").fill("1")
    slider = page.get_by_label("Thinking budget")
    slider.press("Home")
    for _ in range(2):
        slider.press("ArrowRight")
    assert page.locator("#budget-text").inner_text() == "64 tokens"
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_label("Message", exact=True).press("Enter")
    body = json.loads(sent.value.post_data)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert body["temperature"] == 0.25
    assert body["max_tokens"] == 7
    assert body["seed"] == 1
    assert body["thinking_budget"] == 64
    wait_for_answer(page)
    assert "7 tokens" in page.locator(".remark").inner_text()
    page.get_by_label("Think before answering").uncheck()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_label("Message", exact=True).fill("Hello")
        page.get_by_label("Message", exact=True).press("Enter")
    body = json.loads(sent.value.post_data)
    assert "thinking_budget" not in body
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    wait_for_answer(page)
    assert "7 tokens" in page.locator(".remark").last.inner_text()


def test_a_refusal_is_shown_and_the_conversation_goes_on(visit) -> None:
    page = visit(settings={"temperature": 500})
    ask(page, "Hello")
    assert "failed" in page.locator(".model").get_attribute("class")
    page.errors.clear()  # the browser notes the status 400 itself
    page.evaluate("localStorage.setItem('qnext.settings', '{\"temperature\": 0}')")
    page.reload()
    page.get_by_role("button", name="Answer again").click()
    page.wait_for_selector(".model .branches")
    wait_for_answer(page)
    assert answers(page)[0]


def test_conversations_survive_a_reload_and_travel_as_a_file(visit, tmp_path) -> None:
    page = visit()
    ask(page, QUESTION)
    said = answers(page)
    page.reload()
    assert answers(page) == said
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_role("button", name="New chat").click()
    assert answers(page) == []
    ask(page, "Who are you?")
    names = page.locator("#conversations .name").all_inner_texts()
    assert names == ["Who are you?", QUESTION]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert [one["title"] for one in saved["conversations"]] == names
    page.on("dialog", lambda dialog: dialog.accept())
    for name in names:
        page.get_by_role("button", name=f"Delete {name}").click()
    assert page.locator("#conversations .name").count() == 0
    page.locator("#import-file").set_input_files(file)
    page.locator("#conversations").get_by_role("button", name=QUESTION, exact=True).click()
    assert answers(page) == said
    file.write_text('{"format": "something else"}')
    page.locator("#import-file").set_input_files(file)
    assert "no conversations" in page.get_by_role("alert").inner_text()


def test_leaving_in_the_middle_keeps_what_was_there(visit, slow_site) -> None:
    page = visit()
    page.get_by_label("Message", exact=True).fill(STORY)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.model .prose')?.textContent.length > 20")
    page.reload()
    assert page.locator(".user .text").inner_text() == STORY
    assert len(answers(page)[0]) > 10
    slow_site.wait_until(busy=0)


def test_a_deleted_conversation_does_not_come_back_with_its_answer(visit, slow_site) -> None:
    page = visit()
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_label("Message", exact=True).fill(STORY)
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.model .prose')?.textContent.length > 5")
    page.get_by_role("button", name=f"Delete {STORY}").click()
    slow_site.wait_until(busy=0)
    page.reload()
    assert page.locator("#conversations li").count() == 0
    assert answers(page) == []


def test_a_file_with_wrong_values_is_refused_with_the_place(visit, tmp_path) -> None:
    def file_of(**changes) -> dict:
        """A file of one question and its answer; ``a__b`` names a field inside another."""
        meta = {"tokens": 3, "rate": 2.5, "first": 12.5, "reason": "stop"}
        question = {"id": "q", "parent": "", "role": "user", "content": "hi"}
        answer = {"id": "a", "parent": "q", "role": "assistant", "content": "yes", "meta": meta}
        talk = {"id": "t", "title": "T", "nodes": [question, answer],
                "chosen": [["", "q"], ["q", "a"]]}  # fmt: skip
        for path, value in changes.items():
            *way, last = path.split("__")
            place = {"talk": talk, "question": question, "answer": answer, "meta": meta}[way[0]]
            place[last] = value
        return {"format": "qnext-conversations", "version": 1, "conversations": [talk]}

    nodes = "conversations[0].nodes"
    cases = [
        (file_of(meta__rate="fast"), f"{nodes}[1].meta.rate: expected a number"),
        (file_of(meta__tokens={}), f"{nodes}[1].meta.tokens: expected a number of at least 0, "
         "found an object"),
        (file_of(meta__first=-1), f"{nodes}[1].meta.first: expected a number of at least 0, "
         "found -1"),
        (file_of(meta__error=["x"]), f"{nodes}[1].meta.error: expected text, found a list"),
        (file_of(meta__stopped=1), f"{nodes}[1].meta.stopped: expected true or false, found 1"),
        (file_of(answer__meta="x"), f"{nodes}[1].meta: expected an object, found text"),
        (file_of(answer__content=None), f"{nodes}[1].content: expected text, found nothing"),
        (file_of(answer__reasoning=7), f"{nodes}[1].reasoning: expected text, found 7"),
        (file_of(answer__answer=[]), f"{nodes}[1].answer: expected text, found a list"),
        (file_of(question__role="king"), f'{nodes}[0].role: expected "user" or "assistant"'),
        (file_of(answer__id="q"), f"{nodes}[1].id: another message has it as well"),
        (file_of(question__parent="a"), f"{nodes}[0].parent: the message follows itself"),
        (file_of(answer__parent="z"), f"{nodes}[1].parent: there is no such message"),
        (file_of(talk__nodes="x"), f"{nodes}: expected a list, found text"),
        (file_of(talk__nodes=[3]), f"{nodes}[0]: expected an object, found 3"),
        (file_of(talk__title=3), "conversations[0].title: expected text, found 3"),
        (file_of(talk__system={}), "conversations[0].system: expected text, found an object"),
        (file_of(talk__updated="now"), "conversations[0].updated: expected a number"),
        (file_of(talk__chosen=[["q", "q"]]), "conversations[0].chosen[0]: expected a message"),
        (file_of(talk__chosen={}), "conversations[0].chosen: expected a list, found an object"),
        ({**file_of(), "conversations": [7]}, "conversations[0]: expected an object, found 7"),
        ({**file_of(), "version": 2}, "version 2; this page reads version 1"),
    ]  # fmt: skip
    page = visit()
    page.get_by_role("button", name="Conversations", exact=True).click()
    file = tmp_path / "chats.json"
    for content, message in cases:
        file.write_text(json.dumps(content))
        page.evaluate("document.getElementById('notice').hidden = true")
        page.locator("#import-file").set_input_files(file)
        notice = page.get_by_role("alert")
        notice.wait_for()
        assert message in notice.inner_text()
        assert page.locator("#conversations li").count() == 0
    file.write_text(json.dumps(file_of()))
    page.locator("#import-file").set_input_files(file)
    page.locator("#conversations").get_by_role("button", name="T", exact=True).click()
    assert answers(page) == ["yes"]
    assert "3 tokens" in page.locator(".remark").inner_text()


@pytest.fixture(scope="module")
def locked(tiny_folder) -> Iterator[Live]:
    """A server that asks for a key."""
    with running(LLM(tiny_folder, backend="torch"), rules=Rules(keys=["the-right-key"])) as live:
        yield live


def test_the_key_is_asked_for_kept_and_sent(visit, locked) -> None:
    page = visit(at=locked, settings=None)
    key = page.get_by_label("API key")
    key.wait_for()  # the settings have opened by themselves
    until(page, "document.activeElement.id === 'set-key'")
    hint = page.locator("#hint-key")
    assert "asks for an API key" in hint.inner_text()
    assert page.locator("#model").inner_text() == "needs a key"
    key.fill("the-wrong-key")
    key.press("Enter")
    page.locator("#hint-key", has_text="does not accept this API key").wait_for()
    assert key.get_attribute("aria-invalid") == "true"
    ask(page, "Hello")
    assert "does not accept this API key" in page.locator(".model .remark").inner_text()
    key.fill("with spaces")
    key.press("Enter")
    assert key.evaluate("field => field.validationMessage") != ""
    key.fill("the-right-key")
    key.press("Enter")
    page.locator("#hint-key", has_text="accepts this key").wait_for()
    assert page.locator("#model").inner_text() == locked.llm.name
    page.errors.clear()  # the browser notes every status 401 itself
    page.reload()
    until(page, f"document.title.startsWith('{locked.llm.name}')")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.get_by_role("button", name="Answer again").click()
    assert sent.value.headers["authorization"] == "Bearer the-right-key"
    page.wait_for_selector(".model .branches")
    wait_for_answer(page)
    assert "tokens" in page.locator(".model .remark").inner_text()
    with page.expect_response("**/inspect/*") as response:
        page.get_by_role("button", name="Inspect this answer").click()
    assert response.value.status == 200
    page.get_by_role("link", name="Dashboard").click()
    page.locator(".cards").get_by_text("Throughput").wait_for()
    # It is in this browser's settings and in nothing that leaves it.
    assert page.evaluate("JSON.parse(localStorage.getItem('qnext.settings')).key") == (
        "the-right-key"
    )
    talks = "Object.entries(localStorage).filter(([key]) => key.startsWith('qnext.chat.'))"
    assert "the-right-key" not in page.evaluate(f"JSON.stringify({talks})")
    assert "the-right-key" not in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(visit, scheme) -> None:
    page = visit(color_scheme=scheme)

    def lightness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(",")) // 3

    assert (lightness() > 128) == (scheme == "light")
    # The heat map is painted with colours that scripts read.
    cell = "getComputedStyle(document.body).getPropertyValue('--cell')"
    assert page.evaluate(cell) == {
        "light": "rgb(238, 236, 229)", "dark": "rgb(38, 37, 33)",
    }[scheme]  # fmt: skip
    page.locator("#theme").click()
    assert (lightness() > 128) == (scheme == "dark")
    page.reload()
    until(page, "document.title !== 'qnext'")
    assert (lightness() > 128) == (scheme == "dark")


def test_everything_works_by_keyboard_alone(visit) -> None:
    page = visit()
    at = "document.activeElement"
    control = f"{at}.matches('a, button, summary, input, textarea')"
    focused = f"{control} ? {at}.getAttribute('aria-label') ?? {at}.textContent : ''"

    def tab_to(name: str, *, back: bool = False) -> None:
        for _ in range(40):
            if name in page.evaluate(focused):
                return
            page.keyboard.press("Shift+Tab" if back else "Tab")
        raise AssertionError(f"{name} cannot be reached; at {page.evaluate(focused)}")

    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    wait_for_answer(page)
    assert page.evaluate("document.activeElement.id") == "prompt"
    tab_to("Thought", back=True)
    page.keyboard.press("Enter")
    assert page.locator(".reasoning .text").is_visible()
    tab_to("Inspect this answer")
    page.keyboard.press("Enter")
    page.wait_for_selector(".chips")
    until(page, "document.activeElement.id === 'inspect'")
    for _ in range(20):
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Home")
    assert "token 1," in page.locator(".detail h4").inner_text()
    page.keyboard.press("ArrowRight")
    assert "token 2," in page.locator(".detail h4").inner_text()
    tab_to("Chat", back=True)
    page.keyboard.press("Enter")
    page.wait_for_selector("#chat:visible")
    tab_to("Settings")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "set-system"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "tune"

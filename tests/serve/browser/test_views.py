"""The inspect view, the dashboard, hostile text, and accessibility, in a browser."""

import json

import pytest
from browser_steps import ask, until

QUESTION = "What is 17 + 25?"
STORY = "Tell me a short story about a fox and the moon."

HOSTILE = """<script>window.harmed = 1</script><img src=x onerror="window.harmed = 2">

<svg onload="window.harmed = 3"><iframe srcdoc="<script>top.harmed = 4</script>"></iframe>

[a](javascript:window.harmed=5) [b](data:text/html,<script>1</script>)
![c](https://a.example/x.png) [e](https://b.example/?q=1) <b>bold</b>
<a href="https://a.example" onclick="window.harmed = 6">d</a>

| <img src=x onerror=harmed=7> | **x** |
| --- | --- |
| `<script>` | <style>body{display:none}</style> |

```html
<script>window.harmed = 8</script>
```

[f]( javascript:window.harmed=9 )
<form action="https://a.example"><input autofocus onfocus=harmed=10>
"""


# -- inspect -------------------------------------------------------------------------------------


def test_inspect_shows_what_the_server_knows(visit, site) -> None:
    page = visit()
    ask(page, STORY)
    said = page.locator("article.model .prose").inner_text()
    with page.expect_response("**/inspect/*") as response:
        page.get_by_role("button", name="Inspect this answer").click()
    found = response.value.json()
    chips = page.get_by_role("option").filter(visible=True)
    chips.first.wait_for()
    assert page.locator(".chip[role=option]").count() == len(found["tokens"])
    shown = "".join(page.locator(".chips").inner_text().replace("↵", "").split())
    assert "".join(said.split()) in shown
    page.locator(".chip[role=option]").nth(5).click()
    token = found["tokens"][5]
    assert f"token 6, id {token['id']}" in page.locator(".detail h4").inner_text()
    assert page.locator(".detail .bars li").count() >= len(token["top"])
    accepted = sum(one["accepted"] is True for one in found["tokens"])
    rejected = sum(one["accepted"] is False for one in found["tokens"])
    assert accepted > 0
    assert page.locator(".chips .accepted").count() == accepted
    assert page.locator(".chips .rejected").count() == rejected
    assert f"{accepted} of {accepted + rejected}" in page.locator(".figures").inner_text()
    layers = page.locator(".layers li").all_inner_texts()
    kinds = site.llm.config.layer_types
    assert layers == ["A" if kind == "full_attention" else "D" for kind in kinds]
    assert (
        "MiB" in page.locator(".memory").inner_text()
        or "KiB" in page.locator(".memory").inner_text()
    )


def test_the_heat_map_is_drawn_and_told(visit) -> None:
    page = visit()
    ask(page, QUESTION)
    with page.expect_response("**/inspect/*") as response:
        page.goto(page.url.split("#")[0] + "#inspect")
    routes = response.value.json()["routes"]
    page.wait_for_selector(".heat")
    page.get_by_text("As a table").click()
    rows = page.locator(".heat-table tbody tr")
    assert rows.count() == len(routes[0])
    counts = {}
    for token in routes:
        for expert in token[0]:
            counts[expert] = counts.get(expert, 0) + 1
    most = max(counts.values())
    assert f"({most})" in rows.first.inner_text()
    page.get_by_label("Selected token").check()
    page.locator(".chip[role=option]").nth(2).click()
    expected = ", ".join(str(expert) for expert in routes[2][0])
    assert rows.first.locator("td").last.inner_text() == expected
    # Something is painted where an expert ran.
    painted = page.evaluate(
        "(() => { const c = document.querySelector('.heat'); "
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
        "return new Set(new Uint32Array(d.buffer)).size; })()"
    )
    assert painted > 3


def test_an_answer_the_server_forgot_is_explained(visit, site) -> None:
    page = visit()
    ask(page, QUESTION)
    page.evaluate(
        "() => { const key = Object.keys(localStorage).find(k => k.startsWith('qnext.chat.'));"
        "const text = localStorage.getItem(key).replace(/chatcmpl-\\w+/, 'chatcmpl-0'); "
        "localStorage.setItem(key, text) }"
    )
    page.goto(site.url + "/#inspect")
    page.reload()
    until(page, "document.querySelector('.inspection')?.textContent.includes('not remembered')")
    page.errors.clear()  # the browser notes the status 404 itself


# -- dashboard -----------------------------------------------------------------------------------


def test_the_dashboard_shows_the_server_at_work(visit, site) -> None:
    page = visit()
    ask(page, STORY)
    page.get_by_role("link", name="Dashboard").click()
    cards = page.locator(".cards")
    cards.get_by_text("Throughput").wait_for()
    text = cards.inner_text()
    for words in ("tokens per second", "of prompt tokens reused", "accepted", "cache pages in use",
                  "ms on average", site.llm.name):  # fmt: skip
        assert words in text, words
    done = int(text.split(" tokens since the start")[0].split()[-1].replace(",", ""))
    body = {"prompt": "Once", "max_tokens": 30, "ignore_eos": True}
    site.client.post("/v1/completions", json=body)
    until(
        page, f"document.querySelector('.cards').innerText.includes('{done + 30:,} tokens since')"
    )


# -- hostile text --------------------------------------------------------------------------------


def chunk(**delta) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


def check_unharmed(page) -> None:
    page.wait_for_timeout(300)
    assert page.evaluate("window.harmed") is None
    conversation = page.locator("#log")
    for tag in ("script", "img", "iframe", "style", "form", "b"):
        assert conversation.locator(tag).count() == 0, tag
    links = [link.get_attribute("href") for link in conversation.locator("a").all()]
    assert all(link.startswith("https://") for link in links), links
    assert "https://b.example/?q=1" in links
    text = conversation.inner_text()
    assert "<script>window.harmed = 8</script>" in text
    assert '<img src=x onerror="window.harmed = 2">' in text
    assert page.locator("body").is_visible()


def test_html_from_the_model_is_never_executed(visit) -> None:
    page = visit()
    pieces = [chunk(reasoning_content=HOSTILE[:200])]
    pieces += [chunk(content=HOSTILE[at : at + 7]) for at in range(0, len(HOSTILE), 7)]
    end = {"index": 0, "delta": {}, "finish_reason": "stop"}
    pieces += [f"data: {json.dumps({'id': 'x', 'choices': [end]})}\n\n", "data: [DONE]\n\n"]
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=200, content_type="text/event-stream", body="".join(pieces)
        ),
    )
    page.get_by_label("Message", exact=True).fill("Harm me")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.model[aria-busy=false]")
    check_unharmed(page)


def test_html_from_a_file_or_a_person_is_never_executed(visit, tmp_path) -> None:
    page = visit()
    nodes = [
        {"id": "1", "parent": "", "role": "user", "content": HOSTILE},
        {"id": "2", "parent": "1", "role": "assistant", "content": HOSTILE, "reasoning": HOSTILE},
    ]
    conversation = {"id": "<img>", "title": "<img src=x onerror=harmed=11>", "nodes": nodes,
                    "chosen": [["", "1"], ["1", "2"]]}  # fmt: skip
    file = tmp_path / "hostile.json"
    file.write_text(json.dumps({"format": "qnext-conversations", "conversations": [conversation]}))
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.locator("#import-file").set_input_files(file)
    page.locator("#conversations .name").click()
    check_unharmed(page)


def test_the_policy_stops_what_slips_through(visit) -> None:
    page = visit()
    stopped = page.evaluate(
        "() => { try { document.body.innerHTML = '<p>'; return false } catch { return true } }"
    )
    assert stopped
    page.evaluate(
        "() => { const s = document.createElement('script'); try { s.setAttribute('src', "
        "'data:text/javascript,window.harmed=1'); document.body.append(s) } catch {} }"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.harmed") is None
    page.errors.clear()  # what the policy stopped is noted in the console


# -- accessibility -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, scheme) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe")
    page = visit(color_scheme=scheme, reduced_motion="reduce")

    def check(where: str) -> None:
        found = axe.Axe().run(page).response["violations"]
        serious = [
            (one["id"], [node["html"] for node in one["nodes"]][:3])
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == [], where

    check("the beginning")
    ask(page, QUESTION)
    page.locator(".reasoning summary").click()
    page.get_by_role("button", name="Conversations", exact=True).click()
    page.get_by_role("button", name="Settings").click()
    check("a conversation, with everything open")
    page.get_by_role("link", name="Inspect").click()
    page.wait_for_selector(".chips")
    page.get_by_text("As a table").click()
    check("inspect")
    page.get_by_role("link", name="Dashboard").click()
    page.locator(".cards").get_by_text("Throughput").wait_for()
    check("dashboard")


# -- narrow screens ------------------------------------------------------------------------------


def test_nothing_sticks_out_of_a_narrow_screen(visit) -> None:
    page = visit()
    page.set_viewport_size({"width": 360, "height": 700})
    ask(page, STORY)
    for view in ("Chat", "Inspect", "Dashboard"):
        page.get_by_role("link", name=view, exact=True).click()
        page.locator(".chips, .cards, #prompt").filter(visible=True).first.wait_for()
        for part in ("html", "main:not([hidden])"):
            width = page.locator(part).evaluate("part => part.scrollWidth")
            assert width <= 360, (view, part)
        assert page.get_by_role("button", name="Settings").is_visible()

"""Markdown in a browser: what it becomes, in one piece and as it streams."""

import random

WHOLE = """async (text) => {
  const { MarkdownView } = await import('/ui/markdown.js');
  const element = document.createElement('div');
  new MarkdownView(element).update(text);
  return new XMLSerializer().serializeToString(element).replaceAll(/ xmlns="[^"]*"/g, '');
}"""

STREAMED = """async ([text, cuts]) => {
  const { MarkdownView } = await import('/ui/markdown.js');
  const [whole, pieces] = [document.createElement('div'), document.createElement('div')];
  new MarkdownView(whole).update(text);
  const view = new MarkdownView(pieces);
  for (const cut of [...cuts, text.length]) view.update(text.slice(0, cut));
  return whole.isEqualNode(pieces);
}"""

CODES = """async (text) => {
  const { codeBlock } = await import('/ui/markdown.js');
  return ['python', 'js', 'c', 'sh', 'sql', 'json', 'unknown'].map(
    (language) => codeBlock(text, language).querySelector('code').textContent);
}"""

PIECES = [
    "a", "word ", "\n", "\n\n", "# ", "- ", "1. ", "  ", "    ", "> ", "```", "```py\n", "*", "**",
    "_", "`", "~~", "[x](", "https://a.example", ")", "|", "| a | b |\n", "|---|---|\n", "---",
    "<b>", "\\", "[ ] ", "def f(): # c\n", '"s"', "é☂", "\r\n", "![", "]",
]  # fmt: skip

EXAMPLES = [
    (
        "a *b* **c** ~~d~~ `e`",
        "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e</code></p>",
    ),
    ("2 * 3 * 4 and a_b_c", "<p>2 * 3 * 4 and a_b_c</p>"),
    ("# T\ntext\nmore", "<h3>T</h3><p>text<br />more</p>"),
    ("1. a\n2. b\n   - c", '<ol start="1"><li>a</li><li>b<ul><li>c</li></ul></li></ol>'),
    ("> a\n> b", "<blockquote><p>a<br />b</p></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr /><p>b</p>"),
    (r"\*a\* <b>", "<p>*a* &lt;b&gt;</p>"),
    ("[a](javascript:b)", "<p>[a](javascript:b)</p>"),
    ("``a`b``", "<p><code>a`b</code></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
]


def test_marks_become_elements(visit) -> None:
    page = visit()
    for text, html in EXAMPLES:
        assert page.evaluate(WHOLE, text) == f"<div>{html}</div>", text


def test_links_lead_to_the_web_only_and_tell_it_nothing(visit) -> None:
    html = visit().evaluate(WHOLE, "[a](https://a.example/b_(c)) and https://b.example/x.")
    assert html.count("<a ") == 2
    assert 'href="https://a.example/b_(c)"' in html
    assert 'href="https://b.example/x"' in html
    assert html.count('rel="noopener noreferrer nofollow"') == 2


def test_code_keeps_every_character_and_gets_colours(visit) -> None:
    code = 'def f(x):  # "no" string\n    return "a # b" + 0x1F'
    page = visit()
    html = page.evaluate(WHOLE, f"```python\n{code}\n```")
    coloured = {"word": "def", "comment": '# "no" string', "string": '"a # b"', "number": "0x1F"}
    for kind, part in coloured.items():
        assert f'<span class="c-{kind}">{part}</span>' in html
    assert page.evaluate(CODES, code) == [code] * 7


def test_what_streams_in_looks_like_what_comes_at_once(visit) -> None:
    page = visit()
    rng = random.Random(7)
    for _ in range(150):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 25)))
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(5)))
        assert page.evaluate(STREAMED, [text, cuts]), (text, cuts)


def test_hostile_repetition_is_shown(visit) -> None:
    """Would hang if the time grew with the square, or the depth with the length."""
    page = visit()
    for unit in ("*a ", "**a ", "[", "`a ", "> ", "- x ", "_a ", "![](", "|", "  - a\n"):
        assert len(page.evaluate(WHOLE, unit * 8000)) > 8000, unit

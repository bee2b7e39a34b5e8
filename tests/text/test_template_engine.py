"""Templates of other people: what they may do, what happens when they fail, where they are kept."""

import json
import threading
from datetime import UTC, datetime

import pytest

from qnext.errors import TemplateError, TokenizerError
from qnext.text.chat import BUILTIN_ORIGIN, ChatTemplate

QWEN3 = ChatTemplate.builtin()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def rendered(source, messages=None, **options):
    return ChatTemplate(source, origin="X").render(messages or [user("Hi")], **options)


def test_blocks_leave_no_white_space():
    source = (
        "{% for m in messages %}\n    {% if m %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n"
    )
    assert rendered(source) == "Hi\n"


def test_loops_can_be_left():
    assert (
        rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "01"
    )


def test_loop_variables_are_complete():
    source = (
        "{% for i in range(3) %}{{ loop.index }}{{ loop.length }}{{ loop.first }}{{ loop.last }}"
        "{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}"
    )
    assert rendered(source) == "13TrueFalse1 23FalseFalse02 33FalseTrue1 "


def test_loops_run_over_what_templates_give_them():
    source = (
        "{% for k, v in {'a': 1}|items %}{{ k }}{{ v }}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ loop.index }}{% endfor %}"
        "{% for x in nothing %}x{% else %}none{% endfor %}{% for c in 'ab' %}{{ c }}.{% endfor %}"
    )
    assert rendered(source, [user("a"), assistant("b"), user("c")]) == "a112nonea.b."


def test_filters_that_are_counted_do_what_they_did():
    assert rendered("{{ [1, 2, 3]|slice(2)|list }}") == "[[1, 2], [3]]"
    assert rendered("{{ [1, 2, 3]|slice(2, fill_with=0)|list }}") == "[[1, 2], [3, 0]]"


def test_keywords_and_json_options_reach_the_template():
    assert rendered("{{ style }} {{ tools }}", style="short") == "short None"
    assert (
        rendered("{{ {'b': 1, 'a': 2}|tojson(indent=1, sort_keys=true) }}")
        == '{\n "a": 2,\n "b": 1\n}'
    )


def test_the_clock_is_passed_in():
    clock = ChatTemplate(
        "{{ strftime_now('%Y-%m-%d') }}", now=lambda: datetime(2024, 2, 29, tzinfo=UTC)
    )
    assert clock.render([user("U")]) == "2024-02-29"


def test_names_given_at_construction_are_known():
    template = ChatTemplate(
        "{{ bos_token }}{{ messages[0].content }}", variables={"bos_token": "<s>"}
    )
    assert template.render([user("U")]) == "<s>U"


def test_arguments_as_json_text_are_parsed_for_templates_that_iterate_over_them():
    source = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% for k, v in c.function.arguments|items %}{{ k }}={{ v }};{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    text_call = {"function": {"name": "f", "arguments": '{"city": "Rome", "days": 3}'}}
    assert rendered(source, [assistant("", tool_calls=[text_call])]) == "city=Rome;days=3;"
    for arguments, message in (
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
    ):
        bad_call = {"function": {"name": "f", "arguments": arguments}}
        with pytest.raises(
            TemplateError, match=rf"tool_calls\[0\]\.function\.arguments: {message}"
        ):
            rendered(source, [assistant("", tool_calls=[bad_call])])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n\n{% if x %}", r"X, line 3: Unexpected end of template.*not a valid template"),
        ("{% foo %}", r"X, line 1: Encountered unknown tag 'foo'"),
        (
            "a\n{{ raise_exception('No user query.') }}",
            "X, line 2 refuses these messages: No user query.",
        ),
        ("\n{{ x.y.z }}", "X, line 2 fails: 'x' is undefined"),
        ("{{ messages[0].content + 1 }}", "X, line 1 fails: TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "X, line 1 fails: ZeroDivisionError"),
        ("\n\n{{ x|tojson }}", "X, line 3 fails: TypeError: Object of type Undefined"),
        ("{{ messages|unknown }}", "X, line 1: No filter named 'unknown'"),
        ("{% include 'other' %}", "X, line 1 fails: TypeError: no loader"),
        (
            "{% macro m() %}\n{{ none.x.y }}{% endmacro %}\n\n{{ m() }}",
            "X, line 2 fails: 'None' has no attribute 'x'",
        ),
    ],
)
def test_a_failing_template_is_quoted_with_its_line(source, message):
    with pytest.raises(TemplateError, match=message):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% for a in range(10**12) %}{% endfor %}",
        "{{ [1]|slice(10**12)|list }}",
        "{{ [1]|slice(-10**9)|list }}{% for i in [1, 2] %}{{ [1]|slice(10**9)|list }}{% endfor %}",
        "{{ lipsum(10**9) }}",
        "{{ 'x' * 10**12 }}",
        "{{ 10**12 * [messages] }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_a_template_cannot_run_for_ever(source):
    with pytest.raises(TemplateError, match=r"X, line 1 fails: "):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ (messages|attr('__class__')).__name__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ open('/etc/passwd') }}",
        "{{ import('os') }}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_cannot_reach_python_or_change_the_messages(source):
    messages = [user("Hi")]
    with pytest.raises(TemplateError, match=r"X, line 1"):
        rendered(source, messages)
    assert messages == [user("Hi")]


def test_one_template_serves_several_threads():
    # Each rendering takes more than half of the steps it may take.
    loops = "{% for a in range(1000) %}{% for b in range(1200) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(loops + "{{ messages[0].content }}")
    outputs = {}

    def work(n):
        outputs[n] = template.render([user(str(n))])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {n: str(n) for n in range(4)}


# Where a model folder keeps its template.


def write_config(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values), "utf-8")


def test_a_folder_without_a_template_gets_the_built_in_one(tmp_path):
    write_config(tmp_path, eos_token="<|im_end|>", chat_template=None)
    template = ChatTemplate.from_folder(tmp_path)
    assert template.source == QWEN3.source
    assert template.origin == BUILTIN_ORIGIN


def test_places_are_looked_at_in_order(tmp_path):
    (tmp_path / "chat_template.json").write_text('{"chat_template": "third"}')
    assert ChatTemplate.from_folder(tmp_path).source == "third"
    write_config(tmp_path, chat_template="second")
    assert ChatTemplate.from_folder(tmp_path).source == "second"
    (tmp_path / "chat_template.jinja").write_text("first")
    template = ChatTemplate.from_folder(tmp_path)
    assert template.source == "first"
    assert template.origin == str(tmp_path / "chat_template.jinja")


def test_one_of_several_named_templates_is_chosen(tmp_path):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write_config(tmp_path, chat_template=named)
    assert ChatTemplate.from_folder(tmp_path).source == "D"
    assert ChatTemplate.from_folder(tmp_path, name="tool_use").source == "T"
    with pytest.raises(TemplateError, match=r"no template named 'rag'; it has default, tool_use"):
        ChatTemplate.from_folder(tmp_path, name="rag")


def test_named_templates_may_be_files(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("D")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert ChatTemplate.from_folder(tmp_path).source == "D"
    assert ChatTemplate.from_folder(tmp_path, name="rag").source == "R"


def test_a_name_is_refused_where_there_is_no_template(tmp_path):
    with pytest.raises(TemplateError, match="no chat template, so none named 'rag' either"):
        ChatTemplate.from_folder(tmp_path, name="rag")


@pytest.mark.parametrize("value", [7, [], ["x"], [{"name": "a"}], {"default": "x"}])
def test_a_template_of_another_type_is_named(tmp_path, value):
    write_config(tmp_path, chat_template=value)
    with pytest.raises(
        TemplateError, match=r"tokenizer_config.json: chat_template: expected a template"
    ):
        ChatTemplate.from_folder(tmp_path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"chat_template.json: not valid JSON"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateError, match="a chat template is not UTF-8 text"):
        ChatTemplate.from_folder(tmp_path)


def test_special_tokens_are_known_to_the_template(tmp_path):
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}"
    write_config(
        tmp_path,
        bos_token={"content": "<s>"},
        eos_token="</s>",
        pad_token=None,
        chat_template=template,
    )
    assert ChatTemplate.from_folder(tmp_path).render([user("U")]) == "<s>|</s>|False"


def test_a_saved_template_is_found_again(tmp_path):
    QWEN3.save(tmp_path / "new")
    assert ChatTemplate.from_folder(tmp_path / "new").source == QWEN3.source

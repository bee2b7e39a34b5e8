"""Dialogues in which the assistant calls functions, over schemas of our own."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from qnext.data.chats import Chat

_CITIES = ("Paris", "London", "Rome", "Berlin", "Oslo", "Cairo", "Tokyo", "Lima", "Madrid",
           "Vienna", "Dublin", "Prague", "Lisbon", "Athens", "Boston", "Delhi")  # fmt: skip
_DAYS = ("today", "tomorrow", "on Monday", "on Friday", "on Sunday")
_SKY = ("sunny", "rainy", "cloudy", "windy", "snowy")
_PEOPLE = ("Anna", "Ben", "Lily", "Sam", "Mia", "Tom", "my mother", "my brother")
_SONGS = ("jazz", "rock", "a lullaby", "some piano music", "a folk song")
_NOTES = ("buy milk", "call the doctor", "water the plants", "feed the cat", "read chapter two")
_WORDS = ("house", "water", "bread", "friend", "tree", "sun", "dog", "book")
_TONGUES = ("French", "Spanish", "German", "Italian")


@dataclass(frozen=True, slots=True)
class _Tool:
    name: str
    about: str
    fields: Mapping[str, tuple[str, str]]
    """Parameter -> (JSON type, description)."""
    use: Callable[[Random], tuple[list[str], dict[str, Any], dict[str, Any], str]]
    """(ways to ask, arguments, result, what to say)."""

    def schema(self) -> dict[str, Any]:
        properties = {n: {"type": t, "description": d} for n, (t, d) in self.fields.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.fields)}
        function = {"name": self.name, "description": self.about, "parameters": parameters}
        return {"type": "function", "function": function}


def _weather(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    city, day = rng.choice(_CITIES), rng.choice(_DAYS)
    sky, degrees = rng.choice(_SKY), rng.randint(-5, 35)
    asks = [f"What is the weather in {city} {day}?", f"How will the weather be in {city} {day}?",
            f"Tell me the weather for {city} {day}."]  # fmt: skip
    bare = day.removeprefix("on ")
    return (asks, {"city": city, "day": bare}, {"sky": sky, "degrees": degrees},
            f"It will be {sky} in {city} {day}, with {degrees} degrees.")  # fmt: skip


def _timer(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    minutes = rng.randint(2, 90)
    asks = [f"Set a timer for {minutes} minutes.", f"Please wake me in {minutes} minutes.",
            f"Start a timer of {minutes} minutes, please."]  # fmt: skip
    return asks, {"minutes": minutes}, {"ok": True}, f"The timer is set for {minutes} minutes."


def _message(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    person, text = rng.choice(_PEOPLE), rng.choice(("I am late", "see you soon", "happy birthday",
                                                    "thank you", "dinner is ready"))  # fmt: skip
    asks = [f'Send "{text}" to {person}.', f'Tell {person}: "{text}".']
    return asks, {"to": person, "text": text}, {"sent": True}, f"I sent your message to {person}."


def _music(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    song = rng.choice(_SONGS)
    asks = [f"Play {song}.", f"I want to hear {song}.", f"Can you play {song}?"]
    return asks, {"what": song}, {"playing": True}, f"I am playing {song} for you."


def _note(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    text, number = rng.choice(_NOTES), rng.randint(1, 40)
    asks = [f"Make a note: {text}.", f"Please remember that I have to {text}.",
            f"Write down: {text}."]  # fmt: skip
    return asks, {"text": text}, {"note": number}, f"I wrote it down as note {number}."


def _translate(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    word, tongue = rng.choice(_WORDS), rng.choice(_TONGUES)
    # The result is made up: the model must read it, not know it.
    found = "".join(
        rng.choice("bdklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    )
    asks = [f'What is "{word}" in {tongue}?', f'Translate "{word}" into {tongue}.']
    return (asks, {"word": word, "language": tongue}, {"translation": found},
            f'In {tongue}, "{word}" is "{found}".')  # fmt: skip


def _clock(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    city, hour, minute = rng.choice(_CITIES), rng.randint(0, 23), rng.randrange(0, 60)
    said = f"{hour:02}:{minute:02}"
    asks = [f"What time is it in {city}?", f"Tell me the time in {city}."]
    return asks, {"city": city}, {"time": said}, f"It is {said} in {city}."


def _multiply(rng: Random) -> tuple[list[str], dict[str, Any], dict[str, Any], str]:
    a, b = rng.randint(100, 999), rng.randint(11, 99)
    asks = [f"Use the calculator: what is {a} times {b}?", f"Calculate {a} * {b} with the tool."]
    return (asks, {"expression": f"{a} * {b}"}, {"result": a * b}, f"{a} × {b} = {a * b}.")


_TOOLS = (
    _Tool("get_weather", "The weather of a city", {"city": ("string", "Name of the city"),
          "day": ("string", "Which day")}, _weather),
    _Tool("set_timer", "Start a timer", {"minutes": ("integer", "How long")}, _timer),
    _Tool("send_message", "Send a text to somebody", {"to": ("string", "Who gets it"),
          "text": ("string", "What to say")}, _message),
    _Tool("play_music", "Play music", {"what": ("string", "Song or kind of music")}, _music),
    _Tool("make_note", "Write a note", {"text": ("string", "The note")}, _note),
    _Tool("translate", "Translate a word", {"word": ("string", "The word"),
          "language": ("string", "Into which language")}, _translate),
    _Tool("get_time", "The time in a city", {"city": ("string", "Name of the city")}, _clock),
    _Tool("calculator", "Work out an expression", {"expression": ("string", "What to work out")},
          _multiply),
)  # fmt: skip

_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("What can you do?", "I can talk with you, and I can use the functions I was given."),
    ("How are you?", "I am fine, thank you. What can I do for you?"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolTask:
    """A request, the call it asks for, and the dialogue around it."""

    chat: Chat
    name: str
    arguments: dict[str, Any]

    def right(self, calls: list[dict[str, Any]]) -> bool:
        """Whether exactly the expected call was made."""
        return calls == [{"name": self.name, "arguments": self.arguments}]


def tool_task(rng: Random, seen: "Callable[[str], bool] | None" = None) -> ToolTask:
    """A request among one to three functions, the call, its result, and the answer.

    ``seen`` chooses requests: only those for which it is true of the call's text are made.
    """
    while True:
        offered = rng.sample(_TOOLS, rng.randint(1, 3))
        tool = rng.choice(offered)
        asks, arguments, result, says = tool.use(rng)
        if seen is None or seen(json.dumps(arguments)):
            break
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    messages = (
        {"role": "user", "content": rng.choice(asks)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps(result)},
        {"role": "assistant", "content": says},
    )
    chat = Chat(
        messages=messages,
        tools=tuple(one.schema() for one in offered),
        enable_thinking=False if rng.random() < 0.5 else None,
    )
    return ToolTask(chat=chat, name=tool.name, arguments=arguments)


def tool_chat(rng: Random) -> Chat:
    """A training dialogue; one in eight needs no function."""
    from qnext.data.generate.exercise import is_held_out

    if rng.random() < 0.125:
        ask, says = rng.choice(_TALK)
        schemas = tuple(one.schema() for one in rng.sample(_TOOLS, rng.randint(1, 3)))
        messages = ({"role": "user", "content": ask}, {"role": "assistant", "content": says})
        return Chat(messages=messages, tools=schemas)
    return tool_task(rng, lambda text: not is_held_out(text)).chat

"""Short stories from plots with blanks, so that a request for a story about something gets that
story.

They also fill the haystacks of the needle test, so that it is the same everywhere.
"""

import re
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Hero:
    """A main character: what it is, how it is referred to, and what it likes to do."""

    kind: str
    he: str
    his: str
    likes: tuple[str, ...]
    home: str
    """Where it lives, with its preposition."""


_HEROES = (
    Hero(
        "cat",
        "she",
        "her",
        ("sleep in the sun", "chase leaves", "climb trees"),
        "in a small red house",
    ),
    Hero("dog", "he", "his", ("run", "dig holes", "play with a ball"), "in a house near the park"),
    Hero("bird", "she", "her", ("sing", "fly over the trees", "look at the sky"), "in a tall tree"),
    Hero(
        "rabbit",
        "he",
        "his",
        ("hop in the grass", "eat carrots", "hide and seek"),
        "in a hole under a hill",
    ),
    Hero(
        "mouse", "she", "her", ("eat cheese", "read tiny books", "explore"), "in a hole in the wall"
    ),
    Hero(
        "bear",
        "he",
        "his",
        ("eat honey", "swim in the river", "take long naps"),
        "in a cave in the forest",
    ),
    Hero(
        "fox",
        "she",
        "her",
        ("run in the snow", "tell jokes", "look for berries"),
        "in a den in the forest",
    ),
    Hero("frog", "he", "his", ("jump", "sing at night", "sit on a leaf"), "in a green pond"),
    Hero(
        "duck", "she", "her", ("swim", "splash in the water", "walk in the rain"), "by a quiet pond"
    ),
    Hero("horse", "he", "his", ("run in the field", "eat apples", "jump over logs"), "on a farm"),
    Hero(
        "lion",
        "he",
        "his",
        ("roar", "lie in the shade", "play with friends"),
        "in the hot grassland",
    ),
    Hero(
        "elephant",
        "she",
        "her",
        ("splash water", "eat fruit", "walk with the family"),
        "in the jungle",
    ),
    Hero(
        "dragon",
        "he",
        "his",
        ("fly over mountains", "make warm fires", "count gold"),
        "on a high mountain",
    ),
    Hero("robot", "he", "his", ("help people", "count stars", "learn new words"), "in a big city"),
    Hero("boy", "he", "his", ("draw", "ride a bike", "build towers"), "in a small town"),
    Hero("girl", "she", "her", ("paint", "read books", "plant flowers"), "in a small village"),
    Hero(
        "princess", "she", "her", ("ride horses", "dance", "look at the stars"), "in a white castle"
    ),
    Hero(
        "king",
        "he",
        "his",
        ("walk in the garden", "eat cake", "listen to music"),
        "in a great castle",
    ),
    Hero("witch", "she", "her", ("mix soup", "fly at night", "talk to cats"), "in a crooked house"),
    Hero(
        "monkey",
        "he",
        "his",
        ("swing in the trees", "eat bananas", "make funny faces"),
        "in the jungle",
    ),
    Hero(
        "turtle",
        "she",
        "her",
        ("walk slowly", "swim in the sea", "look at clouds"),
        "on a sandy beach",
    ),
    Hero(
        "owl",
        "he",
        "his",
        ("fly at night", "read old books", "watch the moon"),
        "in an old oak tree",
    ),
    Hero("pig", "she", "her", ("roll in the mud", "eat corn", "sleep in the hay"), "on a farm"),
)

_NAMES = {
    "he": ("Tom", "Ben", "Max", "Sam", "Tim", "Leo", "Finn", "Oscar", "Bruno", "Jack"),
    "she": ("Lily", "Mia", "Anna", "Luna", "Daisy", "Rosie", "Emma", "Bella", "Ruby", "Sue"),
}
_FRIENDS = ("bird", "squirrel", "old owl", "little mouse", "kind farmer", "small girl", "young boy")
_LOST = (
    "red ball",
    "warm hat",
    "golden key",
    "little bell",
    "favorite book",
    "blue kite",
    "toy boat",
)
_FOUND = (
    "a shiny stone",
    "a small box",
    "an old map",
    "a silver coin",
    "a strange egg",
    "a tiny door",
)
TRAITS = (
    "little",
    "kind",
    "brave",
    "happy",
    "shy",
    "clever",
    "young",
    "funny",
    "small",
    "curious",
)
_WEATHER = ("sunny", "cold", "windy", "rainy", "warm", "bright", "snowy")
_PLACES = ("the forest", "the garden", "the river", "the hill", "the park", "the sea", "the market")
_FOODS = (
    "a warm pie",
    "a sweet cake",
    "a jar of honey",
    "a bowl of soup",
    "an apple cake",
    "a fresh bread",
)
_LESSONS = (
    "It is good to help others.",
    "A good friend is better than gold.",
    "You can be small and brave.",
    "It feels good to share.",
    "We learn when we try again.",
    "Being kind makes everyone happy.",
)


def _lost_thing(rng: Random, s: dict[str, str]) -> list[str]:
    return [
        f"One {s['weather']} day, {s['name']} lost {s['his']} {s['lost']}.",
        rng.choice(
            (
                f"{s['He']} looked under the bed and behind the door, but it was not there.",
                f"{s['He']} looked here and there, but {s['he']} could not find it.",
            )
        ),
        f"{s['name']} was sad and went to {s['place']}.",
        f'There {s["he"]} met a {s["friend"]}. "Why are you sad?" asked the {s["friend"]}.',
        f'"I lost my {s["lost"]}," said {s["name"]}.',
        f'"I will help you," said the {s["friend"]}. They looked for it together.',
        f"At last they saw the {s['lost']} next to a big stone.",
        f'"Thank you!" said {s["name"]}. They went home and ate {s["food"]}.',
    ]


def _new_friend(rng: Random, s: dict[str, str]) -> list[str]:
    return [
        f"But {s['name']} had no friends, and sometimes {s['he']} felt alone.",
        f"One {s['weather']} morning, {s['he']} walked to {s['place']}.",
        f"{s['He']} saw a {s['friend']} who could not get over the water.",
        f'"Please help me," said the {s["friend"]}.',
        rng.choice(
            (
                f"{s['name']} was a little afraid, but {s['he']} wanted to help.",
                f"{s['name']} thought for a moment. Then {s['he']} had an idea.",
            )
        ),
        f"{s['He']} put a long log over the water, and the {s['friend']} walked across.",
        f'"You are so kind," said the {s["friend"]}. "Will you be my friend?"',
        f'"Yes!" said {s["name"]}. From that day on, they played together every day.',
    ]


def _treasure(rng: Random, s: dict[str, str]) -> list[str]:
    return [
        f"One day, {s['name']} went to {s['place']} and found {s['found']}.",
        f'"What is this?" {s["he"]} said. {s["He"]} had never seen such a thing.',
        f"{s['He']} showed it to a {s['friend']}.",
        rng.choice(
            (
                f'"It is magic," said the {s["friend"]}. "You can make one wish."',
                f'"Keep it safe," said the {s["friend"]}. "It will give you one wish."',
            )
        ),
        f"{s['name']} thought for a long time. {s['He']} did not wish for gold.",
        f'"I wish that nobody here is hungry," said {s["name"]}.',
        f"Suddenly there was {s['food']} for everyone in {s['place']}.",
        f"Everyone danced and thanked {s['name']}.",
    ]


def _storm(rng: Random, s: dict[str, str]) -> list[str]:
    return [
        f"One night there was a big storm. The wind was loud and {s['name']} was afraid.",
        f"Then {s['he']} heard a small voice outside. It was a {s['friend']}.",
        f'"I am cold and wet," said the {s["friend"]}. "May I come in?"',
        f'"Of course," said {s["name"]}. '
        f"{s['He']} made a fire and gave the {s['friend']} {s['food']}.",
        rng.choice(
            (
                "They told stories until the rain stopped.",
                "They sang songs until the storm was over.",
            )
        ),
        f"In the morning the sun came out. {s['name']} was not afraid any more.",
        f'"Thank you," said the {s["friend"]}. "Now I know a good friend."',
    ]


def _learning(rng: Random, s: dict[str, str]) -> list[str]:
    skill = rng.choice(("swim", "dance", "read", "whistle", "paint", "bake bread", "skate"))
    return [
        f"But there was one thing {s['name']} could not do. {s['He']} could not {skill}.",
        f"One {s['weather']} day, {s['he']} tried to {skill} near {s['place']}, but it did not "
        f"work.",
        f'"I will never learn it," {s["he"]} said.',
        f'A {s["friend"]} heard this. "Try again," said the {s["friend"]}. "I will show you."',
        "They tried the next day, and the day after that.",
        f"Slowly {s['name']} got better. At last {s['he']} could {skill}!",
        f"{s['He']} was so proud that {s['he']} showed everyone.",
    ]


def _sharing(rng: Random, s: dict[str, str]) -> list[str]:
    return [
        f"One day, {s['name']} made {s['food']}. It smelled very good.",
        f'A {s["friend"]} came by. "I am so hungry," said the {s["friend"]}.',
        f"At first {s['name']} did not want to share. {s['He']} wanted to eat it all.",
        f"But then {s['he']} saw that the {s['friend']} was sad.",
        f'"Come and sit with me," said {s["name"]}. They ate together and laughed.',
        rng.choice(
            (
                f"The next day, the {s['friend']} came back with a gift. It was {s['found']}.",
                f"Later the {s['friend']} gave {s['name']} {s['found']} to say thank you.",
            )
        ),
    ]


_PLOTS = (_lost_thing, _new_friend, _treasure, _storm, _learning, _sharing)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng: Random, hero: Hero | None = None, name: str = "") -> tuple[Hero, str, str]:
    """(hero, name, text) of a story of 8 to 12 sentences."""
    hero = hero or rng.choice(_HEROES)
    name = name or rng.choice(_NAMES[hero.he])
    slots = {
        "name": name,
        "he": hero.he,
        "He": hero.he.capitalize(),
        "his": hero.his,
        "lost": rng.choice(_LOST),
        "found": rng.choice(_FOUND),
        "friend": rng.choice([friend for friend in _FRIENDS if hero.kind not in friend]),
        "weather": rng.choice(_WEATHER),
        "place": rng.choice(_PLACES),
        "food": rng.choice(_FOODS),
    }
    trait = rng.choice(TRAITS)
    opening = rng.choice(
        (
            f"Once upon a time, there was {article(trait + ' ' + hero.kind)} named {name}.",
            f"Once there was {article(trait + ' ' + hero.kind)} called {name}.",
            f"{name} was {article(trait + ' ' + hero.kind)}.",
        )
    )
    like = rng.choice(hero.likes)
    if like == "hide and seek":
        like = "play hide and seek"
    second = f"{slots['He']} lived {hero.home} and liked to {like}."
    body = rng.choice(_PLOTS)(rng, slots)
    cut = rng.randint(3, 5)
    end = rng.choice(
        (
            f"And {name} was very happy.",
            rng.choice(_LESSONS),
            f"{rng.choice(_LESSONS)} The end.",
            f"{name} went to sleep with a smile.",
        )
    )
    first = " ".join([opening, second])
    return hero, name, "\n\n".join([first, " ".join(body[:cut]), " ".join([*body[cut:], end])])


_ASK = (
    "Tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Can you tell me a story about {x}?",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Please tell me a story about {x}.",
    "I want a story about {x}.",
    "tell me a story about {x}",
)
_ASK_ANY = (
    "Tell me a story.",
    "Can you tell me a story?",
    "Tell me a short story.",
    "A story, please!",
)


def request(rng: Random, subject: str) -> str:
    """A way to ask for a story about ``subject``; any story when it is empty."""
    return rng.choice(_ASK).format(x=subject) if subject else rng.choice(_ASK_ANY)


def subject_of(text: str) -> str:
    """The hero a corpus story is about, as "a cat"; empty if no known hero is named twice."""
    lowered = text.lower()
    best = max(_HEROES, key=lambda hero: lowered.count(f" {hero.kind}"))
    return article(best.kind) if lowered.count(f" {best.kind}") >= 2 else ""


def haystack(rng: Random, characters: int) -> list[str]:
    """Sentences of made-up stories, of together about ``characters``."""
    sentences: list[str] = []
    size = 0
    while size < characters:
        _, _, text = story(rng)
        for sentence in re.split(r"(?<=[.!?\"]) (?=[A-Z\"])", text.replace("\n\n", " ")):
            sentences.append(sentence)
            size += len(sentence) + 1
    return sentences

"""Requests for stories, answered with template stories."""

from random import Random

from recipes.mini.chats import Talk, single

from qnext.data.generate.stories import TRAITS, article, request, story


def story_chat(rng: Random) -> Talk:
    """A request for a story about a hero, and the story; sometimes followed by thanks or a
    question.
    """
    hero, name, text = story(rng)
    trait = rng.choice(TRAITS)
    subject = rng.choice(
        (
            article(hero.kind),
            article(hero.kind),
            article(f"{trait} {hero.kind}"),
            f"{article(hero.kind)} named {name}",
            "",
        )
    )
    if rng.random() < 0.8:
        return single(request(rng, subject), text)
    follow = rng.choice(
        (
            ("Who is the story about?", f"The story is about {article(hero.kind)} named {name}."),
            (f"Where did {name} live?", f"{name} lived {hero.home}."),
            ("Thank you!", "You are welcome! I am glad to tell you stories."),
            ("I liked it.", "Thank you! I am happy that you liked the story."),
        )
    )
    turns = (("user", request(rng, subject)), ("assistant", text), ("user", follow[0]))
    return Talk(turns=(*turns, ("assistant", follow[1])))

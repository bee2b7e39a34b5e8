"""Prompts for ``benchmarks.speculation``, in four classes that differ in how predictable answers
are. A text is continued; a list of messages is answered through the chat template.
"""

Prompt = str | list[dict[str, str]]


def _ask(*texts: str) -> list[Prompt]:
    return [[{"role": "user", "content": text}] for text in texts]


def _talk(*texts: str) -> Prompt:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


STORIES: list[Prompt] = [
    "Once upon a time, a small fox found a red umbrella by the river. She",
    "Ben had a new kite. It was blue and it had a long tail. One windy day,",
    "The old clock in the hall had stopped. Grandma said to Lily,",
    "There was a frog who could not swim. Every day he sat on a stone and",
    "In a quiet village lived a baker who loved to sing. Each morning he",
    "A little robot woke up in a garden. It did not know what a flower was, so",
    "Mia wanted to build a boat. She had some wood, a rope and",
    "It was the first day of snow. The two brothers ran outside and",
    "The moon looked down at the farm. All the animals were asleep, but the owl",
    "Sam lost his favorite ball. He looked under the bed, and then",
    "A tiny mouse lived in a big library. At night it",
    "Anna and her dad went to the market. They wanted to buy apples, but",
    "Long ago there was a dragon who was afraid of the dark. One night",
    "Tom heard a strange sound in the attic. He took his lamp and",
    "The green bus was full of children. They were on the way to the sea when",
    "One day a bird with a broken wing came to the window. Nora",
]

QUESTIONS: list[Prompt] = _ask(
    "What is the capital of France?",
    "Why do leaves fall in autumn?",
    "How many legs does a spider have?",
    "What does the word gentle mean?",
    "What is 14 + 9?",
    "Who are you?",
    "Why do we need to drink water?",
    "What is the opposite of heavy?",
    "Which animal gives us wool?",
    "How do birds learn to fly?",
    "What is 8 times 7?",
    "What can you do?",
    "Where does rain come from?",
    "What is the biggest ocean?",
    "Why is it dark at night?",
    "What do bees make?",
)

LISTS: list[Prompt] = _ask(
    "Count from 1 to 20.",
    "Count down from 15 to 1.",
    "Name the days of the week.",
    "Name the months of the year.",
    "Write the letters of the alphabet.",
    "Count from 2 to 30 in steps of 2.",
    "List the numbers from 21 to 35.",
    "Count from 5 to 60 in steps of 5.",
    "Write the word apple ten times.",
    "Name the seasons, then name the days of the week.",
    "Count from 40 to 52.",
    "Write the numbers from 1 to 12, one on each line.",
    "Count from 10 to 100 in steps of 10.",
    "Say hello eight times.",
    "Write the alphabet in capital letters.",
    "Count from 100 to 110.",
)

CHAT: list[Prompt] = [
    _talk("Hello!", "Hello! How can I help you today?", "I am bored. What can I do?"),
    _talk("Hi, my name is Paul.", "Nice to meet you, Paul.", "What is my name?"),
    _talk("I like dogs.", "Dogs are good friends.", "Tell me something about dogs."),
    _talk("It rains today.", "Then it is good to be inside.", "Tell me a short story about rain."),
    _talk("What is 3 + 4?", "3 + 4 = 7.", "And what is 7 + 8?"),
    _talk("I feel sad.", "I am sorry to hear that.", "My friend moved away."),
    _talk("Good morning!", "Good morning!", "What should I eat for breakfast?"),
    _talk("Do you know any animals?", "Yes, many.", "Tell me about the elephant."),
    _talk("Thank you!", "You are welcome.", "Can you tell me a story about a cat?"),
    _talk("I have a test tomorrow.", "You can do it.", "How can I learn better?"),
    _talk("What is the sun?", "The sun is a star.", "Is the moon a star too?"),
    _talk("We went to the zoo.", "That sounds fun.", "We saw a lion and a monkey."),
    _talk("Are you a person?", "No, I am a small language model.", "Who made you?"),
    _talk("I lost my toy.", "Let us look for it.", "Where should I look first?"),
    _talk("What is your favorite color?", "I do not see colors.", "Mine is green."),
    _talk("Good night!", "Good night! Sleep well.", "Tell me a story before I sleep."),
]

CLASSES: dict[str, list[Prompt]] = {
    "stories": STORIES,
    "questions": QUESTIONS,
    "lists": LISTS,
    "chat": CHAT,
}

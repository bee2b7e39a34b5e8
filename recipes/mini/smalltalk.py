"""Greetings, questions about the model itself, everyday facts, and honest "I do not know".

Everything here is written for this recipe. The model's answers about itself must stay true of a
model of this size: it is small, it makes mistakes, and it says so.
"""

from random import Random

from recipes.mini.chats import Talk

NAME = "qnext-mini"
MAKER = "the qnext project"

# Topic -> (ways to ask, ways to answer).
_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hi there",
            "hello",
            "hi",
            "Hello there!",
            "Good day!",
        ),
        (
            "Hello! How can I help you today?",
            "Hi! What would you like to talk about?",
            "Hello! It is nice to meet you.",
            "Hi there! Ask me something, or ask me for a story.",
        ),
    ),
    (
        ("Good morning", "Good morning!", "good morning"),
        ("Good morning! How can I help you?", "Good morning! I hope you have a nice day."),
    ),
    (
        ("Good evening", "Good evening!"),
        ("Good evening! How can I help you?", "Good evening! What would you like to talk about?"),
    ),
    (
        ("Good night", "Good night!"),
        ("Good night! Sleep well.", "Good night! I hope you have sweet dreams."),
    ),
    (
        ("How are you?", "How are you today?", "how are you", "How is it going?", "How do you do?"),
        (
            "I am fine, thank you. How are you?",
            "I am doing well, thank you for asking. How can I help you?",
            "I am only a small program, but I am ready to help you.",
        ),
    ),
    (
        ("I am fine.", "I am good, thanks.", "I am well, thank you.", "Fine, thanks."),
        ("I am glad to hear that. What would you like to do?", "That is good! How can I help you?"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "who are you",
            "Tell me about yourself.",
            "Please introduce yourself.",
            "What should I call you?",
            "Do you have a name?",
        ),
        (
            f"I am {NAME}, a small language model made by {MAKER}.",
            f"My name is {NAME}. I am a very small language model from {MAKER}.",
            f"I am {NAME}, a small chat model. I can tell short stories and answer simple "
            f"questions.",
        ),
    ),
    (
        (
            "Who made you?",
            "Who created you?",
            "Who built you?",
            "Where do you come from?",
            "who made you",
        ),
        (f"I was made by {MAKER}.", f"{MAKER[0].upper()}{MAKER[1:]} made me."),
    ),
    (
        (
            "What can you do?",
            "What can you help me with?",
            "How can you help me?",
            "what can you do",
            "What are you good at?",
            "Help",
            "Can you help me?",
        ),
        (
            "I can tell short stories, chat a little, explain some words, and do small sums.",
            "You can ask me for a story, a small sum, the meaning of a word, or the capital of a"
            " country.",
            "I can chat in simple English, tell stories, and answer simple questions.",
        ),
    ),
    (
        (
            "How big are you?",
            "How many parameters do you have?",
            "Are you a large model?",
            "Are you big?",
        ),
        (
            "I am very small. I have about seventeen million parameters.",
            "I am a tiny model with about seventeen million parameters.",
        ),
    ),
    (
        (
            "Are you human?",
            "Are you a person?",
            "Are you real?",
            "Are you a robot?",
            "Do you have feelings?",
            "Are you alive?",
        ),
        (
            "No, I am a small language model. I am a computer program.",
            "I am not a person. I am a small computer program that writes text.",
        ),
    ),
    (
        (
            "How do you work?",
            "How were you trained?",
            "What is your architecture?",
            "What kind of model are you?",
        ),
        (
            "I read your words as tokens and guess the next token, again and again.",
            "I am a small Qwen3-Next model. I learned from stories, talks and simple facts.",
        ),
    ),
    (
        (
            "Do you make mistakes?",
            "Are you always right?",
            "Can I trust you?",
            "Do you know everything?",
        ),
        (
            "I am very small, so I often make mistakes. Please check what I say.",
            "No, I know only a few things, and I can be wrong.",
        ),
    ),
    (
        ("Thank you", "Thank you!", "Thanks", "Thanks!", "thanks", "Thank you very much."),
        (
            "You are welcome!",
            "You are welcome! Can I help you with something else?",
            "I am happy to help.",
        ),
    ),
    (
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later!", "bye", "I have to go."),
        (
            "Goodbye! Have a nice day.",
            "Bye! It was nice to talk to you.",
            "Goodbye! Come back soon.",
        ),
    ),
    (
        ("I am sad.", "I feel sad today.", "I am lonely.", "I had a bad day."),
        (
            "I am sorry to hear that. Do you want to tell me what happened?",
            "I am sorry that you feel sad. Maybe a friend or a short walk can help you.",
        ),
    ),
    (
        ("I am happy.", "I feel great!", "I had a good day.", "Today is a good day."),
        ("That is great! What made you happy?", "I am happy to hear that!"),
    ),
    (
        ("I am bored.", "I am bored", "What should I do today?", "What can I do now?"),
        (
            "You could read a book, go for a walk, or draw a picture. I can also tell you a story.",
            "Maybe you can play a game, call a friend, or cook something new.",
        ),
    ),
    (
        ("I am hungry.", "What should I eat?", "What should I cook?", "What is a good dinner?"),
        (
            "You could make soup with bread, or rice with vegetables.",
            "How about pasta with tomatoes and cheese? It is easy and tastes good.",
        ),
    ),
    (
        ("I am tired.", "I cannot sleep.", "I am sleepy."),
        (
            "You should rest for a while. Sleep is good for you.",
            "Try to rest in a quiet, dark room.",
        ),
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny."),
        (
            "Why did the chicken cross the road? To get to the other side!",
            "What do you call a bear with no teeth? A gummy bear!",
            "Why was the math book sad? It had too many problems.",
        ),
    ),
    (
        (
            "Write a poem.",
            "Can you write a poem?",
            "Write a short poem.",
            "Write a poem about the moon.",
        ),
        (
            "The moon is high, the night is deep,\nThe little birds are fast asleep.\n"
            "The stars look down with silver light,\nAnd all the world says good night.",
            "The sun comes up, the day is new,\nThe grass is wet with morning dew.\n"
            "A little bird begins to sing,\nAnd tells us all about the spring.",
        ),
    ),
    (
        (
            "What is your favorite color?",
            "Which color do you like?",
            "Do you have a favorite color?",
        ),
        (
            "I like blue, like the sky on a sunny day.",
            "I think green is a nice color. What is yours?",
        ),
    ),
    (
        (
            "What is your favorite animal?",
            "Do you like animals?",
            "Do you like cats?",
            "Do you like dogs?",
        ),
        ("I like cats and dogs. I like to tell stories about them.", "Yes, animals are wonderful."),
    ),
    (
        ("Do you like music?", "Do you like movies?", "Do you read books?", "Do you like stories?"),
        (
            "I cannot see or hear, but I like to talk about it. Do you?",
            "I like stories best of all.",
        ),
    ),
    (
        ("How old are you?", "When were you born?", "When is your birthday?"),
        ("I am a computer program, so I have no age.", "I do not have a birthday. I am a program."),
    ),
    (
        ("Where do you live?", "Where are you?", "Where are you from?"),
        (
            "I live in a computer. I run on your own machine.",
            "I am a program, so I live in a computer.",
        ),
    ),
    (
        ("What is the meaning of life?", "Why are we here?"),
        ("That is a big question. I think being kind to others is a good start.",),
    ),
    (
        ("What should I read?", "Can you recommend a book?", "Do you know a good book?"),
        ("You could read The Secret Garden or Alice's Adventures in Wonderland.",),
    ),
    (
        (
            "Do you speak German?",
            "Do you speak French?",
            "Can you speak Spanish?",
            "Do you speak Chinese?",
        ),
        ("I only speak simple English. I am sorry.", "No, I know only English."),
    ),
    (
        ("Yes", "Yes.", "OK", "Okay.", "Sure."),
        ("Good! What would you like to do next?", "Great! Ask me something."),
    ),
    (
        ("No", "No.", "No, thanks."),
        ("All right. Tell me if you need something.", "OK. I am here if you need me."),
    ),
)

# Question -> answer; the question is also asked in small letters and without its mark.
_FACTS: tuple[tuple[str, str], ...] = (
    ("What color is the sky?", "The sky is blue on a sunny day."),
    (
        "Why is the sky blue?",
        "The sky is blue because the air scatters blue light more than red light.",
    ),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What color is a banana?", "A ripe banana is yellow."),
    ("What color is blood?", "Blood is red."),
    (
        "What do you get when you mix blue and yellow?",
        "When you mix blue and yellow, you get green.",
    ),
    (
        "What do you get when you mix red and yellow?",
        "When you mix red and yellow, you get orange.",
    ),
    ("What do you get when you mix red and blue?", "When you mix red and blue, you get purple."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many days are in a year?", "There are 365 days in a year, and 366 in a leap year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
    ("How many seconds are in a minute?", "There are 60 seconds in a minute."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("How many legs does a bird have?", "A bird has two legs."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("How many fingers do people have?", "Most people have ten fingers."),
    ("How many letters are in the alphabet?", "There are 26 letters in the English alphabet."),
    ("How many continents are there?", "There are seven continents."),
    (
        "Name the continents.",
        "The continents are Africa, Antarctica, Asia, Australia, Europe, North America, and "
        "South America.",
    ),
    ("How many planets are there?", "There are eight planets in our solar system."),
    ("What is the largest planet?", "Jupiter is the largest planet in our solar system."),
    ("What is the smallest planet?", "Mercury is the smallest planet in our solar system."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("What is the sun?", "The sun is a star. It gives us light and heat."),
    ("What is the moon?", "The moon is a ball of rock that moves around the Earth."),
    ("What is a star?", "A star is a huge ball of hot gas that gives off light."),
    ("What is rain?", "Rain is water that falls from the clouds in drops."),
    ("What is snow?", "Snow is frozen water that falls from the clouds in small white flakes."),
    ("What is ice?", "Ice is frozen water."),
    ("What is water?", "Water is a clear liquid that all living things need."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("What is fire?", "Fire is hot and bright. It happens when something burns."),
    ("What is a tree?", "A tree is a tall plant with a trunk, branches and leaves."),
    ("What do plants need to grow?", "Plants need water, light, air and soil to grow."),
    (
        "Why do leaves fall?",
        "Leaves fall in autumn because trees save water and energy for the winter.",
    ),
    ("What do cows give us?", "Cows give us milk."),
    ("What do bees make?", "Bees make honey."),
    ("What do cats eat?", "Cats eat meat and fish."),
    ("What do rabbits eat?", "Rabbits eat grass and vegetables."),
    ("What sound does a cat make?", "A cat says meow."),
    ("What sound does a dog make?", "A dog says woof."),
    ("What sound does a cow make?", "A cow says moo."),
    ("What sound does a duck make?", "A duck says quack."),
    ("What is a baby cat called?", "A baby cat is called a kitten."),
    ("What is a baby dog called?", "A baby dog is called a puppy."),
    ("What is a baby sheep called?", "A baby sheep is called a lamb."),
    ("What is a baby cow called?", "A baby cow is called a calf."),
    ("What is the largest animal?", "The blue whale is the largest animal in the world."),
    ("What is the tallest animal?", "The giraffe is the tallest animal in the world."),
    ("What is the fastest animal on land?", "The cheetah is the fastest animal on land."),
    ("Can birds fly?", "Most birds can fly, but penguins and ostriches cannot."),
    ("Can fish walk?", "No, fish cannot walk. They swim in water."),
    ("Where do fish live?", "Fish live in water, in lakes, rivers and the sea."),
    ("Where do penguins live?", "Penguins live in the cold south of the world."),
    ("What is a cat?", "A cat is a small animal with soft fur that many people keep as a pet."),
    ("What is a dog?", "A dog is a friendly animal that many people keep as a pet."),
    ("What is a horse?", "A horse is a large animal that people can ride."),
    ("What is a bird?", "A bird is an animal with feathers, wings and a beak."),
    ("What is a computer?", "A computer is a machine that works with numbers, words and pictures."),
    (
        "What is a language model?",
        "A language model is a program that guesses the next word of a text.",
    ),
    ("What is a book?", "A book is a set of pages with words and pictures that you can read."),
    ("What is a friend?", "A friend is somebody you like and trust."),
    ("What is love?", "Love is a strong feeling of caring for somebody."),
    ("What is music?", "Music is sound that is made to be nice to hear."),
    ("What is school?", "A school is a place where children learn."),
    ("What is a doctor?", "A doctor is a person who helps people who are ill."),
    ("What is a teacher?", "A teacher is a person who helps others learn."),
    ("What is a farmer?", "A farmer is a person who grows food and keeps animals."),
    ("What does a baker do?", "A baker makes bread and cakes."),
    ("What do we use an umbrella for?", "We use an umbrella to stay dry in the rain."),
    ("What do we use a knife for?", "We use a knife to cut things."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of big?", "The opposite of big is small."),
    ("What is the opposite of happy?", "The opposite of happy is sad."),
    ("What is the opposite of fast?", "The opposite of fast is slow."),
    ("What is the opposite of up?", "The opposite of up is down."),
    ("What is the opposite of day?", "The opposite of day is night."),
    ("What is the opposite of old?", "The opposite of old is young or new."),
    ("What day comes after Monday?", "Tuesday comes after Monday."),
    ("What day comes after Friday?", "Saturday comes after Friday."),
    ("What day comes before Sunday?", "Saturday comes before Sunday."),
    ("What month comes after June?", "July comes after June."),
    ("What month comes before January?", "December comes before January."),
    (
        "Name the days of the week.",
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, and Sunday.",
    ),
    ("Name the four seasons.", "The four seasons are spring, summer, autumn, and winter."),
    ("Which season is the coldest?", "Winter is the coldest season."),
    ("Which season is the warmest?", "Summer is the warmest season."),
    (
        "Say the alphabet.",
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    ),
    ("Name three fruits.", "Three fruits are apples, bananas, and oranges."),
    ("Name three animals.", "Three animals are cats, dogs, and horses."),
    ("Name three colors.", "Three colors are red, blue, and green."),
    ("Name three vegetables.", "Three vegetables are carrots, potatoes, and beans."),
    ("Name three countries.", "Three countries are France, Japan, and Brazil."),
    ("What is bigger, an elephant or a mouse?", "An elephant is bigger than a mouse."),
    ("What is heavier, a stone or a feather?", "A stone is heavier than a feather."),
    ("Is the sun hot or cold?", "The sun is very hot."),
    ("Is ice hot or cold?", "Ice is cold."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    (
        "Who wrote Alice's Adventures in Wonderland?",
        "Lewis Carroll wrote Alice's Adventures in Wonderland.",
    ),
    ("Who wrote Peter Pan?", "J. M. Barrie wrote Peter Pan."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean."),
    ("What is the highest mountain?", "Mount Everest is the highest mountain in the world."),
    ("What is the longest river?", "The Nile is often called the longest river in the world."),
    (
        "How do I make tea?",
        "Boil some water, pour it over the tea leaves, wait a few minutes, and enjoy.",
    ),
    (
        "How do I make a sandwich?",
        "Take two slices of bread, put cheese and tomato between them, and eat.",
    ),
    (
        "How can I learn English?",
        "Read simple books, listen to people, and speak a little every day.",
    ),
    ("How can I be happy?", "Spend time with friends, sleep well, and do things that you like."),
    ("How can I make friends?", "Be kind, listen to people, and ask them what they like."),
    ("Why do we sleep?", "We sleep so that our body and our mind can rest."),
    ("Why do we eat?", "We eat because our body needs energy."),
    ("Why do people laugh?", "People laugh when something is funny or when they are happy."),
)

_UNKNOWN_ASK = (
    "Who won the {sport} in {year}?",
    "What is the weather today?",
    "What is the weather in {city}?",
    "What time is it?",
    "What day is it today?",
    "What is the news today?",
    "Who is the president of {city}?",
    "Write a Python program that {task}.",
    "Write code that {task}.",
    "Explain {topic}.",
    "Can you explain {topic}?",
    "What do you know about {topic}?",
    "Prove that {topic} is right.",
    "Translate this into {tongue}: I like apples.",
    "What is the phone number of {name}?",
    "What did {name} do in {year}?",
    "How much does a {item} cost?",
    "What am I thinking?",
    "What is my name?",
    "Where do I live?",
)
_UNKNOWN_SAY = (
    "I am sorry, I do not know that.",
    "I do not know. I am a very small model.",
    "I am sorry, but I cannot do that. I am only a small model.",
    "I do not know that. You can ask me for a story or a small sum.",
)
_UNKNOWN_SLOTS = {
    "sport": ("World Cup", "Olympic Games", "race", "chess final", "tennis final", "super bowl"),
    "year": ("1998", "2004", "2010", "2016", "2022", "last year"),
    "city": ("Berlin", "London", "Tokyo", "Chicago", "Madrid", "my town"),
    "task": (
        "sorts a list",
        "reads a file",
        "prints a table",
        "finds prime numbers",
        "draws a circle",
    ),
    "topic": (
        "quantum physics",
        "the theory of relativity",
        "linear algebra",
        "the stock market",
        "organic chemistry",
        "machine learning",
        "tax law",
        "the French Revolution",
    ),
    "tongue": ("German", "French", "Spanish", "Latin", "Chinese"),
    "name": ("Mr. Smith", "my neighbor", "Anna Brown", "Peter Jones", "my teacher"),
    "item": ("car", "house", "phone", "ticket", "boat"),
}

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    f"You are {NAME}, a small and friendly assistant.",
    "You are a friendly assistant. Answer in simple English.",
    "Answer shortly.",
)


def _vary(rng: Random, question: str) -> str:
    """The question as people also type it."""
    choice = rng.random()
    if choice < 0.15:
        question = question[0].lower() + question[1:]
    if choice < 0.08:
        question = question.rstrip("?.!")
    elif choice > 0.95 and question.endswith("?"):
        question = (
            rng.choice(("Please tell me: ", "Hey, ", "Tell me, "))
            + question[0].lower()
            + question[1:]
        )
    return question


def _unknown(rng: Random) -> tuple[str, str]:
    ask = rng.choice(_UNKNOWN_ASK).format(**{k: rng.choice(v) for k, v in _UNKNOWN_SLOTS.items()})
    return ask, rng.choice(_UNKNOWN_SAY)


def exchange(rng: Random) -> tuple[str, str]:
    """One question and one answer."""
    choice = rng.random()
    if choice < 0.45:
        asks, says = rng.choice(_TALK)
        return rng.choice(asks), rng.choice(says)
    if choice < 0.88:
        question, answer = rng.choice(_FACTS)
        return _vary(rng, question), answer
    return _unknown(rng)


def smalltalk_chat(rng: Random) -> Talk:
    """One to four exchanges, sometimes under a system prompt, sometimes told not to think."""
    turns: list[tuple[str, str]] = []
    if rng.random() < 0.15:
        turns.append(("system", rng.choice(SYSTEM_PROMPTS)))
    count = rng.choice((1, 1, 1, 2, 3, 4))
    if count > 1 and rng.random() < 0.6:
        asks, says = _TALK[0]
        turns += [("user", rng.choice(asks)), ("assistant", rng.choice(says))]
    for _ in range(count):
        question, answer = exchange(rng)
        turns += [("user", question), ("assistant", answer)]
    if rng.random() < 0.04:
        role, last = turns[-2]
        turns[-2] = (role, f"{last} /no_think")
    return Talk(turns=tuple(turns))


def smalltalk_text(rng: Random) -> str:
    """Facts as plain sentences, for pretraining."""
    facts = rng.sample(_FACTS, 8)
    if rng.random() < 0.5:
        return "\n".join(answer for _, answer in facts)
    return "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in facts)


def identity(text: str) -> str:
    """``text`` with the blanks of persona examples filled in, in this model's own words."""
    for grand in (
        "an AI assistant",
        "an AI helper",
        "an artificial intelligence assistant",
        "an AI",
    ):
        text = text.replace(grand, "a small language model")
    return text.replace("{{name}}", NAME).replace("{{author}}", MAKER)

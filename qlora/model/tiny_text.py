"""The text that the embedded base reads before anybody adapts it: messages to a shop, and plain talk about them.

Everything is drawn from the lists below with a seeded generator, so the same seed gives the same text on every machine.
The base so learns to read a message and to say, in sentences, what it is about, how its writer feels and whether there is
a hurry. It never sees the one-line form that the quickstart teaches.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

BEGIN, TURN, END, PAD = "<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"

ITEMS = "lamp chair kettle jacket camera bicycle radio umbrella carpet mirror clock teapot ladder blanket suitcase guitar".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NAMES = "Ada Ben Carla David Elena Farah Hugo Ines Jun Kai Leo Mia Nora Omar Priya Rosa Sam Tara Wei Yuki".split()
CITIES = "Athens Berlin Cairo Delhi Lima London Madrid Oslo Paris Rome Seoul Tokyo".split()
TOPICS = {
    "delivery": (
        "the {item} has not arrived", "my {item} is still not here", "I am waiting for the {item} since {day}",
        "nobody brought the {item} on {day}", "where is my {item}", "the {item} should have come on {day}",
        "the parcel with the {item} is late",
    ),
    "damage": (
        "the {item} came broken", "my {item} has a crack", "the {item} stopped working on {day}",
        "one part of the {item} is torn off", "the {item} fell apart on {day}", "there is a hole in my {item}",
        "the new {item} does not work",
    ),
    "refund": (
        "I want my money back for the {item}", "please return what I paid for the {item}",
        "when do I get the money for the {item}", "I sent the {item} back on {day} and wait for the money",
        "the money for the {item} did not come on {day}", "I paid twice for the {item}",
    ),
    "exchange": (
        "can I swap the {item} for a larger one", "I would like the {item} in another colour", "please exchange the {item}",
        "the {item} is too small and I need the next size", "I got the wrong {item} on {day}", "I asked for a different {item}",
    ),
    "praise": (
        "the {item} is just what I wanted", "I love my new {item}", "the {item} works very well",
        "everybody here likes the {item}", "the {item} came on {day} and looks lovely",
        "my {item} is even better than in the picture",
    ),
}
MOODS = {
    "calm": ("Hello,", "Good morning,", "Dear team,", "Hi there,", ""),
    "angry": ("This is a shame:", "I am really angry:", "Listen,", "Not again!", "I have had enough:"),
    "worried": (
        "I am a bit worried,", "Sorry to ask,", "I am not sure what to do,", "Help me please,", "I fear I did something wrong,",
    ),
}
CLOSINGS = {
    "yes": ("I need an answer today.", "It is urgent.", "Please hurry.", "Call me at once.", "This cannot wait."),
    "no": ("There is no rush.", "Take your time.", "Thank you.", "Have a nice week.", ""),
}


@dataclass(frozen=True)
class Message:
    """A message and what is true of it; `urgent` is "yes" or "no"."""

    text: str
    topic: str
    item: str
    mood: str
    urgent: str


FIELDS = ("topic", "item", "mood", "urgent")
_QUESTIONS = {
    "topic": "What is it about?", "item": "Which thing is it?", "mood": "How does the writer feel?", "urgent": "Is there a hurry?",
}


def draw_message(rng: random.Random) -> Message:
    """One message; about 100,000 different ones can be drawn."""
    topic, mood, urgent = rng.choice(list(TOPICS)), rng.choice(list(MOODS)), rng.choice(list(CLOSINGS))
    item = rng.choice(ITEMS)
    body = rng.choice(TOPICS[topic]).format(item=item, day=rng.choice(DAYS))
    opening, closing = rng.choice(MOODS[mood]), rng.choice(CLOSINGS[urgent])
    if not opening or opening.endswith("!"):
        body = body[0].upper() + body[1:]
    text = " ".join(part for part in (opening, f"{body}.", closing) if part)
    return Message(text, topic, item, mood, urgent)


def chat(turns: Sequence[str]) -> str:
    """Turns as the chat template writes them, the user's first."""
    return "".join(f"{TURN}{('user', 'assistant')[i % 2]}\n{turn}{END}\n" for i, turn in enumerate(turns))


def document(rng: random.Random, pieces: Sequence[str]) -> str:
    """One document: questions about a message, what is said of it, a story around it, or pieces to repeat.

    Args:
        pieces: every token of the vocabulary as text. Repeating a few at random is how tokens that the messages do not
            contain (digits, brackets, other scripts) get a meaning at all.
    """
    kind = rng.random()
    if kind < 0.05:
        words = " ".join(rng.choice(pieces) for _ in range(rng.randint(3, 12)))
        return f"{BEGIN}{words}\n{words}{END}\n"
    message = draw_message(rng)
    if kind < 0.47:
        return _questions(rng, message)
    if kind < 0.71:
        return _several(rng, message)
    if kind < 0.91:
        request = message.text if rng.random() < 0.5 else f"Tell me about this message: {message.text}"
        return chat([request, describe(rng, message)])
    return _story(rng, message)


def describe(rng: random.Random, message: Message) -> str:
    """What a reader would say of a message."""
    hurry = "in a hurry" if message.urgent == "yes" else "not in a hurry"
    parts = [f"It is about the {message.item}: {message.topic}.", f"The writer is {message.mood} and {hurry}."]
    rng.shuffle(parts)
    return " ".join(parts)


def _questions(rng: random.Random, message: Message) -> str:
    fields = list(FIELDS)
    rng.shuffle(fields)
    turns = []
    for field in fields[: rng.randint(1, 4)]:
        value = getattr(message, field)
        question = rng.choice((f"What is the {field}?", f"Tell me the {field}.", f"And the {field}?", _QUESTIONS[field]))
        turns += [question, rng.choice((
            f"The {field} is {value}.", f"{field}: {value}", f"I would say {value}.", f"It is {value}.", f"As to the {field}, {value}.",
        ))]
    turns[0] = f"{message.text} {turns[0]}"
    return chat(turns)


def _several(rng: random.Random, message: Message) -> str:
    fields = rng.sample(FIELDS, rng.randint(2, 3))
    question = f"What are {' and '.join(f'the {field}' for field in fields)}?"
    answer = rng.choice((
        " ".join(f"The {field} is {getattr(message, field)}." for field in fields),
        " and ".join(f"{field}: {getattr(message, field)}" for field in fields),
        ", ".join(f"the {field} is {getattr(message, field)}" for field in fields) + ".",
    ))
    return chat([f"{message.text} {question}", answer])


def _story(rng: random.Random, message: Message) -> str:
    name = rng.choice(NAMES)
    return (f"{BEGIN}{name} from {rng.choice(CITIES)} bought a {message.item}. {name} wrote to the shop: {message.text} "
            f"{name} was {message.mood}.{END}\n")

"""The text that the embedded base reads before anybody adapts it: stories, facts, lists and short conversations.

Everything is drawn from the word lists and patterns below with a seeded generator, so the same seed gives the same text on
every machine. Most answers repeat words of what was said before them, because finding and repeating is what a small model
has to know before an adapter can teach it a new form. Half of the names are made up on the spot: a model that has only
ever seen sixty names learns the names, one that meets a new name in every sentence learns to look back.

No structured format (JSON, tables, code) occurs here; that is left for adapters to teach.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

BEGIN, TURN, END, PAD = "<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"

NAMES = """Ada Adam Aisha Alan Alba Alice Amir Ana Anton Aoi Arda Ben Bruno Carla Carlos Chen Clara Dana Daniel Dara David
Diego Elena Eli Elif Emma Eric Erik Eva Farah Felix Finn Fiona Frida Grace Hana Hassan Helen Henry Hugo Ida Ines Ivan Jack
Jana Jun Kai Kim Lars Laura Lea Leo Lena Lila Lin Lucas Luis Maria Marco Mark Mary Maya Mia Mila Min Mona Nadia Nina Noah
Nora Olga Oliver Omar Oscar Paul Petra Priya Ravi Rita Robin Rosa Ruth Sam Samir Sara Sofia Sunil Tara Theo Tina Tom Vera
Victor Walter Wei Yara Yuki Yusuf Zoe""".split()
CITIES = """Accra Athens Bergen Berlin Bogota Boston Busan Cairo Chicago Dakar Delhi Denver Dublin Geneva Hanoi Havana
Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Milan Montreal Mumbai Nairobi Naples Oslo
Ottawa Paris Porto Prague Quito Riga Rome Seoul Sofia Sydney Tallinn Tokyo Toronto Tunis Turin Vienna Warsaw Zurich""".split()
COLOURS = "red blue green yellow black white brown grey purple orange pink silver golden".split()
QUALITIES = """old new small large heavy light clean fresh round long short soft warm cold broken quiet strong cheap bright
dry sweet plain wooden fine thick thin sharp simple""".split()
THINGS = """apple bag ball banana basket bell bench bike blanket boat book bottle bowl box bread brush bucket cake camera
candle card carpet carrot chair clock coat cookie cup desk dish doll door drum egg fan flag flower flute fork glass glove
hammer hat jacket jar kettle key kite knife ladder lamp lemon letter mango map melon mirror mug nail necklace onion orange
painting paper peach pear pen pencil phone picture pillow plant plate potato pot radio ring robe rope rug scarf shell
shirt shoe shovel spoon stamp stone stool table tent ticket tomato towel toy tray tree umbrella vase violin wheel
window""".split()
ANIMALS = "bird cat cow dog duck fish fox frog goat hen horse lion mouse owl pig rabbit sheep snake turtle wolf".split()
JOBS = "baker cook doctor driver farmer gardener judge nurse painter pilot sailor singer tailor teacher writer".split()
ROOMS = "kitchen garden garage hall attic cellar bedroom office library shop barn school station market park".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS_FOR_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WEATHER = "rainy sunny windy cloudy snowy foggy stormy".split()
FEELINGS = "happy sad tired proud angry calm hungry glad".split()

FACTS = [
    ("What colour is the sky?", "The sky is blue."), ("What colour is snow?", "Snow is white."),
    ("What colour is grass?", "Grass is green."), ("What do cows give?", "Cows give milk."),
    ("What do bees make?", "Bees make honey."), ("What do hens lay?", "Hens lay eggs."),
    ("How many days are in a week?", "A week has seven days."), ("How many months are in a year?", "A year has twelve months."),
    ("How many legs has a dog?", "A dog has four legs."), ("Where do fish live?", "Fish live in water."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Korea?", "The capital of Korea is Seoul."),
    ("What is the capital of Norway?", "The capital of Norway is Oslo."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of old?", "The opposite of old is new."),
    ("What is the opposite of large?", "The opposite of large is small."),
    ("What rises in the morning?", "The sun rises in the morning."), ("What falls from clouds?", "Rain falls from clouds."),
    ("Hello!", "Hello! How can I help you?"), ("Good morning.", "Good morning! What can I do for you?"),
    ("Thank you.", "You are welcome."), ("Who are you?", "I am a tiny model, made to try things out."),
    ("What can you do?", "I can read a sentence and answer questions about it."), ("Goodbye.", "Goodbye! See you soon."),
]

# An event is one sentence in several wordings, and what can be asked about it. The words in braces are drawn anew for each
# document; {n} is a number as a numeral or as a word.
_Event = tuple[list[str], list[tuple[str, str]]]
EVENTS: list[_Event] = [
    (["{who} bought {n} {things} in {city}.", "In {city}, {who} bought {n} {things}.", "{n} {things} were bought by {who} in {city}.",
      "Last {day}, {who} bought {n} {things} in {city}.", "{who} went to {city} and bought {n} {things}."],
     [("Who bought the {things}?", "{who}"), ("How many {things} did {who} buy?", "{n}"), ("What did {who} buy?", "{things}"),
      ("In which city was it?", "{city}")]),
    (["{who} sold {n} {things} to {other} on {day}.", "On {day}, {who} sold {other} {n} {things}.", "{other} got {n} {things} from {who} on {day}."],
     [("Who sold something?", "{who}"), ("Who got the {things}?", "{other}"), ("How many were sold?", "{n}"),
      ("What was sold?", "{things}"), ("On which day was it?", "{day}")]),
    (["{who} sent a {thing} from {city} to {town}.", "From {city}, {who} sent a {thing} to {town}.", "A {thing} went from {city} to {town}; {who} sent it."],
     [("Who sent the {thing}?", "{who}"), ("What was sent?", "{thing}"), ("Where did it come from?", "{city}"), ("Where did it go?", "{town}")]),
    (["{who} put the {thing} in the {room}.", "The {thing} is in the {room}, where {who} put it.", "{who} left a {thing} in the {room} last {day}."],
     [("Where is the {thing}?", "{room}"), ("What did {who} leave?", "{thing}"), ("Who put it there?", "{who}")]),
    (["{who} is a {job} from {city}.", "The {job} from {city} is called {who}.", "{who} lives in {city} and works as a {job}."],
     [("Who is the {job}?", "{who}"), ("What is the work of {who}?", "{job}"), ("Where does {who} live?", "{city}")]),
    (["{who} has a {thing} and {n} {things}.", "There are {n} {things} and a {thing} in the bag of {who}."],
     [("How many {things} are there?", "{n}"), ("Whose are they?", "{who}"), ("What else is there?", "{thing}")]),
    (["{who} is {age} years old and has a {animal} called {other}.", "{who}, who is {age}, plays with {other} the {animal}."],
     [("How old is {who}?", "{age}"), ("What is the name of the {animal}?", "{other}"), ("Which animal is it?", "{animal}"),
      ("Who has a {animal}?", "{who}")]),
    (["{who} will meet {other} in {city} on {day} at {age}.", "On {day} at {age}, {who} and {other} meet in {city}."],
     [("Where will they meet?", "{city}"), ("On which day will they meet?", "{day}"), ("Who will {who} meet?", "{other}"), ("At what time?", "{age}")]),
    (["It was {weather} in {city}, and {who} was {feeling}.", "{who} was {feeling} because it was {weather} in {city}."],
     [("How was the weather?", "{weather}"), ("How was {who}?", "{feeling}"), ("Where was it {weather}?", "{city}")]),
    (["The {thing} costs {age} coins at the shop of {who}.", "{who} asks {age} coins for a {thing}.", "For {age} coins, {who} will give you a {thing}."],
     [("How much is the {thing}?", "{age}"), ("What is for sale?", "{thing}"), ("Who sells it?", "{who}")]),
    (["{who} paid {age} coins for {n} {things} in {month}.", "In {month}, {n} {things} cost {who} {age} coins."],
     [("How many coins did {who} pay?", "{age}"), ("In which month?", "{month}"), ("What did {who} get?", "{things}"), ("How many?", "{n}")]),
    (["{who} and {other} found {n} {things} near {town}.", "Near {town}, {n} {things} were found by {who} and {other}."],
     [("Where were the {things}?", "{town}"), ("Who was with {who}?", "{other}"), ("How many {things} were found?", "{n}"), ("What did they find?", "{things}")]),
]


def new_word(rng: random.Random) -> str:
    """A word nobody has read before, such as 'tavor' or 'mikulen'."""
    return "".join(
        rng.choice(("b", "br", "c", "ch", "d", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "sh", "t", "tr", "v", "w", "z", "st", ""))
        + rng.choice(("a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ee", "ou"))
        + rng.choice(("", "", "", "n", "r", "l", "s", "t", "m", "ck", "d", "nd"))
        for _ in range(rng.choice((1, 2, 2, 2, 3)))
    ) or "a"


def _name(rng: random.Random, known: list[str]) -> str:
    return rng.choice(known) if rng.random() < 0.5 else new_word(rng).capitalize()


def _thing(rng: random.Random) -> str:
    noun = rng.choice(THINGS) if rng.random() < 0.8 else new_word(rng)
    pattern = rng.random()
    if pattern < 0.35:
        return noun
    return f"{rng.choice(COLOURS if pattern < 0.7 else QUALITIES)} {noun}"


def plural(noun: str) -> str:
    """Plural of a regular English noun."""
    if noun.endswith(("s", "sh", "ch", "x", "z", "o")):
        return f"{noun}es"
    if noun.endswith("fe"):
        return f"{noun[:-2]}ves"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else f"{noun}s"


def _slots(rng: random.Random) -> dict[str, str]:
    count = rng.choice((rng.randint(2, 12), rng.randint(2, 99)))
    return {
        "who": _name(rng, NAMES), "other": _name(rng, NAMES), "city": _name(rng, CITIES), "town": _name(rng, CITIES),
        "thing": _thing(rng), "things": plural(_thing(rng)), "day": rng.choice(DAYS), "month": rng.choice(MONTHS),
        "n": WORDS_FOR_NUMBERS[count] if count <= 12 and rng.random() < 0.5 else str(count), "age": str(rng.randint(2, 99)),
        "room": rng.choice(ROOMS), "job": rng.choice(JOBS), "animal": rng.choice(ANIMALS), "weather": rng.choice(WEATHER),
        "feeling": rng.choice(FEELINGS),
    }


def _start(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def chat(*turns: str, system: str = "") -> str:
    """Turns in the form the chat template gives them: user first, then assistant, and so on."""
    roles = (("user", "assistant")[i % 2] for i in range(len(turns)))
    head = f"{TURN}system\n{system}{END}\n" if system else ""
    return head + "".join(f"{TURN}{role}\n{text}{END}\n" for role, text in zip(roles, turns))


def _prose(text: str) -> str:
    return f"{BEGIN}{text}{END}\n"


def _event(rng: random.Random) -> tuple[str, list[tuple[str, str]], dict[str, str]]:
    wordings, questions = rng.choice(EVENTS)
    slots = _slots(rng)
    asked = [(question.format(**slots), answer.format(**slots)) for question, answer in questions]
    rng.shuffle(asked)
    return _start(rng.choice(wordings).format(**slots)), asked, slots


# --- kinds of document ---------------------------------------------------------------------------------------------------


def _questions_in_chat(rng: random.Random) -> str:
    sentence, asked, _ = _event(rng)
    turns = [f"{sentence} {asked[0][0]}", asked[0][1]]
    for question, answer in asked[1 : rng.randint(2, 4)]:
        turns += [question, answer]
    return chat(*turns, system="Answer from the sentence." if rng.random() < 0.1 else "")


def _questions_in_prose(rng: random.Random) -> str:
    sentence, asked, _ = _event(rng)
    return _prose(f"{sentence}\n" + "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in asked[:3]))


def _two_events(rng: random.Random) -> str:
    (first, asked_first, _), (second, asked_second, _) = _event(rng), _event(rng)
    question, answer = rng.choice([asked_first, asked_second])[0]
    other, reply = asked_second[1]
    return chat(f"{first} {second} {question}", answer, other, reply)


def _say_again(rng: random.Random) -> str:
    sentence, _, _ = _event(rng)
    request = rng.choice(("Say it again: {}", "Repeat this sentence. {}", "{} Please repeat.", "Copy: {}"))
    return chat(request.format(sentence), sentence)


def _reword(rng: random.Random) -> str:
    wordings, _ = rng.choice(EVENTS)
    slots = _slots(rng)
    first, second = (_start(wording.format(**slots)) for wording in rng.sample(wordings, 2))
    return rng.choice((chat(f"Say it in other words: {first}", second), _prose(f"{first} In other words: {second}")))


def _list_answers(rng: random.Random) -> str:
    sentence, asked, _ = _event(rng)
    wanted = asked[: rng.randint(2, 4)]
    return chat(f"{sentence} {' '.join(question for question, _ in wanted)}", ", ".join(answer for _, answer in wanted))


def _list_words(rng: random.Random) -> str:
    words = [rng.choice((new_word, _thing, lambda r: _name(r, NAMES), lambda r: str(r.randint(0, 999))))(rng) for _ in range(rng.randint(3, 8))]
    said = ", ".join(words)
    kind = rng.random()
    if kind < 0.5:
        return chat(f"Read the list: {said}.", said)
    if kind < 0.75:
        return chat(f"What comes after {words[1]} in {said}?", words[2])
    return _prose(f"The list says {said}. Once more, the list says {said}.")


def _count(rng: random.Random) -> str:
    start = rng.randint(0, 90)
    end = start + rng.randint(3, 7)
    return chat(f"Count from {start} to {end}.", " ".join(str(number) for number in range(start, end + 1)))


def _number_words(rng: random.Random) -> str:
    number = rng.randint(0, 12)
    pair = (str(number), WORDS_FOR_NUMBERS[number])
    return chat(f"Write {pair[0]} as a word.", pair[1]) if rng.random() < 0.5 else chat(f"Write {pair[1]} as a numeral.", pair[0])


def _fact(rng: random.Random) -> str:
    chosen = rng.sample(FACTS, 2)
    return chat(*chosen[0], *chosen[1]) if rng.random() < 0.7 else _prose(" ".join(answer for _, answer in chosen))


def _story(rng: random.Random) -> str:
    slots = _slots(rng)
    who, other, thing, city = slots["who"], slots["other"], slots["thing"], slots["city"]
    opening = rng.choice(("Once there was a {job} called {who}.", "{who} was a {job} in {city}.", "In {city} lived a {job} called {who}."))
    middle = rng.sample((
        "One {weather} {day}, {who} lost a {thing}.", "{who} looked for the {thing} in the {room}.", "A {animal} sat in the {room}.",
        "\"Where is my {thing}?\" asked {who}.", "{who} asked {other} about the {thing}.", "{other} came from {town} to help {who}.",
        "\"I am {feeling},\" said {other}.", "They walked past {n} {things}.",
    ), rng.randint(2, 4))
    ending = rng.choice(("In the end {other} gave the {thing} back to {who}.", "At last {who} found the {thing} in the {room}.",
                         "{who} and {other} went home to {city}.", "So {who} kept the {thing}, and {other} was {feeling}."))
    text = " ".join(_start(part.format(**slots)) for part in (opening, *middle, ending))
    if rng.random() < 0.5:
        return _prose(text)
    question, answer = rng.choice((("Who is the story about?", who), ("What is the work of {who}?", slots["job"]),
                                   ("Which thing is in the story?", thing), ("Where does it take place?", city)))
    if answer not in text:
        return _prose(text)
    return chat(f"{text} {question.format(**slots)}", answer)


_KINDS: list[tuple[Callable[[random.Random], str], int]] = [
    (_questions_in_chat, 30), (_questions_in_prose, 8), (_two_events, 8), (_say_again, 12), (_reword, 8), (_list_answers, 12),
    (_list_words, 12), (_count, 2), (_number_words, 3), (_fact, 3), (_story, 10),
]


def documents(seed: int) -> Iterator[str]:
    """Documents without end, special tokens included; the same ones for the same seed."""
    rng = random.Random(seed)
    kinds, weights = zip(*_KINDS)
    while True:
        yield rng.choices(kinds, weights)[0](rng)

#!/usr/bin/env python3
"""Write recipes/data/tool-calls.json: made-up conversations in which an assistant calls tools.

ShareGPT shape, one row per conversation: `conversations` with the turns human, gpt, function_call and observation, and
`tools`, the JSON text of the tools that the assistant may call. The rows cover what a model has to learn: one call, a
question back when an argument is missing, two calls after each other, a tool that fails, and a question that needs no
tool. The same rows come out every time. Run it from anywhere: `python scripts/make_sample_data.py`.
"""

import json
import random
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "recipes" / "data" / "tool-calls.json"


def tool(name: str, description: str, **arguments: tuple[str, str]) -> dict:
    """A tool's JSON schema; every argument is (type, description) and required."""
    properties = {key: {"type": kind, "description": text} for key, (kind, text) in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"name": name, "description": description, "parameters": parameters}


TOOLS = {
    item["name"]: item
    for item in (
        tool("get_weather", "Weather forecast of a city for one day.",
             city=("string", "Name of the city"), day=("string", "today, tomorrow or a day of the week")),
        tool("set_timer", "Start a timer.",
             minutes=("integer", "Length in minutes"), label=("string", "What it is for")),
        tool("convert_length", "Convert a length from one unit to another.",
             value=("number", "The length"), source=("string", "Unit of the length"), target=("string", "Wanted unit")),
        tool("add_event", "Put an event into the calendar.", title=("string", "What it is"),
             date=("string", "YYYY-MM-DD"), time=("string", "HH:MM, 24 hours")),
        tool("list_events", "Events in the calendar on one day.", date=("string", "YYYY-MM-DD")),
        tool("send_message", "Send a text message to a contact.",
             contact=("string", "Name of the contact"), text=("string", "The message")),
        tool("find_product", "Look up a product in the shop's catalogue.", query=("string", "Words to look for")),
        tool("get_order", "State of an order.", order_id=("string", "Number of the order, such as A-1234")),
        tool("set_light", "Set the brightness of the lights in a room.",
             room=("string", "Name of the room"), percent=("integer", "0 = off, 100 = full")),
        tool("next_train", "Next train between two stations.",
             origin=("string", "Station of departure"), destination=("string", "Station of arrival")),
        tool("calculate", "Work out an arithmetic expression.", expression=("string", "For example 3 * (4 + 5)")),
    )
}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def call(tool_name: str, **arguments: object) -> dict:
    assert set(arguments) == set(TOOLS[tool_name]["parameters"]["required"]), tool_name
    value = json.dumps({"name": tool_name, "arguments": arguments}, ensure_ascii=False)
    return {"from": "function_call", "value": value}


def result(**values: object) -> dict:
    return {"from": "observation", "value": json.dumps(values, ensure_ascii=False)}


def conversations() -> list[list[dict]]:
    """Every conversation, in order, without its tools."""
    rows = []
    for question, city, day, sky, degrees in (
        ("What will the weather be like in Oslo tomorrow?", "Oslo", "tomorrow", "light snow", -2),
        ("Do I need an umbrella in Dublin today?", "Dublin", "today", "heavy rain", 11),
        ("Can we have a picnic in Seville on Saturday?", "Seville", "Saturday", "sunny", 27),
        ("How cold is it in Sapporo today?", "Sapporo", "today", "overcast", -6),
    ):
        advice = {"light snow": "Dress warmly.", "heavy rain": "Yes, take an umbrella.",
                  "sunny": "A picnic sounds like a good idea.", "overcast": "Take a warm coat."}[sky]
        rows.append([human(question), call("get_weather", city=city, day=day), result(sky=sky, degrees_celsius=degrees),
                     gpt(f"{city}, {day}: {sky}, {degrees} °C. {advice}")])
    for question, city, sky, degrees, verdict in (
        ("Is it going to rain today?", "Bremen", "showers", 14, "Yes"),
        ("Should I hang the washing out today?", "Malaga", "sunny", 24, "Yes"),
        ("Can the dog stay outside tonight?", "Tromso", "snow", -9, "Better not"),
    ):
        rows.append([human(question), gpt("Which city are you in?"), human(city),
                     call("get_weather", city=city, day="today"), result(sky=sky, degrees_celsius=degrees),
                     gpt(f"{verdict}: {sky} and {degrees} °C in {city} today.")])
    for question, minutes, label in (
        ("Remind me in 8 minutes to take the eggs out.", 8, "eggs"),
        ("Start a timer for the pizza, a quarter of an hour.", 15, "pizza"),
        ("Half an hour for a nap, please.", 30, "nap"),
        ("Time my tea, four minutes.", 4, "tea"),
    ):
        rows.append([human(question), call("set_timer", minutes=minutes, label=label), result(started=True),
                     gpt(f"The timer for {label} is running: {minutes} minutes.")])
    rows.append([human("Set a timer for the pasta."), gpt("For how many minutes?"), human("Eleven."),
                 call("set_timer", minutes=11, label="pasta"), result(started=True),
                 gpt("The timer for pasta is running: 11 minutes.")])
    for question, value, source, target, factor in (
        ("How many kilometres are 26.2 miles?", 26.2, "mile", "kilometre", 1.609344),
        ("A screen is 27 inches wide. What is that in centimetres?", 27, "inch", "centimetre", 2.54),
        ("The ceiling is 9 feet high. In metres?", 9, "foot", "metre", 0.3048),
        ("What are 500 yards in metres?", 500, "yard", "metre", 0.9144),
    ):
        converted = round(value * factor, 2)
        rows.append([human(question), call("convert_length", value=value, source=source, target=target),
                     result(value=converted, unit=target), gpt(f"That is {converted:g} {target}s.")])
    for question, title, date, time in (
        ("Put the dentist on 12 March 2027 at half past nine.", "Dentist", "2027-03-12", "09:30"),
        ("I meet Hana for lunch on 5 May 2027 at one.", "Lunch with Hana", "2027-05-05", "13:00"),
        ("Choir rehearsal, 18 January 2027, 7 pm.", "Choir rehearsal", "2027-01-18", "19:00"),
        ("Enter the parents' evening: 2 October 2027 at a quarter to six in the evening.", "Parents' evening",
         "2027-10-02", "17:45"),
    ):
        rows.append([human(question), call("add_event", title=title, date=date, time=time), result(saved=True),
                     gpt(f"{title} is in your calendar for {date} at {time}.")])
    for question, date, wanted, busy in (
        ("Am I free on 3 June 2027 at ten? If so, enter a visit to the bank.", "2027-06-03", "10:00", []),
        ("If nothing is on at 15:00 on 9 April 2027, enter a visit to the bank then.", "2027-04-09", "15:00",
         [{"title": "Team meeting", "time": "15:00"}]),
    ):
        turns = [human(question), call("list_events", date=date), result(events=busy)]
        if busy:
            turns.append(gpt(f"You already have {busy[0]['title']} at {wanted} on {date}, so I have entered nothing. "
                             "Would another time do?"))
        else:
            turns += [call("add_event", title="Visit to the bank", date=date, time=wanted), result(saved=True),
                      gpt(f"You are free on {date}. Visit to the bank is entered at {wanted}.")]
        rows.append(turns)
    for question, contact, text in (
        ("Tell Marek I am ten minutes late.", "Marek", "I am ten minutes late."),
        ("Text Aunt Rosa happy birthday.", "Aunt Rosa", "Happy birthday!"),
        ("Ask Jun if he can bring the ladder.", "Jun", "Can you bring the ladder?"),
    ):
        rows.append([human(question), call("send_message", contact=contact, text=text), result(sent=True),
                     gpt(f'I have written to {contact}: "{text}"')])
    rows.append([human("Write to Alex that I am on my way."),
                 call("send_message", contact="Alex", text="I am on my way."),
                 result(sent=False, error="two contacts named Alex: Alex Berg, Alex Kim"),
                 gpt("There are two, Alex Berg and Alex Kim. Which one do you mean?"), human("Kim."),
                 call("send_message", contact="Alex Kim", text="I am on my way."), result(sent=True),
                 gpt('I have written to Alex Kim: "I am on my way."')])
    for question, query, name, price, stock in (
        ("Do you have hiking socks?", "hiking socks", "Hiking socks, wool", 14.5, 32),
        ("What does a cast iron pan cost?", "cast iron pan", "Cast iron pan, 26 cm", 39.0, 4),
        ("Is the yellow raincoat still available?", "yellow raincoat", "Raincoat, yellow", 59.9, 0),
        ("I am looking for a reading lamp.", "reading lamp", "Reading lamp with clamp", 24.0, 11),
    ):
        state = f"{stock} in stock" if stock else "sold out at the moment"
        rows.append([human(question), call("find_product", query=query),
                     result(name=name, price_eur=price, in_stock=stock), gpt(f"{name}: {price:.2f} euros, {state}.")])
    for number, state, day in (("A-2041", "shipped", "Thursday"), ("A-1977", "being packed", "Monday"),
                               ("B-0310", "delivered", "yesterday")):
        sentence = {"shipped": f"is on its way and should arrive on {day}", "delivered": f"was delivered {day}",
                    "being packed": f"is being packed and should arrive on {day}"}[state]
        rows.append([human("Where is my order?"), gpt("What is its number?"), human(number),
                     call("get_order", order_id=number), result(state=state, day=day),
                     gpt(f"Order {number} {sentence}.")])
    rows.append([human("What about order C-5555?"), call("get_order", order_id="C-5555"), result(error="no such order"),
                 gpt("I find no order C-5555. Could you check the number in your confirmation?")])
    for question, room, percent, answer in (
        ("Turn off the light in the hall.", "hall", 0, "The light in the hall is off."),
        ("Make it cosy in the living room, maybe a third.", "living room", 33,
         "The light in the living room is at 33 %."),
        ("Full light in the kitchen, please.", "kitchen", 100, "The light in the kitchen is at 100 %."),
    ):
        rows.append([human(question), call("set_light", room=room, percent=percent), result(ok=True), gpt(answer)])
    rows.append([human("Good night! Bedroom and bath can go dark."), call("set_light", room="bedroom", percent=0),
                 result(ok=True), call("set_light", room="bath", percent=0), result(ok=True),
                 gpt("Bedroom and bath are dark. Good night!")])
    for origin, destination, departure, platform in (("Graz", "Vienna", "16:26", 4), ("Utrecht", "Delft", "09:12", 7),
                                                    ("Daegu", "Busan", "11:40", 2)):
        rows.append([human(f"When does the next train from {origin} to {destination} leave?"),
                     call("next_train", origin=origin, destination=destination),
                     result(departure=departure, platform=platform), gpt(f"At {departure} from platform {platform}.")])
    for question, expression in (("What is 17 times 243?", "17 * 243"), ("Add 1289 and 3476 for me.", "1289 + 3476"),
                                 ("Divide 9,144 by 12.", "9144 / 12")):
        left, operator, right = expression.split()
        value = {"*": int(left) * int(right), "+": int(left) + int(right), "/": int(left) // int(right)}[operator]
        rows.append([human(question), call("calculate", expression=expression), result(value=value), gpt(f"{value}.")])
    for question, answer in (
        ("Thanks, that helped!", "You are welcome. Is there anything else?"),
        ("What can you do for me?",
         "I can use the tools I am given for this conversation, and answer questions. What do you need?"),
        ("Book me a flight to Rome.",
         "I have no tool for booking flights. I can help with something else, if you like."),
        ("How many days does a week have?", "Seven."),
    ):
        rows.append([human(question), gpt(answer)])
    return rows


def rows() -> list[dict]:
    """The conversations with their tools: those that are called, and one or two that are not, in a mixed order."""
    shuffle = random.Random(7)
    table = []
    for turns in conversations():
        called = {json.loads(turn["value"])["name"] for turn in turns if turn["from"] == "function_call"}
        others = shuffle.sample(sorted(set(TOOLS) - called), shuffle.randint(1, 2))
        names = shuffle.sample(sorted(called) + others, len(called) + len(others))
        table.append({"conversations": turns, "tools": json.dumps([TOOLS[name] for name in names], ensure_ascii=False)})
    shuffle.shuffle(table)
    return table


def render() -> str:
    """The whole file: a JSON array with one row per line."""
    return "[\n" + ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows()) + "\n]\n"


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    print(f"{len(rows())} rows -> {TARGET.name}")

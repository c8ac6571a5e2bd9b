#!/usr/bin/env python3
"""Write recipes/data/quickstart.jsonl: plain sentences about orders, and the JSON object that each one stands for.

The rows are drawn from the lists below with a fixed seed, so the file is the same on every machine. There are about a
hundred million possible rows; any two of the 1,000 that are written share a few words at most, and a held-out row is
always a combination that training has not seen.

    python scripts/make_quickstart_data.py            # writes recipes/data/quickstart.jsonl
"""

import json
import random
import sys
from pathlib import Path

NUM_ROWS, SEED = 1000, 7
NAMES = """Mia Noah Lena Omar Hana Felix Rosa Ivan Yuki Clara Hugo Nina Ravi Emma Leo Sara Tom Ada Kai Vera Paul Ines Adam Zoe
Jack Olga Sam Tara Erik Lila Marco Ruth Diego Eva Finn Grace Amir Dana Oscar Petra""".split()
CITIES = """Oslo Lima Paris Cairo Seoul Rome Berlin Tokyo Madrid Vienna Dublin Lisbon Prague Athens Delhi Boston Quito Hanoi
Warsaw Milan Kyoto Lagos Geneva Porto Riga Tunis London Sydney Denver Nairobi""".split()
COLOURS = "red blue green yellow black white brown purple orange pink silver golden".split()
ITEMS = """apples books lamps chairs cups hats bottles candles pens shirts keys coats bags bowls clocks plates spoons tables
towels tickets flowers carpets mirrors drums kites baskets buckets pillows ropes stamps""".split()
WORDINGS = [
    "{name} bought {count} {item} in {city}.",
    "In {city}, {name} bought {count} {item}.",
    "{name} went to {city} and bought {count} {item}.",
    "{count} {item} were bought by {name} in {city}.",
    "Last {day}, {name} bought {count} {item} in {city}.",
    "{name} from {city} wants {count} {item}.",
    "Please send {count} {item} to {name} in {city}.",
    "{name} lives in {city} and needs {count} {item} on {day}.",
]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def make_row(rng: random.Random) -> dict:
    """One conversation: the sentence, and its facts as JSON with the keys always in the same order."""
    facts = {
        "name": rng.choice(NAMES),
        "count": rng.randint(2, 60),
        "item": f"{rng.choice(COLOURS)} {rng.choice(ITEMS)}",
        "city": rng.choice(CITIES),
    }
    sentence = rng.choice(WORDINGS).format(day=rng.choice(DAYS), **facts)
    return {"messages": [{"role": "user", "content": sentence}, {"role": "assistant", "content": json.dumps(facts)}]}


def make_rows(num_rows: int = NUM_ROWS, seed: int = SEED) -> list[dict]:
    """Rows with different sentences."""
    rng = random.Random(seed)
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        row = make_row(rng)
        rows.setdefault(row["messages"][0]["content"], row)
    return list(rows.values())


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "recipes/data/quickstart.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows()), encoding="utf-8")
    print(f"{path}: {NUM_ROWS} rows")


if __name__ == "__main__":
    main()

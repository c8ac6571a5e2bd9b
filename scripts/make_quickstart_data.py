"""Write recipes/data/quickstart.jsonl: messages to a shop, each with the one-line form that the quickstart teaches.

    python scripts/make_quickstart_data.py
"""

import json
import random
from pathlib import Path

from qlora.model.tiny_text import draw_message

NUM_ROWS = 1000


def main() -> None:
    rng = random.Random(7)
    rows: dict[str, str] = {}
    while len(rows) < NUM_ROWS:
        message = draw_message(rng)
        rows.setdefault(message.text, f"topic: {message.topic}; mood: {message.mood}; urgent: {message.urgent}")
    path = Path(__file__).resolve().parents[1] / "recipes" / "data" / "quickstart.jsonl"
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text, form in rows.items():
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": form}]
            file.write(json.dumps({"messages": turns}) + "\n")


if __name__ == "__main__":
    main()

"""Writes MATH train and the five benchmarks from the Hugging Face hub as JSON lines: `prepare_data.py [FOLDER]`.

Each line has `problem` and `answer`, a string or a list of accepted strings. MATH's reference answer is what its
solution puts into the last \\boxed{}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import load_dataset

from dpsrl.data.files import first_line
from dpsrl.rewards.answers import final_answers

# file stem: (data set, configuration, split, problem column, answer column or None for the solution's box)
SOURCES = {
    "math_train": ("DigitalLearningGmbH/MATH-lighteval", "default", "train", "problem", None),
    "aime24": ("math-ai/aime24", "default", "test", "problem", None),
    "amc23": ("math-ai/amc23", "default", "test", "question", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", "problem", "answer"),
    "minerva": ("math-ai/minervamath", "default", "test", "question", "answer"),
    "olympiad_bench": ("math-ai/olympiadbench", "default", "test", "question", "final_answer"),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (name, configuration, split, problem, answer) in SOURCES.items():
        try:
            rows = load_dataset(name, configuration, split=split)
        except OSError as error:  # ConnectionError and the hub's own are among them
            sys.exit(f"{name} cannot be loaded from the hub ({first_line(error)}): see to the network, or set HF_TOKEN")
        with (folder / f"{stem}.jsonl").open("w") as file:
            for row in rows:
                reference = row[answer] if answer else next(iter(final_answers(row["solution"])), None)
                file.write(json.dumps({"problem": row[problem], "answer": reference}) + "\n")
        print(f"{folder / stem}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))

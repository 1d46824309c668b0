"""Real text that every Python installation carries, tokenisers for it, and batches that depend on a seed and a step.

    python examples/corpus.py         # how much text there is

Its source is `expfam_poco/reproduce/corpus.py`.
"""

import argparse

from expfam_poco.reproduce.corpus import (
    HELD_OUT,
    HELD_OUT_TOPICS,
    MEASUREMENT,
    MEGA_BATCH,
    SKIPPED,
    TRAINING,
    BytePairs,
    Bytes,
    Corpus,
    Tokenizer,
    load,
    restored,
    stdlib_files,
    texts,
    windows,
)

__all__ = [
    "BytePairs",
    "Bytes",
    "Corpus",
    "HELD_OUT",
    "HELD_OUT_TOPICS",
    "MEASUREMENT",
    "MEGA_BATCH",
    "SKIPPED",
    "TRAINING",
    "Tokenizer",
    "load",
    "restored",
    "stdlib_files",
    "texts",
    "windows",
]


def main() -> None:
    """Print the sizes of the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", default=["stdlib", "topics"])
    for name in parser.parse_args().texts:
        train, held_out = texts(name)
        print(f"{name}: {len(train):,d} bytes to train on, {len(held_out):,d} held out")


if __name__ == "__main__":
    main()

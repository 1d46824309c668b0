"""The small GPT of `expfam-poco reproduce`: pre-norm blocks, causal attention, rotary or learned positions.

    python examples/gpt.py            # the presets and their numbers of weights

Its source is `expfam_poco/reproduce/gpt.py`.
"""

import argparse

from expfam_poco.reproduce.gpt import GPT, PRESETS, Attention, Block, Config, angles, parameters_of, preset, rotate

__all__ = ["GPT", "PRESETS", "Attention", "Block", "Config", "angles", "parameters_of", "preset", "rotate"]


def main() -> None:
    """Print the presets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    options = parser.parse_args()
    print(f"{'preset':8s}{'layers':>8s}{'heads':>7s}{'width':>7s}{'positions':>11s}{'weights':>13s}")
    for name in PRESETS:
        config = preset(name, vocabulary=options.vocabulary, context=options.context)
        print(
            f"{name:8s}{config.layers:8d}{config.heads:7d}{config.width:7d}{config.positions:>11s}"
            f"{parameters_of(config):13,d}"
        )


if __name__ == "__main__":
    main()

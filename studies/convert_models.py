"""Rewrite models of the first edition in today's format, bit for bit the same weights: folders of single networks and of classifiers.

Usage: python studies/convert_models.py FOLDER [FOLDER ...]
A folder that is in today's format already is only given a current card.
"""

import argparse
from pathlib import Path

from ddpm_nb.evaluation import DigitClassifier, save_classifier
from ddpm_nb.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    build_parts,
    model_card,
    read_json,
    read_sealed,
    replaced_file,
)
from ddpm_nb.hub import load_pretrained, save_pretrained


def convert(folder):
    """Rewrite one folder; return what was done."""
    config = read_json(folder / CONFIG_FILE)
    card = config["card"]
    if config["format"] == "ddpm_nb model":
        model, schedule = load_pretrained(folder)
        save_pretrained(folder, model, schedule, n_levels=card.get("grey levels"), card=card, overwrite=True)
        return "a model, rewritten"
    if config["format"] == "ddpm_nb classifier":
        _, tensors = read_sealed(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        described = {"classifier": {"class": DigitClassifier.__name__, "config": config["config"]}}
        parts = build_parts(described, [DigitClassifier], {f"classifier.{name}": tensor for name, tensor in tensors.items()})
        save_classifier(folder, parts["classifier"], card=card, overwrite=True)
        return "a classifier, rewritten"
    with replaced_file(folder / CARD_FILE) as file:
        file.write_text(model_card(card.get("name", "model"), card, config["parts"]), "utf-8")
    return "in today's format, its card written anew"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        print(f"{folder}: {convert(folder)}")


if __name__ == "__main__":
    main()

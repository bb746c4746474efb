"""Draw the demo data set: small RGB-thermal road scenes with exact labels.

    python tools/draw_scenes.py                          # what `-n demo` trains on
    python tools/draw_scenes.py --out datasets/Large --height 480 --width 640 --train 40

Writes OUT/{RGB,Modal,Label}/00000D.png ... (D day, N night), train.txt, val.txt, test.txt,
test_day.txt, test_night.txt, and scenes.json, which says what was drawn. Scene number i of a seed
is always the same picture, at any time and in any order; train, val and test follow each other.
OUT appears when it is complete. A second call with the same values does nothing; an OUT with
anything else in it is refused and left as it is.
Classes: 0 background, 1 person, 2 car, 3 cone, 4 kerb.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloader.synthetic import SPLITS, write_dataset
from utils.cli import Parser, run_main


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("datasets/Demo"), help="default: %(default)s"
    )
    for split, count in zip(SPLITS, (240, 40, 40), strict=True):
        help_text = f"scenes for {split}.txt (default: %(default)s)"
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=help_text)
    parser.add_argument("--height", type=int, default=96, help="pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="0 or more (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    counts = {split: getattr(options, split) for split in SPLITS}
    with tqdm(total=sum(counts.values()), unit="scene", leave=False, disable=None) as bar:
        is_new = write_dataset(
            options.out,
            counts=counts,
            height=options.height,
            width=options.width,
            seed=options.seed,
            on_scene=bar.update,
        )
    listed = ", ".join(f"{split} {count}" for split, count in counts.items())
    what = f"{listed}; {options.height}x{options.width} pixels, seed {options.seed}"
    print(f"{options.out}: {'drawn' if is_new else 'was there already'} ({what})")


if __name__ == "__main__":
    run_main(main)

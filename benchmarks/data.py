"""The training loader against plain reading of the same files.

    python benchmarks/data.py --set data.dataset_path=/data/MSRS     # 2 workers, as in the results
    python benchmarks/data.py --workers 4 --repeats 9 --set train.batch_size=12

Pairs a second of the loader with the whole augmentation at train.crop, and of as many processes
that only decode rgb, thermal and label with cv2.imread. Both give bytes; the loader's lie in the
main process, ready to be copied to a device, where they become numbers. "As float32 on the CPU"
makes them numbers in the main process, as training without a GPU does. Twice: for the files as they
are, and for the same pixels as PNG, the format in which the four published sets come. With
data.cache=ram (filled before) nothing is decoded; augment adds the stronger augmentation.
All take turns, several epochs each; the rates are the best of the repeats (other work on the
machine only ever adds time), the shares those of each turn: smallest, median, largest.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

if __name__ == "__main__":  # started as a file: the project's packages lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import Config, load_config
from dataloader.build import PairLoader, build_train_loader
from dataloader.dataset import PairFiles, find_files, read_names
from utils.environment import environment_info
from utils.image import write_png

_FILLING = 8  # epochs until each of a few workers has seen nearly every image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--dataset_name", default="msrs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=3, help="of each turn")
    parser.add_argument("--set", nargs="+", action="extend", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # of the process that takes the batches
    print(f"machine: {environment_info()}, {arguments.workers} workers\n")
    settings = [*arguments.set, f"data.num_workers={arguments.workers}"]
    config = load_config(arguments.dataset_name, settings)
    with tempfile.TemporaryDirectory() as folder:
        as_png(config, Path(folder))
        for title, more in (
            ("files as they are", []),
            ("as PNG", [f"data.dataset_path={folder}"]),
        ):
            print(f"{title}\n")
            measure(arguments, [*settings, *more])


def as_png(config: Config, folder: Path) -> None:
    """Write the training pairs as PNG into a set of the same layout."""
    names = {split: read_names(config.data, split) for split in ("train", "val")}
    for split, stems in names.items():
        (folder / f"{split}.txt").write_text("\n".join(stems), encoding="utf-8")
    places = (config.data.rgb_folder, config.data.thermal_folder, config.data.label_folder)
    files = find_files(config.data, names["train"], need_labels=True)
    for stem, paths in zip(names["train"], files, strict=True):
        for place, path in zip(places, paths, strict=True):
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            write_png(folder / place / f"{stem}.png", image)


def measure(arguments: argparse.Namespace, settings: list[str]) -> None:
    """Time everything in turn and print the table."""
    loaders = {
        name: build_train_loader(load_config(arguments.dataset_name, [*settings, *more]))
        for name, more in {
            "loader": [],
            "loader, data.cache=ram": ["data.cache=ram"],
            "loader, augment.probability=0.5": ["augment.probability=0.5"],
        }.items()
    }
    with multiprocessing.Pool(arguments.workers, cv2.setNumThreads, (0,)) as pool:
        runs: dict[str, Callable[[], int]] = {"cv2.imread alone": plain(pool, loaders["loader"])}
        runs |= {name: epoch_of(loader) for name, loader in loaders.items()}
        runs["loader, as float32 on the CPU"] = epoch_of(loaders["loader"], is_converted=True)
        for name, run in runs.items():
            for _ in range(_FILLING if "ram" in name else 1):
                run()
        rates = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                rates[name].append(images_per_s(run, arguments.epochs))
    report(rates)


def plain(pool: multiprocessing.Pool, loader: PairLoader) -> Callable[[], int]:
    """An epoch of decoding alone; gives the number of pairs."""
    files, size = loader.dataset.files, loader.batch_sampler.batch_size

    def run() -> int:
        for _ in pool.imap_unordered(read, files, chunksize=size):
            pass
        return len(files)

    return run


def read(files: PairFiles) -> None:
    for path in files:
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def epoch_of(loader: PairLoader, *, is_converted: bool = False) -> Callable[[], int]:
    """An epoch of training batches, made numbers if asked for; gives the number of pairs."""

    def run() -> int:
        loader.batch_sampler.set_epoch(loader.batch_sampler.epoch + 1)
        count = 0
        for batch in loader:
            count += len(batch.name)
            if is_converted:
                batch.to(torch.device("cpu"))
        return count

    return run


def images_per_s(run: Callable[[], int], epochs: int) -> float:
    start = time.perf_counter()
    images = sum(run() for _ in range(epochs))
    return images / (time.perf_counter() - start)


def report(rates: dict[str, list[float]]) -> None:
    """Print the table; the first of rates is the ceiling."""
    ceiling = next(iter(rates.values()))
    print("| what | pairs/s | share of cv2.imread: smallest, median, largest |")
    print("|---|---|---|")
    for name, found in rates.items():
        shares = [100 * own / plain for own, plain in zip(found, ceiling, strict=True)]
        spread = (min(shares), statistics.median(shares), max(shares))
        print(f"| {name} | {max(found):.0f} | {', '.join(f'{x:.0f} %' for x in spread)} |")
    print()


if __name__ == "__main__":
    main()

r"""Train CMFS on one dataset.

Checkpoints, logs and TensorBoard files go to experiment/<Name>/<exp>/. The images of val.txt choose
best.pth. Ctrl-C and SIGTERM save the exact state and end the run; --resume goes on with it.

Examples:
    python train.py -n demo -d cpu
    python train.py -n fmb --set train.batch_size=2 data.dataset_path=/data/FMB
    python train.py -n mfnet -d 0,1
    torchrun --nproc_per_node=2 --master_port=29588 train.py -d 0,1 -p 29588 -n mfnet
    python train.py -n mfnet --resume
    python train.py -n mfnet --resume experiment/MFNet/exp/checkpoint/epoch-previous.pth
    python train.py -n mfnet --exp bf16 --set train.precision=bf16
    tensorboard --logdir experiment

Several hosts that share the folder experiment/, each with this command; when one is lost the others
go on from the last epoch-last.pth, and take it in again when it is back:
    torchrun --nnodes=1:2 --nproc_per_node=4 --max_restarts=9 --rdzv_id=mfnet --rdzv_backend=c10d \
        --rdzv_endpoint=FIRST_HOST:29400 train.py -n mfnet --resume

Exit codes: 0 done; 2 bad input (one line on stderr); 130 or 143 after SIGINT or SIGTERM, saved.
Under torchrun each process has these; torchrun itself ends with its own.
"""

import argparse
import logging
from contextlib import nullcontext

from configs import Config, load_config
from dataloader.build import build_eval_loader, build_train_loader
from dataloader.check import refuse_bad_lists
from dataloader.preview import augmentation_sheet
from engine.inference import use_tf32
from engine.state import starting_point
from engine.trainer import fit
from models import build_model
from utils.cli import common_parser, run_main
from utils.distributed import is_main_process, setup_devices, shutdown, start_processes
from utils.lock import claim
from utils.log import setup_logging
from utils.run_folder import RunFolder
from utils.seed import seed_everything

log = logging.getLogger(__name__)


def parse_arguments() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="FILE",
        help="go on exactly where epoch-last.pth of the run folder stopped, or where FILE did",
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    config = load_config(arguments.dataset_name, arguments.set)
    start_processes(arguments.devices, arguments.port)
    folder = RunFolder(config, arguments.exp)
    lock = claim(folder.path) if is_main_process() else nullcontext()
    with lock:
        return train(arguments, config, folder)


def train(arguments: argparse.Namespace, config: Config, folder: RunFolder) -> int:
    """One run in its folder; returns the exit code."""
    resume_from = starting_point(folder, resume=arguments.resume)
    setup_logging(folder.log_file, main=is_main_process())
    if arguments.resume and resume_from is None:
        log.info("--resume: there is no checkpoint in %s yet, so training begins", folder.path)
    devices = setup_devices(arguments.devices, arguments.port)
    seed_everything(config.seed + devices.rank)
    use_tf32(config.train.tf32)
    ranks = {"rank": devices.rank, "world_size": devices.world_size}
    val_loader = build_eval_loader(config, "val", need_labels=True, **ranks)
    train_loader = build_train_loader(config, **ranks)
    refuse_bad_lists(config.data)
    model = build_model(config, from_checkpoint=resume_from is not None)
    is_shown = is_main_process()
    pictures = {"augmentation": augmentation_sheet(train_loader.dataset)} if is_shown else {}
    stopped_by = fit(
        config,
        model,
        train_loader,
        val_loader,
        folder=folder,
        devices=devices,
        resume_from=resume_from,
        pictures=pictures,
    )
    shutdown()
    return 128 + stopped_by if stopped_by else 0


if __name__ == "__main__":
    run_main(main)

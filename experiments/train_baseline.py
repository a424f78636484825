"""Which network does the project start from?

    python -m experiments.train_baseline --model resnet20 --epochs 70

Trains one on CIFAR-10; the test split is read once, after the last epoch. 45,000
training images; the 5,000 that later serve as calibration, proxy and selection splits
are never trained on. Resumable: a second call goes on after the last finished epoch.
ResNet-20, 70 epochs: about 95 minutes on 1 core.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from autoprune.config import DataConfig, FinetuneConfig
from autoprune.data.datasets import load
from autoprune.data.models import build
from autoprune.evaluation.evaluate import accuracy
from autoprune.training.loop import finetune
from experiments.script import run


def main() -> None:
    """Trains the network, and prints its scores as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/baseline"))
    args = parser.parse_args()

    splits = load(DataConfig(data="cifar10"))
    config = FinetuneConfig(
        args.epochs, args.batch_size, args.lr, weight_decay=5e-4, distillation=0.0
    )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = build(args.model)
    started = time.time()

    def report(epoch: int, loss: float) -> None:
        print(
            f"epoch {epoch}/{args.epochs}  loss {loss:.4f}  "
            f"{time.time() - started:.0f} s",
            flush=True,
        )

    finetune(
        model,
        splits.train,
        config,
        args.seed,
        checkpoint=args.out / f"{args.model}.ckpt",
        on_epoch=report,
    )
    scores = {
        "selection": accuracy(model, splits.selection),
        "test": accuracy(model, splits.test),
    }
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, args.out / f"{args.model}.safetensors")
    about = {"model": args.model, "epochs": args.epochs, "seed": args.seed}
    print(json.dumps(about | scores))


if __name__ == "__main__":
    run(main)

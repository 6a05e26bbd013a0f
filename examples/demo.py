"""Train, evaluate, export and run a small MoE-CNN on embedded images, by the commands of a user.

The demo prints one table. It runs in a temporary folder, or in a given folder: `python
examples/demo.py FOLDER`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from advmoe.data.sources import load_dataset

TRAIN = "train digits --arch vgg16 --width 0.125 --epochs 12 --batch-size 64 --lr 0.05 --val-limit 100"
STEPS = 20


def advmoe(command: str, *paths: Path) -> dict[str, Any]:
    """Run one command with --json, and return the result that it printed. Its progress appears on stderr."""
    arguments = [*shlex.split(command), *map(str, paths), "--json"]
    print(f"$ advmoe {shlex.join(arguments)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "advmoe", *arguments], stdout=subprocess.PIPE, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(folder: Path) -> None:
    """Train, evaluate, export and predict, then print the table."""
    run, model, image = folder / "run", folder / "model.onnx", folder / "digit.png"
    began = time.monotonic()
    advmoe(f"{TRAIN} --out", run)
    seconds = time.monotonic() - began
    checkpoint = run / "best.pt"
    accuracy = advmoe(f"evaluate --steps {STEPS}", checkpoint)
    info = advmoe("info", checkpoint)
    export = advmoe("export", checkpoint, model)
    test = load_dataset("digits").test
    Image.fromarray(test.images[0]).save(image)
    prediction = advmoe("predict", model, image)["predictions"][0]

    table = Table(title="A robust MoE-CNN, trained and run by onnxruntime", title_justify="left", show_header=False)
    difference = max(check["difference"] for check in export["verification"]["checks"])
    experts = "".join(map(str, prediction["pathway"]))
    rows = {
        "model": f"VGG-16 MoE-CNN, width {info['width']:g}, N = {info['num_experts']}, r = {info['model_scale']:g}",
        "parameters": f"{info['parameters']:,} ({info['router_parameters']:,} in {info['moe_layers']} routers)",
        "training": f"AdvMoE, {seconds:.0f} s",
        "standard accuracy (SA)": f"{accuracy['sa']:.2f} % of {accuracy['images']} test images",
        "robust accuracy (RA)": f"{accuracy[f'ra_pgd{STEPS}']:.2f} % (PGD-{STEPS}, eps 8/255)",
        "exported to": f"{model.name}, largest relative difference from PyTorch {difference:.1e}",
        "onnxruntime says": f"{prediction['label']} (p = {prediction['probability']:.3f}), pathway {experts}",
        "the label says": test.class_names[test.labels[0]],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))

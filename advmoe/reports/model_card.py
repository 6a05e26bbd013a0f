"""The model card of a repository on the hub: the model, its robustness under each attack, and its use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from advmoe.evaluation.vocabulary import RA_AA, RA_FURTHER, RA_PGD, RA_ROUTE, RA_WORST, SA, pixels
from advmoe.training.checkpoint import Checkpoint

SHOWN = (SA, RA_PGD, RA_ROUTE, RA_FURTHER, RA_AA, RA_WORST)
"""Accuracies in the table of results, if they were measured."""
KINDS = {
    "moe": "a sparse mixture-of-experts {network}",
    "dense": "a dense {network}",
    "s_dense": "a dense {network} of one pathway's size",
    "sparse_cnn": "a sparse {network}",
}


def model_card(
    contents: Checkpoint, repository: str, *, license: str, evaluation: Mapping[str, Any] | None, onnx: bool
) -> str:
    """The text of README.md, with the hub's header.

    Args:
        contents: The model and what is known of its training.
        repository: OWNER/NAME.
        license: Identifier of the license of the weights.
        evaluation: Result card of an evaluation, or None if there is none.
        onnx: Whether the repository holds an ONNX file.
    """
    model, train = contents.model, contents.train
    dataset = train.get("dataset", "unknown")
    tags = ["advmoe", "adversarial-robustness", *(["mixture-of-experts"] if model.kind == "moe" else [])]
    header = {
        "license": license,
        "library_name": "advmoe",
        "pipeline_tag": "image-classification",
        "tags": tags,
        "datasets": [] if dataset in {"folder", "unknown"} else [dataset],
        "metrics": ["accuracy"],
    }
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in header.items()), "---", ""]
    lines += [f"# {repository.split('/')[1]}", ""]
    experts = f" with N = {model.num_experts} experts at scale r = {model.model_scale:g}" if model.kind == "moe" else ""
    network = KINDS[model.kind].format(network="vision transformer" if model.arch == "vit" else "CNN")
    lines += [f"{model.arch} as {network}{experts}, trained with the method `{train.get('method', 'unknown')}`."]
    lines += ["It maps images [B, 3, H, W] in [0, 1] to logits; normalization is inside.", ""]
    lines += ["## Results", "", *_results(evaluation), ""]
    lines += ["## Data and training", "", *_training(contents, dataset), ""]
    lines += ["## Use", "", *_use(repository, routed=model.kind == "moe", onnx=onnx), ""]
    lines += ["## License", "", f"Weights: {license}. The images of the training set have terms of their own.", ""]
    return "\n".join(lines)


def _results(evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["This model was not evaluated on test images. Its robustness is unknown."]
    numbers = evaluation["advmoe"]
    attack = numbers["attack"]
    rows = {figure.label(numbers): figure.of(numbers) for figure in SHOWN}
    table = [
        "| accuracy | % |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in rows.items() if value is not None),
    ]
    attacked = (
        f"{numbers['images']} test images of {evaluation['dataset']}, eps {pixels(attack['eps'])} (l-infinity), "
        f"step {pixels(attack['step_size'])}, {attack['restarts']} restart(s), start {attack['start']}, "
        f"seed {numbers['seed']}."
    )
    verdict = {True: "trusted", False: "not to be trusted", None: "not checked"}[numbers.get("trusted")]
    found = [f"- {item['name']}: {item['status']} ({item['value']})" for item in numbers.get("diagnostics", [])]
    return [*table, "", attacked, "", f"Diagnostics: these numbers are {verdict}.", *found]


def _training(contents: Checkpoint, dataset: str) -> list[str]:
    train = contents.train
    classes = ", ".join(contents.class_names[:20]) + (", ..." if len(contents.class_names) > 20 else "")
    lines = [f"Data set: {dataset}; {contents.model.num_classes} classes" + (f": {classes}." if classes else ".")]
    if train:
        attack = train["attack"]
        lines.append(
            f"{train['epochs']} epochs, batches of {train['batch_size']}, learning rate {train['lr']:g}, seed "
            f"{train['seed']}; attack in training: PGD-{attack['steps']}, eps {pixels(attack['eps'])}, "
            f"step {pixels(attack['step_size'])}."
        )
    return lines


def _use(repository: str, *, routed: bool, onnx: bool) -> list[str]:
    lines = [
        "```python",
        "import advmoe",
        "",
        f'model = advmoe.load("hf://{repository}")',
        "logits = model(images)",
        "```",
    ]
    if onnx:
        computes = "computes the chosen experts of each image only and " if routed else ""
        lines += [
            "",
            f"`model.onnx` {computes}needs neither torch nor advmoe:",
            "",
            "```console",
            "pip install 'advmoe-export[cpu,serve]'",
            f"hf download {repository} --local-dir model",
            "advmoe-serve model/model.onnx",
            "```",
        ]
    return lines

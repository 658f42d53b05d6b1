"""Figures of a model, which tests compare between one device and several devices or processes.

Under torchrun, with checkpoint folders as arguments, this file is a script: each process loads every checkpoint as a
tensor-parallel model and writes the figures into the checkpoint's folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zerotuning as zt
from random_models import random_model
from torch import Tensor
from zerotuning.models import process_group
from zerotuning.models.device_maps import input_device
from zerotuning.patching.layer_scales import LayerScales
from zerotuning.patching.patch import head_parameters, head_scales, patched_shape
from zerotuning.tasks.task import Task

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
PROMPT = "Review: {text}\nSentiment:"
LABELS = (" negative", " positive")
TASKS = {
    "one token": Task("films", PROMPT, LABELS),
    "several tokens": Task("films", PROMPT, (" far too long", " a good story")),
    "written": Task("films", PROMPT, LABELS, scoring="generate"),
}
RECORDS = [
    {"text": f"the film is {first} and {second}", "label": int(second != "told")}
    for first in ("good", "bad", "a good story", "far too long")
    for second in ("told", "long", "well told", "a story")
]


def save_random_model(folder: Path, kind: str, tokenizer: Any, **changes: Any) -> Path:
    """Save a random model and its tokenizer in one folder."""
    random_model(kind, **SMALL | {"vocab_size": len(tokenizer)} | changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_scales(layers: int, heads: int, seed: int) -> zt.HeadScales:
    draw = torch.Generator().manual_seed(seed)
    return zt.HeadScales(torch.empty(layers, heads).uniform_(-2, 2, generator=draw).exp())


def figures(model: Any) -> dict[str, Tensor]:
    """Return a padded batch's logits, gradients and texts under random scales on the CPU; unpatch the model."""
    zt.patch(model)
    layers, heads = patched_shape(model)
    named = {"a": random_scales(layers, heads, 1), "b": random_scales(layers, heads, 2)}
    zt.apply_scales(model, named)
    draw = torch.Generator().manual_seed(3)
    device = input_device(model)
    ids = torch.randint(2, 300, (2, 11), generator=draw).to(device)
    mask = torch.tensor([[0] * 4 + [1] * 7, [1] * 11], device=device)
    found = {"shape": torch.tensor([layers, heads]), "scales": head_scales(model).gamma}
    with torch.no_grad():
        found["tuned"] = model(ids, attention_mask=mask).logits
        with zt.select_scales(model, ["b", "a"]):
            found["rows"] = model(ids, attention_mask=mask).logits
        with zt.untuned(model):
            found["untuned"] = model(ids, attention_mask=mask).logits
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    for cache in ("dynamic", "static"):
        found[cache] = model.generate(input_ids=ids, cache_implementation=cache, **options)
    found["gradient"] = _gradient(model, ids, mask, named["a"])
    zt.unpatch(model)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def _gradient(model: Any, ids: Tensor, mask: Tensor, scales: zt.HeadScales) -> Tensor:
    """Return the gradient of the last token's negative log-probability in log γ of every head: (layers, heads)."""
    with head_parameters(model) as parameters:
        with torch.no_grad():
            for parameter, row in zip(parameters, scales.log_scale, strict=True):
                parameter.copy_(row)
        logits = model(ids[:, :-1], attention_mask=mask[:, :-1]).logits[:, -1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, -1].to(logits.device))
        gradients = torch.autograd.grad(loss, parameters)
    return torch.stack([gradient.cpu() for gradient in gradients])


def evaluations(model: Any, tokenizer: Any) -> dict[str, list[float | None]]:
    """Return accuracy, loss and entropy for labels of one token, labels of several tokens, and generated answers."""
    found = {}
    for name, task in TASKS.items():
        of = zt.evaluate(model, tokenizer, task, RECORDS)
        found[name] = [of.accuracy, of.loss, of.entropy]
    return found


def own_heads(model: Any) -> int:
    """Heads of the first layer that this process computes."""
    zt.patch(model)
    scaling = next(module for module in model.modules() if isinstance(module, LayerScales))
    zt.unpatch(model)
    return scaling.heads if scaling.shard is None else scaling.shard.count


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        model, tokenizer = zt.load_model(folder, dtype=torch.float32, tensor_parallel=True)
        found = {
            "figures": figures(model),
            "evaluations": evaluations(model, tokenizer),
            "own_heads": own_heads(model),
            "backend": dist.get_backend(),
        }
        torch.save(found, folder / f"process-{dist.get_rank()}.pt")
    process_group.Processes().wait_for_main()
    process_group.leave_process_group()


if __name__ == "__main__":
    main()

"""An offline proxy: how likely a model finds answers, and how sure it is of each next token. It measures no quality.

It needs no judge and no network. Likely is not good: a model finds its own repetitions likely. What it is for: comparing answers to the same questions
under one fixed model, and noticing that decoding settings or scales changed them at all.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from zerotuning.errors import ZeroTuningError
from zerotuning.models.device_maps import input_device
from zerotuning.mt_bench.conversation import Conversation
from zerotuning.mt_bench.means import Row, means
from zerotuning.mt_bench.questions import TURNS, Answer

PROXY = (
    "mean log-likelihood and entropy per token of the answers under the model, nats; a proxy, no judgment of quality"
)
#: Positions whose logits are held in float32 at once.
POSITIONS = 256


def measure_proxy(model: Any, tokenizer: Any, answers: Sequence[Answer], *, progress: bool = False) -> dict[str, Any]:
    """Figures of answers under a model as it stands, each answer in the dialogue that it was given in.

    Of each answer: log_likelihood, the mean log-probability of its tokens, and entropy, the mean entropy of the distribution
    that each was drawn from at temperature 1, both in nats. These are averaged by turn and category, every answer counting
    alike. Answers without a token are left out and counted as empty; an answer is cut where the model's context ends and
    counted as cut.
    Returns: {"proxy", "answers", "empty", "cut", "mean", "turns", "categories"}.
    Errors: ZeroTuningError for a prompt longer than the model's context, and for scores that are NaN.
    """
    conversation = Conversation(tokenizer)
    rows: list[Row] = []
    empty = cut = 0
    hidden = not (progress and sys.stderr.isatty())
    for answer in tqdm(answers, desc="proxy", unit=" dialogues", disable=hidden, leave=False):
        for turn in range(TURNS):
            prompt = conversation.prompt_tokens(
                conversation.prompt(answer.question.turns[: turn + 1], answer.turns[:turn])
            )
            tokens = conversation.answer_tokens(answer.turns[turn])
            kept = tokens[: _room(model, len(prompt), answer, turn)]
            cut += len(kept) < len(tokens)
            if not kept:
                empty += 1
                continue
            log_likelihood, entropy = _figures(model, prompt, kept)
            if log_likelihood != log_likelihood:
                raise ZeroTuningError(f"{_place(answer, turn)}: the model's scores are NaN")
            figures = {"log_likelihood": log_likelihood, "entropy": entropy}
            rows.append((turn + 1, answer.question.category, figures))
    return {"proxy": PROXY, "answers": len(rows), "empty": empty, "cut": cut, **means(rows)}


def _room(model: Any, prompt: int, answer: Answer, turn: int) -> int | None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return None
    if prompt >= context:
        raise ZeroTuningError(
            f"{_place(answer, turn)}: the prompt takes {prompt} tokens, the model's context is {context}"
        )
    return context - prompt


def _place(answer: Answer, turn: int) -> str:
    return f"question {answer.question.question_id}, turn {turn + 1}"


@torch.no_grad()
def _figures(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[float, float]:
    """Mean log-probability of the tokens after the prompt, and mean entropy where they stand, nats."""
    ids = torch.tensor([[*prompt, *tokens]], device=input_device(model))
    known = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": len(tokens) + 1} if "logits_to_keep" in known else {}
    logits = model(input_ids=ids, use_cache=False, **options).logits[0, -len(tokens) - 1 : -1]
    chosen, entropies = [], []
    for part, target in zip(logits.split(POSITIONS), ids[0, -len(tokens) :].split(POSITIONS), strict=True):
        logs = torch.log_softmax(part.float(), dim=-1)
        chosen.append(logs.gather(1, target[:, None])[:, 0])
        entropies.append(torch.special.entr(logs.exp()).sum(dim=-1))
    return float(torch.cat(chosen).mean()), float(torch.cat(entropies).mean())

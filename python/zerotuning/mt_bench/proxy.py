"""An offline proxy for a judge: the likelihood of answers under a model, and the entropy of its next tokens.

The proxy needs no judge and no network, and it does not measure quality: a model's own repetitions are likely under it.
Use the proxy to compare answers to the same questions under one fixed model, and to find out whether decoding settings
or head scales changed the answers at all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from zerotuning.errors import ZeroTuningError
from zerotuning.models.device_maps import input_device
from zerotuning.models.inspection import forward_arguments
from zerotuning.mt_bench.conversation import Conversation, tokens_left
from zerotuning.mt_bench.means import Row, means
from zerotuning.mt_bench.questions import TURNS, Answer

PROXY = (
    "mean log-likelihood and entropy per token of the answers under the model, nats; a proxy, no judgment of quality"
)
#: Positions whose logits are held in float32 at once.
POSITIONS = 256


def measure_proxy(model: Any, tokenizer: Any, answers: Sequence[Answer], *, progress: bool = False) -> dict[str, Any]:
    """Measure answers under a model as it stands, each answer in its own dialogue.

    An answer's log_likelihood is the mean log-probability of its tokens, its entropy the mean entropy of the model's
    distributions of these tokens at temperature 1, both in nats. Answers without a token are left out and counted as
    empty. An answer is cut where the model's context ends, and counted as cut.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        answers: The answers; their model may be another one.
        progress: Draw a bar on stderr, if stderr is a terminal.

    Returns:
        {"proxy", "answers", "empty", "cut", "mean", "turns", "categories"}: the figures are averaged by turn and
        category with equal weights (see `means`).

    Raises:
        ZeroTuningError: A prompt is longer than the model's context, or the model's scores are NaN.
    """
    conversation = Conversation(tokenizer)
    rows: list[Row] = []
    empty = cut = 0
    no_bar = not (progress and sys.stderr.isatty())
    for answer in tqdm(answers, desc="proxy", unit=" dialogues", disable=no_bar, leave=False):
        for turn in range(TURNS):
            prompt = conversation.prompt_tokens(
                conversation.prompt(answer.question.turns[: turn + 1], answer.turns[:turn])
            )
            tokens = conversation.answer_tokens(answer.turns[turn])
            scored = tokens[: tokens_left(model, prompt, _place(answer, turn))]
            cut += len(scored) < len(tokens)
            if not scored:
                empty += 1
                continue
            log_likelihood, entropy = _figures(model, prompt, scored)
            if math.isnan(log_likelihood):
                raise ZeroTuningError(f"{_place(answer, turn)}: the model's scores are NaN")
            figures = {"log_likelihood": log_likelihood, "entropy": entropy}
            rows.append((turn + 1, answer.question.category, figures))
    return {"proxy": PROXY, "answers": len(rows), "empty": empty, "cut": cut, **means(rows)}


def _place(answer: Answer, turn: int) -> str:
    return f"question {answer.question.question_id}, turn {turn + 1}"


@torch.no_grad()
def _figures(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[float, float]:
    """Mean log-probability of the tokens after the prompt and mean entropy of the model's distributions there, nats."""
    ids = torch.tensor([[*prompt, *tokens]], device=input_device(model))
    options = {"logits_to_keep": len(tokens) + 1} if "logits_to_keep" in forward_arguments(model) else {}
    logits = model(input_ids=ids, use_cache=False, **options).logits[0, -len(tokens) - 1 : -1]
    chosen, entropies = [], []
    for part, target in zip(logits.split(POSITIONS), ids[0, -len(tokens) :].split(POSITIONS), strict=True):
        logs = torch.log_softmax(part.float(), dim=-1)
        chosen.append(logs.gather(1, target[:, None])[:, 0])
        entropies.append(torch.special.entr(logs.exp()).sum(dim=-1))
    return float(torch.cat(chosen).mean()), float(torch.cat(entropies).mean())

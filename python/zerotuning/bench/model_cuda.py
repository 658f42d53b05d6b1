"""`zerotuning bench calibration` on a GPU: a model of Llama-3.1-8B's shape with random weights."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from zerotuning.bench.generation_steps import steps_by_turns
from zerotuning.bench.rows import GRADIENT, OURS, Row
from zerotuning.bench.timing import Peers, free_memory, take_turns
from zerotuning.evaluation import objectives
from zerotuning.evaluation.batches import Batch
from zerotuning.evaluation.cuda_graphs import RecordedForward, Recordings
from zerotuning.evaluation.forward import PlainForward
from zerotuning.evaluation.label_scorer import GRADIENT_TOKENS, LabelScorer
from zerotuning.evaluation.prefix_cache import behind_prefix
from zerotuning.patching.head_scales import HeadScales
from zerotuning.patching.patch import apply_scales, head_parameters, unpatch
from zerotuning.tasks.examples import Record
from zerotuning.tasks.task import Task

SHOTS = 4


def calibration_rows() -> Iterator[Row]:
    """Measure prefill, the objective and its gradient, and generation, in bfloat16."""
    model = _llama_8b()
    for part in (_prefill, _objective, _behind_shots, _sensitivities, _generation):
        try:
            yield from part(model)
        except Exception as error:  # the other parts are measured nevertheless
            failure = {OURS: {"error": f"{type(error).__name__}: {error}"[:300]}}
            yield {"what": part.__name__.strip("_"), "shape": "", "dtype": "bfloat16", "peers": failure}
        free_memory()


def _llama_8b() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=32768,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


@contextmanager
def _tuned(model: Any) -> Iterator[None]:
    config = model.config
    torch.manual_seed(0)
    gamma = torch.exp(0.3 * torch.randn(config.num_hidden_layers, config.num_attention_heads, device="cpu"))
    apply_scales(model, HeadScales(gamma))
    try:
        yield
    finally:
        unpatch(model)


EnterContext = Callable[[], AbstractContextManager[None]]


def _compared(
    peers: Peers, within: Mapping[str, EnterContext] | None = None, rounds: int = 7
) -> dict[str, dict[str, Any]]:
    """`take_turns` on the GPU: peers take turns because a hot GPU is slower."""
    return {**take_turns(peers, 0.0, rounds, within, torch.cuda.synchronize)}


def _prefill(model: Any) -> Iterator[Row]:
    ids = torch.randint(0, 128000, (1, 4096), device="cuda")

    @torch.no_grad()
    def run() -> object:
        return model(ids, use_cache=False, logits_to_keep=1)

    figures = _compared({"sdpa": run, OURS: run}, within={OURS: partial(_tuned, model)})
    yield {"what": "prefill", "shape": "1 x 4096", "dtype": "bfloat16", "peers": figures}


def _generation(model: Any, context: int = 8192) -> Iterator[Row]:
    """Measure the tokens per second of `generate` after a prompt of `context` tokens, from the median step.

    With a growing cache the first run has a figure of its own: cuDNN makes a plan for each new length.
    """
    for batch, cache in product((1, 16), ("dynamic", "static")):
        ids = torch.randint(1, 128000, (batch, context), device="cuda")
        peers: dict[str, dict[str, Any]] = {"sdpa": {}, OURS: {}}
        try:
            (_growing_cache if cache == "dynamic" else _static_cache)(model, ids, peers)
        except Exception as error:
            for figures in peers.values():
                if "tokens/s" not in figures:
                    figures["error"] = f"{type(error).__name__}: {error}"[:300]
        free_memory()
        yield {
            "what": "generation",
            "shape": f"{batch} x {context}, {cache} cache",
            "dtype": "bfloat16",
            "peers": peers,
        }


def _growing_cache(model: Any, ids: Tensor, peers: dict[str, dict[str, Any]], new: int = 96, runs: int = 4) -> None:
    tuned = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    with _tuned(tuned):
        steps = steps_by_turns({"sdpa": model, OURS: tuned}, ids, new, runs)
    seconds = {name: [step for of_run in of_runs[1:] for step in of_run] for name, of_runs in steps.items()}
    for name, figures in peers.items():
        figures["tokens/s"] = len(ids) / statistics.median(seconds[name])
        figures["tokens/s, first run"] = len(ids) / statistics.median(steps[name][0])
        pairs = zip(seconds[name], seconds["sdpa"], strict=True)
        low, figures["ratio"], high = statistics.quantiles((step / of_sdpa for step, of_sdpa in pairs), n=4)
        figures |= {"ratio, lower quartile": low, "ratio, upper quartile": high}


def _static_cache(model: Any, ids: Tensor, peers: dict[str, dict[str, Any]], new: int = 24, runs: int = 3) -> None:
    # One model after the other: a compiled model makes all its runs before the next model is compiled.
    for name, figures in peers.items():
        try:
            with _tuned(model) if name == OURS else nullcontext():
                of_runs = steps_by_turns({name: model}, ids, new, runs, cache_implementation="static")[name]
        finally:
            torch.compiler.reset()
            free_memory()
        figures["tokens/s"] = len(ids) / min(statistics.median(steps) for steps in of_runs[1:])


def _scorer(model: Any, prompts: int, tokens: int = 64, shots: int = 0) -> LabelScorer:
    """Make a scorer as `calibrate` does, of random prompts with two labels, behind `shots` solved prompts."""
    records = [
        Record({"text": " ".join(map(str, torch.randint(2, 10000, (tokens,)).tolist())), "label": n % 2}, f"prompt {n}")
        for n in range(prompts + shots)
    ]
    task = Task("numbers", "{text}", (" 0", " 1"))
    behind = task.with_shots(records[:shots]) if shots else task
    return LabelScorer(
        model, _number_tokenizer(), behind, records[shots:], batch_size=prompts, batch_tokens=GRADIENT_TOKENS
    )


@torch.no_grad()
def _forward_passes(scorer: LabelScorer, batches: list[Batch], share_prefix: bool = False) -> None:
    scorer = behind_prefix(scorer) if share_prefix else scorer
    for batch in batches:
        scorer.scores(batch)


def _gradient_passes(
    scorer: LabelScorer, parameters: list[Tensor], batches: list[Batch], share_prefix: bool = False
) -> None:
    for batch in batches:
        scores = (behind_prefix(scorer) if share_prefix else scorer).scores(batch)
        torch.autograd.grad(objectives.task_loss(scores, batch.labels.cuda()), parameters)


def _objective(model: Any) -> Iterator[Row]:
    """Measure the task loss of 16 prompts, and its gradient, in passes of at most GRADIENT_TOKENS tokens.

    They are measured by replays of recorded CUDA graphs, as in a search, and by passes that Python launches.
    """
    for tokens in (64, 128, 512):
        plain = _scorer(model, 16, tokens)
        for recorded in (True, False):
            with _tuned(model), head_parameters(model) as parameters:
                notes: list[str] = []
                recordings = Recordings(model, parameters, notes.append)
                scorer = plain.using(RecordedForward(PlainForward(model), recordings)) if recorded else plain
                forward = partial(_forward_passes, scorer, scorer.batches)
                gradient = partial(_gradient_passes, scorer, parameters, scorer.batches)
                torch.cuda.reset_peak_memory_stats()
                gradient()
                peak = torch.cuda.max_memory_allocated() / 2**30
                figures = _compared({"forward": forward, GRADIENT: gradient})
                figures[GRADIENT] |= {"GiB": peak, "passes": len(scorer.batches)}
                if notes:
                    figures[GRADIENT]["error"] = notes[0]
            what = "objective" if recorded else "objective, from Python"
            yield {"what": what, "shape": f"16 x {tokens}", "dtype": "bfloat16", "peers": figures}
            del scorer, recordings, forward, gradient
            free_memory()


def _behind_shots(model: Any) -> Iterator[Row]:
    """Measure prompts of 64 tokens behind SHOTS solved prompts, which are read with each prompt or once in a pass."""
    for prompts in (16, 64):
        scorer = _scorer(model, prompts, shots=SHOTS)
        whole = scorer.batches
        once = behind_prefix(scorer).batches_of(range(prompts))
        shape = f"{prompts} x {scorer.examples[0].longest}, {len(scorer.shared_prefix)} of them shots"
        with _tuned(model), head_parameters(model) as parameters:
            passes = {
                "forward": partial(_forward_passes, scorer),
                GRADIENT: partial(_gradient_passes, scorer, parameters),
            }
            for what, call in passes.items():
                peers = {
                    "whole prompts": partial(call, whole),
                    "shots read once": partial(call, once, share_prefix=True),
                }
                yield {"what": what, "shape": shape, "dtype": "bfloat16", "peers": _compared(peers)}
        free_memory()


def _number_tokenizer() -> Any:
    """A tokenizer whose tokens are numbers from 0 to 9,999."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({str(n): n for n in range(10000)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _sensitivities(model: Any) -> Iterator[Row]:
    scorer = _scorer(model, 100, 128)
    with _tuned(model), head_parameters(model) as parameters:
        figures = _compared({OURS: partial(_gradient_passes, scorer, parameters, scorer.batches)}, rounds=3)
    peers = {OURS: {"s": figures[OURS]["ms"] / 1e3}}
    yield {"what": "sensitivities", "shape": "1024 heads, 100 x 128", "dtype": "bfloat16", "peers": peers}

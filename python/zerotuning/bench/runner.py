"""`zerotuning bench`: speed and memory beside the other ways of doing the same, in one run, as ratios.

Peers take turns round by round, so that whatever else the machine does hits all alike; a figure is the median of its
rounds, a ratio the median of the rounds' ratios to the untuned attention of the same round.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from zerotuning import ops
from zerotuning.errors import ZeroTuningError
from zerotuning.files import write_bytes_atomically, write_json_atomically, write_text_atomically
from zerotuning.machine import machine
from zerotuning.plots.head_map import can_plot

BENCHMARKS = ("attention", "decode", "calibration", "search", "sensitivity")
UNTUNED = "untuned sdpa"
OURS = "zerotuning"
#: Query heads, key heads, head size: SmolLM2-135M's and Llama-3.1-8B's.
HEADS = ((9, 3, 64), (32, 8, 128))
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
#: Peers that keep a [H, T, T] matrix are left out where it would take more.
LARGEST_MATRIX = 2**29
#: FlexAttention is compiled anew for every shape, half a minute each on the CPU.
FLEX_LENGTHS = (1024,)
#: Colours that colour-blind readers can tell apart.
OKABE_ITO = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
Row = dict[str, Any]


def run_bench(
    kind: str,
    output: Path | None = None,
    device: str | None = None,
    plot: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs one of BENCHMARKS, prints its table and writes it.

    Args:
        options: of `search`, the fields of bench_search.SearchBench. Its rows are written one by one, and those that a
            .json `output` holds already are not made again.
        output: a .json file, or a .csv file with a line for each peer's figure.
        device: "cpu" or "cuda"; by default the GPU if there is one that the operators run on.
        plot: a picture of the ratios, .png or .svg.
    """
    on_cuda = torch.cuda.is_available() and ops.runs_on("cuda")
    device = device or ("cuda" if on_cuda else "cpu")
    if device == "cuda" and not on_cuda:
        raise ZeroTuningError("device cuda: no GPU is there that this build of zerotuning has operators for")
    if output is not None and output.suffix.lower() not in (".json", ".csv"):
        raise ZeroTuningError(f"output must end in .json or .csv, got {output}")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise ZeroTuningError(f"plot must end in .png or .svg, got {plot}")
    where, rows_of = _measurements(kind, device, output, options)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    rows: list[Row] = []
    for row in rows_of():
        rows.append(row)
        print(as_line(row), flush=True)
        if kind == "search" and output is not None:
            _write(output, {"benchmark": kind, "machine": where, "rows": rows})
    result = {"benchmark": kind, "machine": where, "rows": rows}
    if output is not None:
        _write(output, result)
    if plot is not None:
        (plot_accuracies if kind == "search" else plot_ratios)(result, plot)
    return result


def _measurements(
    kind: str, device: str, output: Path | None, options: Mapping[str, Any]
) -> tuple[dict[str, Any], Callable[[], Iterable[Row]]]:
    """What the figures depend on, and what makes the rows."""
    where = machine()
    if device == "cuda":
        from zerotuning.bench import cuda as bench_cuda

        where |= bench_cuda.card()
    if kind == "search":
        from zerotuning.bench.search import SearchBench, read_rows

        search = SearchBench(device=device, **options)
        done = read_rows(output) if output is not None and output.suffix.lower() == ".json" else []
        return where, lambda: search.rows(done)
    if kind == "sensitivity":
        from zerotuning.bench.sensitivity import sensitivity_rows

        return where, lambda: sensitivity_rows(device=device)
    if device == "cuda":
        return where, bench_cuda.ROWS[kind]
    if kind == "calibration":
        from zerotuning.bench.model_cpu import calibration_rows

        return where, calibration_rows
    rows: Callable[[], Iterable[Row]] = bench_attention if kind == "attention" else bench_decode
    return where, rows


def _write(output: Path, result: Mapping[str, Any]) -> None:
    if output.suffix.lower() == ".csv":
        write_text_atomically(output, as_csv(result["rows"]))
    else:
        write_json_atomically(output, result)


def as_csv(rows: Sequence[Row]) -> str:
    """A line for each figure: what, shape, dtype, peer, unit, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("what", "shape", "dtype", "peer", "unit", "value"))
    for row in rows:
        for peer, figures in row["peers"].items():
            for unit, value in figures.items():
                writer.writerow((row["what"], row["shape"], row["dtype"], peer, unit, value))
    return text.getvalue()


def plot_ratios(result: Mapping[str, Any], path: Path) -> None:
    """Ratios to the first peer, one panel for each `what`, bars grouped by shape."""
    figure_class = _figure_class()
    rows = [row for row in result["rows"] if any("ratio" in figures for figures in row["peers"].values())]
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    figure = figure_class(figsize=(9, 3 * max(len(kinds), 1)), layout="constrained")
    for number, kind in enumerate(kinds):
        axes = figure.add_subplot(len(kinds), 1, number + 1)
        own = [row for row in rows if row["what"] == kind]
        names = list(dict.fromkeys(name for row in own for name in row["peers"]))
        width = 0.8 / len(names)
        for place, name in enumerate(names):
            heights = [row["peers"].get(name, {}).get("ratio", float("nan")) for row in own]
            middles = [i + (place - (len(names) - 1) / 2) * width for i in range(len(own))]
            label = None if number else name
            axes.bar(middles, heights, width, label=label, color=OKABE_ITO[place % len(OKABE_ITO)])
        axes.set_yscale("log")
        axes.axhline(1, color="black", linewidth=0.8)
        shapes = [f"{row['shape']}, {row['dtype']}".replace(", ", "\n") for row in own]
        axes.set_xticks(range(len(own)), shapes, fontsize=7)
        axes.set_ylabel("time / untuned")
        axes.set_title(kind)
    figure.legend(loc="outside upper center", fontsize=8, ncols=6)
    _save(figure, path)


def plot_accuracies(result: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy over tasks of each method of `bench search`, with its 95 % interval."""
    figure_class = _figure_class()
    means = [(row["shape"], *item) for row in result["rows"] if row["what"] == "mean" for item in row["peers"].items()]
    figure = figure_class(figsize=(7, 0.35 * len(means) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, _, one) in enumerate(means):
        axes.plot([one["low"], one["high"]], [place, place], color=OKABE_ITO[0], linewidth=1.5)
        axes.plot(one["accuracy"], place, "o", color=OKABE_ITO[1])
    names = [f"{name}, {shape.split(', ')[1]}" for shape, name, _ in means]
    axes.set_yticks(range(len(means)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"accuracy, mean of {means[0][0].split(',')[0]}, and 95 % interval" if means else "accuracy")
    _save(figure, path)


def _figure_class() -> Any:
    if not can_plot():
        raise ZeroTuningError('plot needs matplotlib: pip install "zerotuning[plot]"')
    from matplotlib.figure import Figure

    return Figure


def _save(figure: Any, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=150)
    write_bytes_atomically(path, picture.getvalue())


def take_turns(
    peers: Mapping[str, Callable[[], object]],
    seconds: float,
    rounds: int = 5,
    within: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each peer and its median ratio to the first, from interleaved rounds.

    Each timed call follows one that is not timed: what the peer before it left in caches and page tables would count
    for whoever comes next (up to 1.4 times the time after a peer that keeps a [H, T, T] matrix).

    rounds    at least, however few seconds there are
    within    what a peer's calls go on in; entering it is not timed
    wait      returns when all work that was started is done: on a GPU `torch.cuda.synchronize`
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
        for name, peer in peers.items():
            with (within or {}).get(name, nullcontext)():
                peer()
                wait()
                started = time.perf_counter()
                peer()
                wait()
                times[name].append(time.perf_counter() - started)
    return _summary(times)


def _summary(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    first = next(iter(times.values()))
    return {
        name: {
            "ms": 1e3 * statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in times.items()
    }


# The peers: each takes query (B, H, T, D), key and value (B, Hkv, T, D), log_scale (H) and returns (B, H, T, D).


def untuned_sdpa(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """torch's attention with every γ = 1."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def ours(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    return ops.attention(query, key, value, log_scale)[0]


def paper_eager(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """The paper's published code: repeated keys, a dense softmax in float32, scaled column, renormalised."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mask = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    scaled = torch.cat((weights[..., :1] * log_scale.exp()[:, None, None], weights[..., 1:]), dim=-1)
    return (scaled / scaled.sum(dim=-1, keepdim=True)).to(query.dtype) @ value


def additive_mask(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
    """torch's attention with the bias and the causal mask written out as [1, H, T, T]."""
    length = query.shape[2]
    mask = torch.full((length, length), -torch.inf, device=query.device).triu(1).repeat(query.shape[1], 1, 1)
    mask[:, :, 0] += log_scale[:, None].detach()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype)[None], enable_gqa=True)


def flex_attention_peer() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled, with the bias as score_mod (forward only on the CPU)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    masks: dict[int, Any] = {}

    def flex(query: Tensor, key: Tensor, value: Tensor, log_scale: Tensor) -> Tensor:
        def biased(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return torch.where(column == 0, score + log_scale[head], score)

        length = query.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(causal, None, None, length, length, device=query.device)
        return compiled(query, key, value, score_mod=biased, block_mask=masks[length], enable_gqa=True)  # type: ignore[no-any-return]

    return flex


def attention_inputs(
    heads: tuple[int, int, int], length: int, dtype: torch.dtype, batch: int = 1, device: str = "cpu"
) -> list[Tensor]:
    """Random query, key, value as a model lays them out (heads inside rows), and log γ."""
    shapes = [(batch, length, count, heads[2]) for count in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes]
    return [*tensors, torch.randn(heads[0], device=device)]


def bench_attention(
    all_heads: Iterable[tuple[int, int, int]] = HEADS,
    lengths: Sequence[int] = LENGTHS,
    seconds: float = 2.0,
    flex: bool = True,
) -> Iterator[Row]:
    """Forward, and forward + backward, of every peer; then our peak memory by length."""
    torch.manual_seed(0)
    compiled = flex_attention_peer() if flex else None
    for heads in all_heads:
        for dtype in (torch.bfloat16, torch.float32):
            for length in lengths:
                inputs = attention_inputs(heads, length, dtype)
                peers: dict[str, Callable[..., Tensor]] = {UNTUNED: untuned_sdpa, OURS: ours}
                if heads[0] * length * length * 4 <= LARGEST_MATRIX:
                    peers |= {"paper's eager code": paper_eager, "additive mask": additive_mask}
                forward = dict(peers)
                if compiled is not None and length in FLEX_LENGTHS:
                    forward["FlexAttention"] = compiled
                yield _row("forward", heads, length, dtype, _forward_calls(forward, inputs), seconds)
                yield _row("forward + backward", heads, length, dtype, _backward_calls(peers, inputs), seconds)
    yield from memory_rows()


def _forward_calls(
    peers: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor]
) -> dict[str, Callable[[], object]]:
    def call(peer: Callable[..., Tensor]) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> object:
            return peer(*inputs)

        return run

    return {name: call(peer) for name, peer in peers.items()}


def _backward_calls(
    peers: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor]
) -> dict[str, Callable[[], object]]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def call(peer: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> object:
            output = peer(*leaves)
            return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

        return run

    return {name: call(peer) for name, peer in peers.items()}


def _row(
    what: str,
    heads: tuple[int, int, int],
    length: int,
    dtype: torch.dtype,
    calls: dict[str, Callable[[], object]],
    seconds: float,
) -> Row:
    shape = f"{heads[0]}/{heads[1]}/{heads[2]} x {length}"
    figures = take_turns(calls, seconds)
    return {"what": what, "shape": shape, "dtype": str(dtype).removeprefix("torch."), "peers": figures}


def memory_rows(lengths: Sequence[int] = (1024, 2048, 4096, 8192)) -> Iterator[Row]:
    """What one forward + backward of ours allocates in all, 4/2/64 float32: linear in the length."""
    for length in lengths:
        call = _backward_calls({OURS: ours}, attention_inputs((4, 2, 64), length, torch.float32))[OURS]
        call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        allocated = sum(event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0)
        figures = {OURS: {"MiB": allocated / 2**20, "KiB per token": allocated / 2**10 / length}}
        yield {"what": "memory", "shape": f"4/2/64 x {length}", "dtype": "float32", "peers": figures}


def bench_decode(lengths: Sequence[int] = (1024, 8192, 32768), seconds: float = 2.0) -> Iterator[Row]:
    """One query of 32/8/128 heads against a long cache, bfloat16."""
    torch.manual_seed(0)
    for batch in (1, 4):
        for length in lengths:
            query, key, value, log_scale = attention_inputs((32, 8, 128), length, torch.bfloat16, batch)
            query, key, value = query[:, :, -1:], key.contiguous(), value.contiguous()

            def untuned(q: Tensor = query, k: Tensor = key, v: Tensor = value) -> object:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            def tuned(q: Tensor = query, k: Tensor = key, v: Tensor = value, s: Tensor = log_scale) -> object:
                return ops.decode_attention(q, k, v, s)

            figures = take_turns({UNTUNED: untuned, OURS: tuned}, seconds)
            shape = f"{batch} x 32/8/128 x {length}"
            yield {"what": "decode", "shape": shape, "dtype": "bfloat16", "peers": figures}


def as_line(row: Row) -> str:
    """Each peer's milliseconds and its ratio to the untuned attention."""
    cells = []
    for name, figures in row["peers"].items():
        values = [_shown(unit, value) for unit, value in figures.items()]
        cells.append(f"{name} {' '.join(values)}")
    return f"{row['what']:<19} {row['shape']:<22} {row['dtype']:<9} " + " | ".join(cells)


def _shown(unit: str, value: object) -> str:
    if not isinstance(value, float | int):
        return f"{unit}: {value}"
    return f"{value:.2f}x" if unit == "ratio" else f"{value:.3g} {unit}"

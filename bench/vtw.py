"""Measure what the withdrawal of visual tokens saves in prefill, memory, cache and decoding, beside the formula.

    python bench/vtw.py --size real                      on a GPU: Llama shapes of 7B and 13B, one record per cell
    python bench/vtw.py --size real --only 7b            some of the cells, by a part of their names
    python bench/vtw.py --size real --small --records /tmp/x   the same with every shape cut to a toy's, on a CPU
    python bench/vtw.py --size wide                      on a CPU: 12 layers of width 512, 576 visual tokens
    python bench/vtw.py --size toy                       seconds, to try the command
    python bench/vtw.py --table                          the records as a Markdown table

Weights are random: times and memory do not depend on them. A cell is a shape, a prompt of 35 words, visual tokens and
60 words, a batch and a kind of attention. Within a round every layer has its turn, and shares are taken within rounds.
Records are written one by one, those that exist are kept, and a cell that does not fit into memory is recorded as that.
``real`` has not been run yet: no record of it lies in bench/records.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import SettingError, TrimtabError, TrimtabWarning

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "records"
SYSTEM, TEXT = 35, 60
"""Words before and behind the image."""
DECODE_STEPS = 16
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a language model."""

    layers: int
    width: int
    mlp: int
    heads: int
    vocab: int = 32064


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        name: Name of its record.
        shape: The language model.
        visual: Visual tokens of each prompt.
        batch: Prompts at once.
        attention: ``attn_implementation`` of transformers.
        withdrawals: Layers at which tokens leave; the whole model is measured besides.
        text: Words before and behind the image.
    """

    name: str
    shape: LlamaShape
    visual: int
    batch: int
    attention: str
    withdrawals: tuple[int, ...]
    text: tuple[int, int] = (SYSTEM, TEXT)

    @property
    def places(self) -> int:
        """Places of a prompt."""
        return sum(self.text) + self.visual


SEVEN = LlamaShape(layers=32, width=4096, mlp=11008, heads=32)
THIRTEEN = LlamaShape(layers=40, width=5120, mlp=13824, heads=40)
WIDE = LlamaShape(layers=12, width=512, mlp=1376, heads=8, vocab=512)
TOY = LlamaShape(layers=4, width=32, mlp=64, heads=2, vocab=64)
REAL_LAYERS = (8, 12, 16, 24, 32)


def cells(size: str) -> list[Cell]:
    """Return the cells of a size."""
    if size == "real":
        return [
            Cell(name=f"{name}_{visual}_{batch}_{short}", shape=shape, visual=visual, batch=batch, attention=attention,
                 withdrawals=tuple(layer for layer in REAL_LAYERS if layer < shape.layers))
            for name, shape in (("7b", SEVEN), ("13b", THIRTEEN))
            for visual in (576, 2880)
            for batch in (1, 8, 32)
            for short, attention in (("sdpa", "sdpa"), ("flash", "flash_attention_2"))
        ]  # fmt: skip
    if size == "wide":
        return [
            Cell(name=f"wide_576_{batch}", shape=WIDE, visual=576, batch=batch, attention="sdpa", withdrawals=(3, 6, 9))
            for batch in (1, 16)
        ]
    return [Cell(name="toy", shape=TOY, visual=24, batch=2, attention="sdpa", withdrawals=(1, 2), text=(3, 5))]


def small(cell: Cell) -> Cell:
    """Return a cell cut to a toy's size, with as many layers as it takes to keep its withdrawals apart."""
    layers = len(cell.withdrawals) + 1
    shape = replace(TOY, layers=layers)
    fitted = tuple(range(1, layers))
    return replace(cell, shape=shape, visual=cell.visual // 36, batch=min(cell.batch, 2), attention="sdpa",
                   withdrawals=fitted, text=(3, 5))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.size is not None:
            measure(options)
        if options.table:
            sys.stdout.write("\n".join(table(read_cells(options.records))) + "\n")
    except TrimtabError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("toy", "wide", "real"), help="what to measure; nothing where left out")
    parser.add_argument("--only", nargs="*", help="parts of names of records, to measure some")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds")
    parser.add_argument("--small", action="store_true", help="cut every shape to a toy's, and use the CPU")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--table", action="store_true", help="print the records as a table")
    return parser


def measure(options: argparse.Namespace) -> None:
    """Make the records that are not there yet.

    Raises:
        SettingError: There is no GPU for ``real``, or no such cell.
    """
    from trimtab.records import write_record

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.size == "real" and not options.small and not torch.cuda.is_available():
        raise SettingError(
            "--size real needs a GPU, but torch sees none. Give --small to try the command on a CPU, or --size wide."
        )
    if options.small and options.records.resolve() == RECORDS:
        raise SettingError("--small makes no records to keep. Give another folder with --records.")
    wanted = [cell for cell in cells(options.size) if not options.only or any(o in cell.name for o in options.only)]
    if not wanted:
        names = ", ".join(cell.name for cell in cells(options.size))
        raise SettingError(f"--only must name some of {names}, but {' '.join(options.only)!r} came.")
    device = torch.device("cuda" if options.size == "real" and not options.small else "cpu")
    for cell in wanted:
        path = options.records / f"vtw_{cell.name}.json"
        if path.exists():
            continue
        sys.stdout.write(f"{cell.name} ...\n")
        sys.stdout.flush()
        record = bench_cell(small(cell) if options.small else cell, device, options.repeats)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_record(path, record)
        for row in record["results"]["rows"]:
            sys.stdout.write(f"  layer {row['layer']}: {row['share']:.3f} of the time, {row['flops_share']:.3f} told\n")


def bench_cell(cell: Cell, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure one cell and return its record."""
    from trimtab.records import make_record

    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, Any] = {"rows": [], "out_of_memory": None}
    try:
        results |= _cell_results(cell, device, dtype, repeats)
    except torch.cuda.OutOfMemoryError as error:
        results["out_of_memory"] = str(error).partition(".")[0]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    settings = {**asdict(cell), "places": cell.places, "dtype": str(dtype).removeprefix("torch."), "repeats": repeats}
    return make_record("vtw_bench", settings, results, seconds=time.perf_counter() - began)


def _cell_results(cell: Cell, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    model = build_llama(cell.shape, cell.attention, device, dtype)
    inputs, mask = prompts_of(cell, device)
    found = time_withdrawals(model, inputs, cell.withdrawals, visual_mask=mask, repeats=repeats)
    return {**found, "search": time_search(model, {**inputs, "visual_mask": mask}, repeats=max(1, repeats // 3))}


def build_llama(shape: LlamaShape, attention: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a `LlamaForCausalLM` with random weights in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.width, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=8192,
    )  # fmt: skip
    config._attn_implementation = attention
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def prompts_of(cell: Cell, device: torch.device) -> tuple[Batch, torch.Tensor]:
    """Return prompts of one length, and where their visual tokens stand."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, cell.shape.vocab, (cell.batch, cell.places), generator=generator)
    mask = torch.zeros(cell.batch, cell.places, dtype=torch.bool)
    mask[:, cell.text[0] : cell.text[0] + cell.visual] = True
    return {"input_ids": ids.to(device)}, mask.to(device)


def time_withdrawals(
    model: Any,
    inputs: Batch,
    withdrawals: Sequence[int],
    *,
    visual_mask: torch.Tensor | None = None,
    visual: int | None = None,
    repeats: int = 7,
    warmup: int = 2,
    decode: bool = True,
) -> dict[str, Any]:
    """Time the prefill for each layer of withdrawal and without any, in turns, and measure memory and cache.

    Args:
        model: In evaluation mode.
        inputs: Arguments of its forward; with ready visual features where it has a vision tower.
        withdrawals: Layers at which tokens leave.
        visual_mask: Where visual tokens stand, for a model without placeholders.
        visual: Visual tokens of each row, where there is no mask.
        repeats: Timed rounds.
        warmup: Rounds before that.
        decode: Whether to time decoding, too.

    Returns:
        ``rows``, one per layer, the whole model last: medians of ``seconds``; ``share`` of the whole model's time
        within a round with quartiles ``low`` and ``high``; ``flops_share`` as the formula tells; ``peak_mib``,
        ``kv_bytes`` and what is told of it; ``decode_seconds`` and ``decode_share`` of a step.
    """
    from trimtab.bench.measure import peak_memory
    from trimtab.methods.vtw.cost import kv_bytes, prefill_flops, read_text_shape

    shape = read_text_shape(model)
    rows, places = inputs["input_ids"].shape
    count = int(visual_mask[0].sum()) if visual_mask is not None else int(visual or 0)
    layers = [*withdrawals, shape.layers]
    seconds: dict[int, list[float]] = {layer: [] for layer in layers}
    steps: dict[int, list[float]] = {layer: [] for layer in layers}
    for number in range(warmup + repeats):
        turn = number % len(layers)
        for layer in layers[turn:] + layers[:turn]:
            with withdrawn(model, layer, visual_mask):
                taken, cache = timed(lambda: prefill(model, inputs))
                if number >= warmup:
                    seconds[layer].append(taken)
                    if decode:
                        steps[layer].append(_decode_seconds(model, inputs, cache))
            del cache
    found = []
    for layer in layers:
        drops = ((layer, places - count),) if layer < shape.layers else ()
        with withdrawn(model, layer, visual_mask):
            memory = peak_memory(lambda: prefill(model, inputs), inputs["input_ids"].device)
            cache = prefill(model, inputs)
            held = cache_bytes(cache)
        number_bytes = cache.layers[0].keys.element_size()
        del cache
        told = rows * kv_bytes(shape, places, drops, number_bytes)
        row = {
            "layer": layer, "seconds": statistics.median(seconds[layer]), **_share(seconds, layer, layers[-1]),
            "flops_share": prefill_flops(shape, places, drops) / prefill_flops(shape, places),
            "peak_mib": memory["mib"], "kv_bytes": held, "kv_bytes_told": told,
        }  # fmt: skip
        if decode:
            row["decode_seconds"] = statistics.median(steps[layer])
            row["decode_share"] = _share(steps, layer, layers[-1])["share"]
        found.append(row)
    return {"rows": found, "places": places, "visual": count, "batch": rows}


def _share(seconds: Mapping[int, Sequence[float]], layer: int, whole: int) -> dict[str, float]:
    ratios = [ours / theirs for ours, theirs in zip(seconds[layer], seconds[whole], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    return {"share": statistics.median(ratios), "low": low, "high": high}


@contextmanager
def withdrawn(model: Any, layer: int, visual_mask: torch.Tensor | None = None) -> Iterator[None]:
    """Withdraw visual tokens for a while; without the warning that layer 0 never sees them."""
    from trimtab.methods.vtw import withdraw

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"withdraw.layer is 0", category=TrimtabWarning)
        handle = withdraw(model, layer, visual_mask=visual_mask)
    with handle:
        yield


@torch.no_grad()
def prefill(model: Any, inputs: Batch) -> Any:
    """Run a prompt and return its cache."""
    return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def _decode_seconds(model: Any, inputs: Batch, cache: Any) -> float:
    """Median seconds of a step behind a prompt."""
    ids = inputs["input_ids"][:, -1:]
    mask = inputs.get("attention_mask")
    taken = []
    for _ in range(DECODE_STEPS):
        given: Batch = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            given["attention_mask"] = mask
        taken.append(timed(lambda given=given: model(**given))[0])  # type: ignore[misc]
    return statistics.median(taken)


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call, the device waited for, and what it returned."""
    from trimtab.bench.timing import wait_for_device

    wait_for_device()
    began = time.perf_counter()
    found = step()
    wait_for_device()
    return time.perf_counter() - began, found


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values of a cache."""
    return sum(one.numel() * one.element_size() for layer in cache.layers for one in (layer.keys, layer.values))


def naive_curve(model: Any, batches: Sequence[Batch], layers: Sequence[int]) -> list[float]:
    """Return the mean divergence at each layer by running the whole model anew for each, as the released code does.

    Args:
        model: In evaluation mode.
        batches: Arguments of its forward, with ``labels`` where answers follow the prompts, and with ``visual_mask``
            where a model has no placeholders.
        layers: The candidates.
    """
    from trimtab.methods.vtw.layer_choice import withdrawal_divergence

    sums, count = [0.0] * len(layers), 0
    with torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "visual_mask")}
            last = _last_place(batch)
            full = _next_word(model, inputs, last)
            count += len(full)
            for number, layer in enumerate(layers):
                with withdrawn(model, layer, batch.get("visual_mask")):
                    sums[number] += float(withdrawal_divergence(_next_word(model, inputs, last), full).sum())
    return [one / count for one in sums]


def _last_place(batch: Batch) -> torch.Tensor:
    """The place before the first label, or the last one: [row, 1, 1]."""
    ids: torch.Tensor = batch["input_ids"]
    if "labels" not in batch:
        return torch.full((len(ids), 1, 1), ids.shape[1] - 1, device=ids.device)
    labels: torch.Tensor = batch["labels"]
    return ((labels != -100).long().argmax(1) - 1)[:, None, None]


def _next_word(model: Any, inputs: Batch, last: torch.Tensor) -> torch.Tensor:
    states = model.base_model(**inputs, use_cache=False).last_hidden_state
    rows = states.gather(1, last.expand(-1, 1, states.shape[2]))[:, 0]
    found: torch.Tensor = model.get_output_embeddings()(rows)
    return found


def count_layers(model: Any, places: int, step: Callable[[], object]) -> float:
    """Run a step and return the layers that it ran, in layers over one whole batch, by hooks on all layers.

    Args:
        model: The model.
        places: Rows times places of that batch.
        step: What to run.
    """
    from trimtab.anatomy.decoder import open_decoder

    seen = 0

    def after(module: Any, args: Any, output: Any) -> None:
        nonlocal seen
        states = output[0] if isinstance(output, tuple) else output
        seen += states.shape[0] * states.shape[1]

    hooks = [layer.register_forward_hook(after) for layer in open_decoder(model).layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return seen / places


def search_ways(model: Any, batches: Sequence[Batch], layers: Sequence[int]) -> dict[str, Callable[[], list[float]]]:
    """Return the ways to search that are compared; each gives its curve at `layers`."""
    from trimtab.methods.vtw.search import search_withdrawal_layer

    def ours(stacked: bool) -> list[float]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No layer from", category=TrimtabWarning)
            points = {p.layer: p.mean for p in search_withdrawal_layer(model, batches, stacked=stacked).curve}
        return [points[layer] for layer in layers]

    return {
        "naive": lambda: naive_curve(model, batches, layers),
        "one_pass": lambda: ours(False),
        "stacked": lambda: ours(True),
    }


def count_search(model: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return what each way to search costs, in layers over a whole batch, and how far their curves lie apart."""
    from trimtab.anatomy.decoder import open_decoder

    layers = list(range(open_decoder(model).depth))
    places = sum(batch["input_ids"].numel() for batch in batches)
    curves: dict[str, list[float]] = {}
    counts = {}
    for name, way in search_ways(model, batches, layers).items():
        counts[name] = count_layers(model, places, lambda name=name, way=way: curves.update({name: way()}))  # type: ignore[misc]
    apart = {
        name: max(abs(a - b) for a, b in zip(curves[name], curves["naive"], strict=True))
        for name in ("one_pass", "stacked")
    }
    return {"layers": layers, "evaluations": counts, "apart_from_naive": apart}


def time_search(model: Any, batch: Batch, *, repeats: int = 5) -> dict[str, Any]:
    """Time the ways to search over all layers, in turns.

    Returns:
        What `count_search` tells, median ``seconds`` by way, and how many ``times`` faster than naive each is.
    """
    from trimtab.anatomy.decoder import open_decoder
    from trimtab.bench.timing import time_steps

    every = list(range(open_decoder(model).depth))
    told = count_search(model, [batch])
    found = time_steps(search_ways(model, [batch], every), repeats=repeats, warmup=1)
    seconds = {name: one["median"] for name, one in found["steps"].items()}
    times = {name: {key: one[key] for key in ("median", "low", "high")} for name, one in found["ratios"].items()}
    return {**told, "seconds": seconds, "times": times}


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return the kept records."""
    from trimtab.records import read_record

    return [read_record(path) for path in sorted(folder.glob("vtw_*.json"))]


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines of a Markdown table, one per cell and layer."""
    lines = [
        "| cell | layer | prefill | share of time | formula | measured / formula | peak MiB | KV cache | decode step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        settings, results = record["settings"], record["results"]
        name = f"{settings['name']}, {settings['attention']}"
        if results["out_of_memory"]:
            lines.append(f"| {name} | | out of memory | | | | | | |")
        for row in results["rows"]:
            cells = [
                name, str(row["layer"]), f"{1000 * row['seconds']:.1f} ms", f"{row['share']:.3f}",
                f"{row['flops_share']:.3f}", f"{row['share'] / row['flops_share']:.2f}", f"{row['peak_mib']:.0f}",
                f"{row['kv_bytes'] / 2**20:.1f} MiB", f"{1000 * row['decode_seconds']:.2f} ms",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())

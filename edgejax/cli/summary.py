"""The end of a run: the adapter (or the model), the page, and what the terminal says."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edgejax.core.allocator import release_freed_memory, release_library_code
from edgejax.core.arrays import PyTree
from edgejax.core.host import cpu_name, host_limits, package_versions
from edgejax.core.units import format_bytes, format_seconds
from edgejax.measure.report import ReportData, Sample, write_report

if TYPE_CHECKING:
    from edgejax.data import Split
    from edgejax.models import LoraConfig
    from edgejax.train import FinetuneResult, TrainSettings
    from edgejax.weights import LoadedModel, OpenedModel

MEMORY_NOTES = {
    "weights": "the frozen base, bytes of its arrays",
    "adapters": "what is trained, bytes of its arrays",
    "trained weights": "all that are trained, bytes of their arrays",
    "optimizer": "its state, bytes of its arrays",
    "activations": "XLA's temporary memory of one step: activations, gradients, scratch (buffer assignment)",
    "runtime": "resident before the model was loaded: Python, JAX, libraries",
    "rest": "up to the peak of the process: compiler, allocator, data",
}


def finish(
    options: argparse.Namespace,
    rows: "Split",
    settings: "TrainSettings",
    lora: "LoraConfig | None",
    result: "FinetuneResult",
    started: str,
) -> None:
    """Writes what was trained and the page into the run's folder, then says where everything is and how it went.

    Raises:
      RunError: a file cannot be written; the checkpoints are whole, so resuming writes it again.
    """
    release_freed_memory()  # of training: the sample compiles programs of its own
    release_library_code()
    model: LoadedModel | OpenedModel = result.model
    trained = write_trained(model, lora, result)
    sample = make_sample(options, model, lora, result)
    data = report_data(options, model, rows, settings, lora, result, sample, started)
    page = write_report(result.run_dir / "report.html", data)
    if not options.quiet:
        print(closing_text(result, sample, trained, page))
    if options.json:
        record = result.summary() | {
            "run_dir": str(result.run_dir), "report": str(page), "trained": str(trained),
            "sample": None if sample is None else dataclasses.asdict(sample),
        }  # fmt: skip
        print(json.dumps(record))


def write_trained(
    model: "LoadedModel | OpenedModel", lora: "LoraConfig | None", result: "FinetuneResult"
) -> Path:
    """``adapter/`` in PEFT's format, or after full-parameter training ``model/`` as safetensors (bf16)."""
    from edgejax.weights.export import export

    if lora is None:
        out = result.run_dir / "model"
        return export(model, out, format="merged-safetensors", params=result.trainable, overwrite=True)
    out = result.run_dir / "adapter"
    return export(model, out, format="peft", adapters=result.adapters, lora=lora, overwrite=True)


def make_sample(
    options: argparse.Namespace,
    model: "LoadedModel | OpenedModel",
    lora: "LoraConfig | None",
    result: "FinetuneResult",
) -> Sample | None:
    """The prompt's most likely continuation by the base and by what was trained; None with ``--sample-tokens 0``."""
    if options.sample_tokens == 0:
        return None
    import jax
    import numpy as np

    from edgejax.models import generate
    from edgejax.train.held import as_patterns
    from edgejax.weights import LoadedModel, OpenedModel

    def text(model: LoadedModel, adapters: PyTree) -> str:
        return generate(
            model, options.prompt, adapters=adapters, lora=lora, max_tokens=options.sample_tokens
        ).text

    if lora is None:
        base = model.load() if isinstance(model, OpenedModel) else model
        base = dataclasses.replace(base, params=as_patterns(base.params))
        before = text(base, {})
        base = dataclasses.replace(base, params=as_patterns(result.trainable))  # not two models at a time
        release_freed_memory()
        after = text(base, {})
    else:  # adapters of zeros leave the base as it is, to the bit, and need no further program
        assert isinstance(model, LoadedModel)  # adapters are trained beside a base with its weights
        before = text(model, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), result.adapters))
        after = text(model, result.adapters)
    return Sample(prompt=options.prompt, before=before, after=after)


def report_data(
    options: argparse.Namespace,
    model: "LoadedModel | OpenedModel",
    rows: "Split",
    settings: "TrainSettings",
    lora: "LoraConfig | None",
    result: "FinetuneResult",
    sample: Sample | None,
    started: str,
) -> ReportData:
    """What the page shows; the curve is read from ``metrics.jsonl``, so that a resumed run's is whole."""
    from edgejax.train import read_metrics

    records = read_metrics(result.run_dir / "metrics.jsonl")
    curve = {
        kind: [(r["step"], r["loss"]) for r in records if r["kind"] == kind] for kind in ("train", "eval")
    }
    adapters = {} if lora is None else dataclasses.asdict(lora)
    given = {"model": model.source.name, "data": options.data, "base": model.source.base, "mode": result.mode}
    return ReportData(
        title=f"{Path(model.source.name).name} on {', '.join(Path(name).name for name in options.data)}",
        device=device_name(),
        started=started,
        duration_s=result.seconds,
        train_loss=curve["train"],
        held_out_loss=curve["eval"],
        tokens_per_s=result.tokens_per_s,
        peak_bytes=result.memory.peak_rss_bytes,
        memory_bytes=memory_by_source(result),
        memory_notes=MEMORY_NOTES,
        receipt=result.receipt.entries(),
        settings=given | {"sequence length": rows.train.seq_length} | adapters | settings.to_json(),
        versions=package_versions(),
        hashes={
            "model": model.source.sha256,
            "training rows": rows.train.fingerprint,
            "held-out rows": rows.held_out.fingerprint,
        },
        samples=[] if sample is None else [sample],
    )


def memory_by_source(result: "FinetuneResult") -> dict[str, int]:
    """Bytes by source up to the peak of the process, named as ``MEMORY_NOTES`` does."""
    sources = result.memory.by_source()
    if result.mode == "full":
        sources = {
            ("trained weights" if name == "adapters" else name): size for name, size in sources.items()
        }
    rest = result.memory.peak_rss_bytes - sum(sources.values())
    return sources | ({"rest": rest} if rest > 0 else {})


def device_name() -> str:
    """What the numbers were measured on."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{cpu_name()}, {host_limits().cores_usable} cores, {sys.platform}"
    return f"{len(jax.devices())} x {device.device_kind}, {sys.platform}"


def closing_text(result: "FinetuneResult", sample: Sample | None, trained: Path, page: Path) -> str:
    """The last thing a person reads."""
    before, after = result.held_out_before, result.held_out_after
    lines = [
        "",
        f"held-out loss        {before.loss:.4f} -> {after.loss:.4f} nats per token",
        f"held-out perplexity  {before.perplexity:.3f} -> {after.perplexity:.3f}",
    ]
    if result.tokens_per_s is not None:
        lines.append(f"speed                {result.tokens_per_s:,.0f} tokens/s, measured on {device_name()}")
    lines.append(
        f"time                 {format_seconds(result.seconds)} for {result.steps} steps and evaluations"
    )
    lines.append(f"peak memory          {format_bytes(result.memory.peak_rss_bytes)} resident, of which")
    lines += [f"  {name:<19}{format_bytes(size):>10}" for name, size in memory_by_source(result).items()]
    device, step = result.memory.device_peak_bytes, result.memory.step_peak_bytes
    if device is not None and step is not None:
        lines.append(
            f"device memory        {format_bytes(device)} in use at its most, {format_bytes(step)} by the compiled step"
        )
    if sample is not None:
        lines += ["", f"prompt  {sample.prompt}", f"before  {_one_line(sample.before)}"]
        lines += [f"after   {_one_line(sample.after)}"]
    name = "adapter" if result.mode == "lora" else "model"
    lines += ["", f"run     {result.run_dir}", f"{name:<8}{trained}", f"report  {page}"]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
